"""Arrays inside .npz files, read without loading them."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np


def map_npz_array(path: str | Path, key: str) -> np.ndarray:
    """An array of an uncompressed .npz as a memory map: it costs no memory until it is read.

    Raises:
        KeyError: no such array.
        ValueError: the array is compressed.
    """
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(f"{key}.npy")
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{key} of {path} is compressed and cannot be mapped; write it with np.savez.")
    with open(path, "rb") as file:
        # A zip entry's data follow its local header: 30 bytes, of which the last four give the two lengths to skip.
        file.seek(entry.header_offset + 26)
        name_length, extra_length = np.frombuffer(file.read(4), "<u2")
        file.seek(int(name_length) + int(extra_length), os.SEEK_CUR)
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        return np.memmap(path, dtype=dtype, mode="r", offset=file.tell(), shape=shape)


def npz_keys(path: str | Path) -> list[str]:
    """Names of the arrays of an .npz."""
    with zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def open_npz_array(path: str | Path, key: str) -> np.ndarray:
    """An array of any .npz: a memory map, or loaded where it is compressed."""
    try:
        return map_npz_array(path, key)
    except ValueError:
        with np.load(path) as archive:
            return archive[key]
