"""Names of models, which are directories here or repositories on the Hub, and what is said where they are neither."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_session, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError

PATIENCE_S = 5.0


@contextmanager
def looking_for(name: str | os.PathLike[str], what: str) -> Iterator[dict[str, Any]]:
    """The options that loading `name` needs beside its own; inside, a failure names what was looked for and where.

    Where the Hub cannot be reached they keep a loader to its cache, which spares a minute of retries.

    Args:
        what: it ought to be, e.g. "a pipeline".

    Raises:
        OSError: a name that is neither a directory here nor, as far as can be seen, a repository.
        ValueError: a directory whose files say or hold something else.

    Example:
        >>> with looking_for("facebook/dinov2-base", "a teacher") as options:
        ...     model = AutoModel.from_pretrained("facebook/dinov2-base", **options)
    """
    if Path(name).exists():
        try:
            yield {}
        except (TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{name} cannot be loaded as {what}: {_one_line(error)}.") from error
        return
    _require_repository_name(str(name))
    why = hub_silence()
    try:
        with warnings.catch_warnings():  # diffusers still passes it to huggingface_hub, which warns of that
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks", category=UserWarning)
            yield {} if why is None else {"local_files_only": True}
    except (OSError, HFValidationError) as error:
        detail = f"the Hub cannot be asked ({why}), nor is it in its cache" if why else _one_line(error)
        raise OSError(f"{name} is not {what}: there is no such directory here, and {detail}.") from error


def hub_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """A file of a directory or Hub repository; None where it holds none, or cannot be found itself."""
    if Path(name).exists():
        path = Path(name, file)
        return path if path.is_file() else None
    try:
        validate_repo_id(name)
        only = hub_silence() is not None
        return Path(hf_hub_download(name, file, revision=revision, local_files_only=only))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):
        return None  # whatever is wrong with the name, loading the model says it better


@cache
def hub_silence() -> str | None:
    """Why the Hub does not answer, or None; asked once a process, and only where something is looked for there."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE_S)
    except Exception as error:  # of whatever HTTP library this version of huggingface_hub stands on
        return f"{constants.ENDPOINT}: {_one_line(error)}"
    return None


def _require_repository_name(name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        path = Path(name)
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else "."
        raise FileNotFoundError(f"There is no directory {name}{hint}") from error


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300].rstrip(".")
