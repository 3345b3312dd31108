"""What a script says while it works: its log, and a progress bar."""

from __future__ import annotations

import logging
import math
import sys
from typing import Any

from tqdm.auto import tqdm

# They report every request at INFO, and a warning of theirs is a line of ours already.
CHATTY = ("httpx", "httpx2", "httpcore", "urllib3", "filelock", "fsspec")
LINES_IN_A_FILE = 20
SECONDS_BETWEEN_LINES = 10.0


def start_logging(level: int = logging.INFO, *, format: str = "%(levelname)s %(name)s: %(message)s") -> None:
    """Messages of this level and above to stderr, without those that other libraries write for each request."""
    logging.basicConfig(level=level, format=format)
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)


def progress_bar(iterable: Any = None, *, total: int | None = None, **options: Any) -> tqdm:
    """tqdm's bar; where stderr is a file or a pipe it writes some 20 lines in all instead of ten a second.

    Example:
        >>> for batch in progress_bar(batches, unit="batch"):
        ...     measure(batch)
    """
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    if not sys.stderr.isatty():
        options |= {
            "miniters": math.ceil((total or 0) / LINES_IN_A_FILE) or None,
            "mininterval": SECONDS_BETWEEN_LINES,
        }
    return tqdm(iterable, total=total, **options)
