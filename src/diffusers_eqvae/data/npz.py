"""Arrays inside .npz files, read without loading them."""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path
from typing import Literal

import numpy as np


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
