"""How a program ends: with one sentence for what its user can mend, and with a traceback for what nobody foresaw."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

TRACEBACK = "EQVAE_TRACEBACK"
LONGEST_SENTENCE = 800
INTERRUPTED = 130  # 128 + SIGINT, as shells count
# Errors of libraries that name neither file nor remedy, by class; what they are about is the same wherever they arise.
DAMAGED = "A file that is read here is cut short or damaged ({reason}); write or download it again."
MEMORY = "Out of memory: {reason} Take a smaller batch or resolution, or a larger device."
FOREIGN = {
    "SafetensorError": DAMAGED,
    "BadZipFile": DAMAGED,
    "ReadError": DAMAGED,  # of tarfile
    "EOFError": DAMAGED,
    "UnpicklingError": DAMAGED,
    "DatasetsError": "The data set cannot be read: {reason}",
    "YAMLError": "A YAML text cannot be read: {reason}",
    "MemoryError": MEMORY,
    "OutOfMemoryError": MEMORY,
}


def run_program(name: str, main: Callable[[], object]) -> int:
    """Calls `main` and gives the exit status: its own where it is a number, else 0.

    What a user can mend ends in one sentence and status 2, Ctrl-C in one line and status 130; the environment variable
    EQVAE_TRACEBACK=1 shows where an error was raised. Other errors show that always.

    Args:
        name: of the program, which the sentence begins with.
    """
    try:
        result = main()
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{name}: stopped by Ctrl-C.\n")
        return INTERRUPTED
    except Exception as error:
        sentence = explain(error)
        if sentence is None or os.environ.get(TRACEBACK):
            raise
        sys.stderr.write(f"{name}: error: {sentence}\n({TRACEBACK}=1 shows the place in the code.)\n")
        return 2
    return result if isinstance(result, int) else 0


def explain(error: BaseException) -> str | None:
    """The sentence for an error that a user can mend, on one line; None for any other.

    Example:
        >>> explain(PermissionError(13, "Permission denied", "/data/run"))
        '/data/run: Permission denied.'
    """
    template: str | None = None
    for kind in type(error).__mro__:
        template = template or FOREIGN.get(kind.__name__)
    not_installed = isinstance(error, ImportError) and error.name is None  # raised by hand, with what to install
    if template is None and not not_installed and not isinstance(error, (ValueError, OSError)):
        return None
    root = error
    while template is not None and root.__cause__ is not None:
        root = root.__cause__
    reason = _reason(root)
    text = template.format(reason=reason) if template else reason
    return text if len(text) <= LONGEST_SENTENCE else f"{text[:LONGEST_SENTENCE]} ..."


def _reason(error: Any) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}."
    text = str(error)
    if text.startswith("Caught "):  # in a DataLoader's worker, whose traceback is in the text
        text = text.rpartition(f"{type(error).__name__}: ")[2]
    return " ".join(text.split()) or f"{type(error).__name__}."
