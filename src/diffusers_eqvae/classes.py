"""The classes of a data set: one table of ids, names and image counts, which stores, models and pipelines compare."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LISTED = 5
_INTEGER = re.compile(r"[+-]?[0-9]+")


@dataclass(frozen=True)
class ClassTable:
    """Names and numbers of images by class id 0 .. N-1.

    Args:
        names: by id; a class without a name has its id as one.
        counts: images by id, or None where nobody counted.

    Example:
        >>> table = ClassTable.of_labels(np.array([0, 2, 2]), ["cat", "dog", "owl"])
        >>> table.id2label, table.counts, table.present, table.empty
        ({0: 'cat', 1: 'dog', 2: 'owl'}, (1, 0, 2), [0, 2], [1])
    """

    names: tuple[str, ...] = ()
    counts: tuple[int, ...] | None = None

    @classmethod
    def of_labels(cls, labels: np.ndarray | None, names: Sequence[str] | None = None) -> ClassTable:
        """Of class ids (N,); without names, ids are their own. No classes where there are no labels."""
        if labels is None:
            return cls()
        counts = np.bincount(labels, minlength=len(names or ()))
        if names and len(counts) > len(names):
            raise ValueError(f"Labels must be ids of the {len(names)} classes that are named; got {len(counts) - 1}.")
        return cls(tuple(names or map(str, range(len(counts)))), tuple(counts.tolist()))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ClassTable | None:
        """The table that `to_config` wrote, also after JSON; None where it states no names."""
        names = parse_id2label(config.get("id2label"))
        if not names:
            return None
        counted = _counts(config.get("class_counts") or {})
        ids = range(max(names) + 1)
        counts = tuple(counted.get(each, 0) for each in ids) if counted else None
        written = {int(key): label for key, label in config["id2label"].items()}
        labels = [written.get(each, str(each)) for each in ids]
        return cls(tuple(label if isinstance(label, str) else ", ".join(label) for label in labels), counts)

    def to_config(self) -> dict[str, Any]:
        """{"id2label": {"0": name, ...}, "class_counts": {"0": images, ...}}: of a manifest, or a model's config."""
        named = {str(key): name for key, name in enumerate(self.names)}
        return {"id2label": named, "class_counts": {str(key): count for key, count in enumerate(self.counts or ())}}

    def __len__(self) -> int:
        return len(self.names)

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.names))

    @property
    def images(self) -> dict[str, int | None]:
        """Images by name, as a card states them; None where nobody counted."""
        return dict(zip(self.names, self.counts or [None] * len(self), strict=True))

    @property
    def present(self) -> list[int]:
        """The ids that have images; all where nobody counted."""
        return [each for each in range(len(self)) if self.counts is None or self.counts[each]]

    @property
    def empty(self) -> list[int]:
        """The ids without images."""
        return [each for each, count in enumerate(self.counts or ()) if not count]

    def describe_empty(self) -> str | None:
        """Names the classes without images and says what follows; None where every class has some."""
        if not self.empty:
            return None
        called = listed(self._called(self.empty))
        return (
            f"{len(self.empty)} of {len(self)} classes have no images: {called}. They cannot be "
            "learnt and are left out where all classes are sampled; number the labels from 0 without gaps to be rid "
            "of them."
        )

    def require_same(self, given: ClassTable, *, whose: str, remedy: str) -> None:
        """Refuses a table of other names, or of the same in another order; counts may differ.

        Two names are of one class where they share a synonym that no other class has, as "n01440764, tench" and
        "tench" do.

        Example:
            >>> model.require_same(store.classes, whose="the model runs/sit", remedy="train a new model")
        """
        if len(self) != len(given):
            what = f"{len(self)} classes there, {len(given)} here"
        else:
            differing = strangers(parse_id2label(self.id2label), parse_id2label(given.id2label))
            if not differing:
                return
            order = ", the same ones in another order" if sorted(self.names) == sorted(given.names) else ""
            said = [f"{each} is {self.names[each]!r} there and {given.names[each]!r} here" for each in differing]
            what = f"{len(differing)} of {len(self)} names differ{order}: {listed(said)}"
        raise ValueError(f"The classes of {whose} are not those of these data: {what}; {remedy}.")

    def uncovered(self, given: ClassTable, *, whose: str, remedy: str) -> str | None:
        """Which of these classes `given` has no images of, as a sentence; None where all are there, or it is unknown.

        Names are compared, synonyms too, whatever their ids. A single class says nothing, and so do ids for names
        where the other side has words.

        Raises:
            ValueError: images of a class that is not one of these.

        Example:
            >>> ClassTable(("cat", "dog")).uncovered(ClassTable(("dog",)), whose="the reference x", remedy="")
            'Of 1 of 2 classes of the reference x there is no image: cat.'
        """
        numbered = [all(map(is_integer, table.names)) for table in (self, given)]
        if min(len(self), len(given)) < 2 or numbered[0] != numbered[1]:
            return None
        ours, theirs = (
            {table.names[each]: set(synonyms(table.names[each])) for each in table.present} for table in (self, given)
        )
        strange = [name for name, names in theirs.items() if not any(names & known for known in ours.values())]
        if strange:
            raise ValueError(
                f"The classes of {whose} are others: {len(strange)} of {len(theirs)} here are none of its {len(ours)} "
                f"({listed(list(ours))}): {listed(strange)}. {remedy}."
            )
        seen = set().union(*theirs.values())
        missing = [name for name, names in ours.items() if not names & seen]
        if not missing:
            return None
        return f"Of {len(missing)} of {len(ours)} classes of {whose} there is no image: {listed(missing)}."

    def rows_from(self, saved: ClassTable | None) -> dict[int, int]:
        """id -> id in `saved` of the class of the same name or, where none has it, with a synonym of it.

        What several classes share is nobody's.
        """
        ours, theirs = (_owners(parse_id2label(table.id2label)) for table in (self, saved or ClassTable()))
        rows = {}
        for each, label in enumerate(self.names):
            known = [theirs[name] for name in _folded(synonyms(label)) if ours.get(name) == each and name in theirs]
            if known:
                rows[each] = known[0]
        return rows

    def _called(self, ids: Iterable[int]) -> list[str]:
        return [str(each) if self.names[each] == str(each) else f"{each} ({self.names[each]})" for each in ids]


def listed(names: Sequence[str], *, limit: int = LISTED) -> str:
    """The first few of many names: `listed(["a", "b", "c"], limit=2)` is "a, b, ...".

    Example:
        >>> listed(["a", "b"])
        'a, b'
    """
    return ", ".join([*names[:limit], *(["..."] if len(names) > limit else [])])


def synonyms(label: str) -> tuple[str, ...]:
    """What a class is called: `synonyms("n01440764, tench")` is ('n01440764, tench', 'n01440764', 'tench')."""
    return parse_id2label({0: label})[0]


def _counts(class_counts: Any) -> dict[int, int]:
    """Images by class id, of a config that may have been edited."""
    try:
        return {int(key): int(count) for key, count in class_counts.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f'class_counts must say a number of images by class id, as {{"0": 500}}; got {class_counts!r:.80}.'
        ) from error


def strangers(there: Mapping[int, Sequence[str]], here: Mapping[int, Sequence[str]]) -> list[int]:
    """The ids of two tables (of `parse_id2label`) under which they have different classes, without regard to case.

    One class has one label in both, or shares a name that no other class has: by "crane" alone, which is a bird and a
    machine, nothing is known.

    Example:
        >>> strangers(parse_id2label({0: "n01440764, tench"}), parse_id2label({0: "Tench, Tinca tinca"}))
        []
    """
    ours, theirs = _owners(there), _owners(here)

    def same(each: int) -> bool:
        mine, others = _folded(there[each]), _folded(here[each])
        return mine[0] == others[0] or any(ours.get(name) == theirs.get(name) == each for name in mine)

    return [each for each in sorted(there.keys() & here.keys()) if not same(each)]


def _folded(names: Iterable[str]) -> list[str]:
    return [name.casefold() for name in names]


def _owners(names: Mapping[int, Sequence[str]]) -> dict[str, int]:
    """The class of a name: of a whole label before one of its synonyms, and of none that several classes share."""
    owners: dict[str, set[int]] = {}
    for count in (1, None):  # the whole label comes first of all that a class is called
        found: dict[str, set[int]] = {}
        for each, own in names.items():
            for name in _folded(own[:count]):
                found.setdefault(name, set()).add(each)
        owners = found | owners
    return {name: min(ids) for name, ids in owners.items() if len(ids) == 1}


def is_integer(name: str) -> bool:
    """Whether a class is called by a number: `is_integer("007")`."""
    return _INTEGER.fullmatch(name.strip()) is not None


def in_order(names: Iterable[str]) -> list[str]:
    """Class names as ids number them: by value where all are integers, else by text.

    Example:
        >>> in_order({"10", "9", "1"}), in_order({"10", "9", "a"})
        (['1', '9', '10'], ['10', '9', 'a'])
    """
    names = sorted(set(names))
    return sorted(names, key=int) if all(map(is_integer, names)) else names


def parse_id2label(id2label: Mapping[Any, Any] | None, num_classes: int | None = None) -> dict[int, tuple[str, ...]]:
    """The names of every class id; with `num_classes`, ids must lie in 0..num_classes-1.

    A label is one name or several (a list, or one string with commas as in ImageNet's "tench, Tinca tinca"); the first
    entry is the label as written, the others its synonyms. JSON's string keys and lists are read as ids and tuples.

    Example:
        >>> parse_id2label({"0": "tench, Tinca tinca"})
        {0: ('tench, Tinca tinca', 'tench', 'Tinca tinca')}
    """
    names: dict[int, tuple[str, ...]] = {}
    if not isinstance(num_classes, int | None):
        raise ValueError(f"num_classes must be a whole number; got {num_classes!r}.")
    if not isinstance(id2label or {}, Mapping):
        raise ValueError(f'id2label must say a name by class id, as {{"0": "tench"}}; got {id2label!r:.80}.')
    for key, label in (id2label or {}).items():
        if not str(key).isdecimal() or (num_classes is not None and int(key) >= num_classes):
            limit = "a non-negative integer" if num_classes is None else f"one of the class ids 0..{num_classes - 1}"
            raise ValueError(f"Every key of id2label must be {limit}; got {key!r}. Check the classes it was made for.")
        written = [label] if isinstance(label, str) else label
        if not isinstance(written, list | tuple) or not all(isinstance(name, str) for name in written):
            raise ValueError(f"A label of id2label must be text, or a list of texts; class {key} has {label!r:.80}.")
        written = list(written)
        synonyms = [part.strip() for name in written for part in name.split(",")]
        names[int(key)] = tuple(dict.fromkeys(written + synonyms))
    return names
