"""Writing files that are either whole or absent: after an error, a kill or a power cut nobody reads half a file."""

from __future__ import annotations

import json
import math
import os
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

UNFINISHED = ".tmp"


@contextmanager
def written_aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden sibling to write to; when the block ends, it is on disk and has the name `path`.

    The parent folders are created. An error in the block leaves `path` as it was and no sibling; a kill may leave the
    sibling, which ends in .tmp.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sibling = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        yield sibling
        flush_to_disk(sibling)
        os.replace(sibling, path)
    except BaseException:
        sibling.unlink(missing_ok=True)
        raise
    flush_to_disk(path.parent)


def flush_to_disk(path: Path) -> None:
    """Returns when a file, or the names in a directory, would survive a power cut; on POSIX systems only."""
    if os.name != "posix":  # Windows opens no directories, and flushes no file that is open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text that is either whole or absent."""
    with written_aside(path) as sibling:
        sibling.write_text(text, encoding="utf-8")


def write_npz(path: str | os.PathLike[str], **arrays: Any) -> None:
    """Writes an uncompressed .npz that is either whole or absent."""
    with written_aside(path) as sibling, open(sibling, "wb") as file:
        np.savez(file, **arrays)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Writes `strict_json(content)` that is either whole or absent."""
    write_text(path, strict_json(content))


def strict_json(content: Any) -> str:
    """JSON that every reader takes: NaN and infinity, for which it has no word, are null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [finite(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(content), indent=2, allow_nan=False) + "\n"


def require_format_version(found: Any, known: int, path: str | os.PathLike[str], remedy: str) -> None:
    """Refuses a file of an older or a newer format than the `known` one; `remedy` helps with an older one."""
    if found is not None and int(found) > known:
        raise ValueError(
            f"{path} has format version {int(found)}, which a newer diffusers_eqvae wrote; this one reads {known}. "
            "Update it: pip install --upgrade diffusers_eqvae."
        )
    if found is None or int(found) < known:
        stated = "no format version" if found is None else f"format version {int(found)}"
        raise ValueError(f"{path} has {stated} and is older than version {known}, which is read here. {remedy}.")


def require_writable(path: str | os.PathLike[str]) -> None:
    """Creates the parent folders of a file that is written after long work, and tries whether it can be.

    Raises:
        ValueError: it cannot; says why.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written: {error}. Name a file in a folder that can be written to."
        ) from error


def map_npz_array(path: str | Path, key: str) -> np.ndarray:
    """An array of an uncompressed .npz as a memory map: it costs no memory until it is read.

    Raises:
        KeyError: no such array.
        ValueError: the array is compressed, one of Python objects, or shorter than its header says.
    """
    if _is_compressed(path, key):
        raise ValueError(f"{key} of {path} is compressed and cannot be mapped; write it with np.savez.")
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(f"{key}.npy")
    with open(path, "rb") as file:
        # A zip entry's data follow its local header: 30 bytes, of which the last four give the two lengths to skip.
        file.seek(entry.header_offset + 26)
        name_length, extra_length = np.frombuffer(file.read(4), "<u2")
        start = file.seek(int(name_length) + int(extra_length), os.SEEK_CUR)
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(file)
        if dtype.hasobject:
            # What lies there is a pickle; mapped, it would be read as addresses.
            raise ValueError(f"{key} of {path} holds Python objects ({dtype}); write it as numbers.")
        there, claimed = entry.file_size - (file.tell() - start), math.prod(shape) * dtype.itemsize
        if claimed > there:
            # Mapped, it would go on into whatever follows in the file.
            raise ValueError(
                f"{key} of {path} is cut short: its header says {dtype} {shape}, which is {claimed} bytes, and "
                f"{there} are there. Write the file again."
            )
        order: Literal["C", "F"] = "F" if fortran_order else "C"
        return np.memmap(path, dtype=dtype, mode="r", offset=file.tell(), shape=shape, order=order)


def npz_keys(path: str | Path) -> list[str]:
    """Names of the arrays of an .npz."""
    with zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def open_npz_array(path: str | Path, key: str) -> np.ndarray:
    """An array of any .npz: a memory map, or loaded where it is compressed.

    Raises:
        KeyError: no such array.
        ValueError: an array of Python objects, which is never unpickled, or one shorter than its header says.
    """
    if not _is_compressed(path, key):
        return map_npz_array(path, key)
    with np.load(path) as archive:
        try:
            return archive[key]
        except ValueError as error:
            raise ValueError(f"{key} of {path} cannot be read: {error}. Write the file again.") from error


def _is_compressed(path: str | Path, key: str) -> bool:
    with zipfile.ZipFile(path) as archive:
        return archive.getinfo(f"{key}.npy").compress_type != zipfile.ZIP_STORED
