"""What became of the images that were found: left out, enlarged, replaced; one value in log, manifest and card."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ..classes import LISTED, listed

logger = logging.getLogger(__name__)


class DataError(ValueError):
    """Data that cannot be used, said in one sentence also where a `DataLoader`'s worker found it.

    A worker's error arrives as `DataError(its traceback)`, of which the sentence is the last line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


@dataclass
class Note:
    """`count` things of one kind, the first few by name, and what is said of them."""

    count: int
    examples: list[str]
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        names = listed(self.examples) + (", ..." if self.count > len(self.examples) == LISTED else "")
        return f"{self.count} {self.text} ({names}){'; ' * bool(self.remedy)}{self.remedy}."


@dataclass
class DataReport:
    """Notes by kind: "ending", "duplicate", "unusable", "beside", "small", "unreadable", ...

    Example:
        >>> report = DataReport()
        >>> report.note("ending", ["cat/1.heic"], "files are left out, since they are not images that can be read")
        >>> list(report)
        ['1 files are left out, since they are not images that can be read (cat/1.heic).']
    """

    notes: dict[str, Note] = field(default_factory=dict)

    def note(self, kind: str, names: Iterable[str], text: str, *, remedy: str = "", count: int | None = None) -> None:
        """Notes things of one kind, in place of what was noted of it before; nothing where there are none."""
        names = list(names)
        self.notes.pop(kind, None)
        if names:
            self.notes[kind] = Note(len(names) if count is None else count, names[:LISTED], text, remedy)

    def count(self, *kinds: str) -> int:
        return sum(self.notes[kind].count for kind in kinds if kind in self.notes)

    def __iter__(self) -> Iterator[str]:
        return map(str, self.notes.values())

    def log(self, *kinds: str) -> None:
        """One warning for each note, of these kinds where some are named."""
        for kind, note in self.notes.items():
            if not kinds or kind in kinds:
                logger.warning("%s", note)

    def to_json(self) -> dict[str, Any]:
        """{kind: {"count", "examples", "text"}}."""
        return {
            kind: {"count": note.count, "examples": note.examples, "text": note.text}
            for kind, note in self.notes.items()
        }
