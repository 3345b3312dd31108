"""Images of any number of channels: arrays in .npy files, and all bands of all pages of an image file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from ..files import read_json
from ..images import Bands, orientation
from .report import DataError

ARRAY_SUFFIX = ".npy"
RANGE_FILE = "value_range.json"
# What stands for black and for white where nothing is stated.
KNOWN_RANGES = {"uint8": (0.0, 255.0), "uint16": (0.0, 65535.0)}

Range = tuple[float, float]


def is_array(source: Any) -> bool:
    """Whether it is the path of an array.

    Example:
        >>> is_array("scans/0001.npy"), is_array("scans/0001.tif")
        (True, False)
    """
    return isinstance(source, str | os.PathLike) and str(source).lower().endswith(ARRAY_SUFFIX)


def read_value_range(directory: Path) -> Range | None:
    """What black and white are in the images of a directory: value_range.json, {"black": 0, "white": 4095}; or None.

    Raises:
        ValueError: the file does not say two finite numbers, the first of which is the smaller one.

    Example:
        >>> read_value_range(Path("scans"))
        (0.0, 4095.0)
    """
    path = directory / RANGE_FILE
    if not path.exists():
        return None
    stated = read_json(path, needs={"black": (int, float), "white": (int, float)})
    black, white = float(stated["black"]), float(stated["white"])
    if not (np.isfinite([black, white]).all() and black < white):
        raise ValueError(f"{path} must say a black below its white, both finite; it says {black:g} and {white:g}.")
    return black, white


def array_size(path: str, channels: int, value_range: Range | None) -> tuple[int, int]:
    """Width and height of an array, of its header alone; refused as `read_array` does.

    Example:
        >>> array_size("scans/0001.npy", 5, None)
        (512, 384)
    """
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    axis = _channel_axis(array.shape, channels, path)
    _range_of(array.dtype, value_range, path)
    height, width = (side for each, side in enumerate(array.shape) if each != axis)
    return width, height


def read_array(path: str, channels: int, value_range: Range | None) -> Bands:
    """An image of an array (H, W, C) or (C, H, W); which of the two, the number of channels says. (H, W) has one.

    Raises:
        DataError: another shape, one that could be both, or values whose range is neither known nor stated.
        ValueError: values that are not finite, or beyond the stated range.

    Example:
        >>> read_array("scans/0001.npy", 5, (0.0, 4095.0)).size
        (512, 384)
    """
    array = np.load(path, allow_pickle=False)
    axis = _channel_axis(array.shape, channels, path)
    return _bands(array[..., None] if axis is None else np.moveaxis(array, axis, -1), value_range, path)


def read_pages(image: Image.Image, channels: int, value_range: Range | None) -> Bands:
    """An image of all bands of all pages of a file, such as a TIFF of one page a channel.

    Example:
        >>> with Image.open("scan.tif") as image:
        ...     bands = read_pages(image, 5, None)
    """
    name = str(getattr(image, "filename", "") or "an image")
    if orientation(image) != 1:
        raise ValueError("its EXIF orientation turns it, and bands are read as they lie; save it upright")
    pages = [np.atleast_3d(np.asarray(page)) for page in ImageSequence.Iterator(image)]
    count = sum(page.shape[-1] for page in pages)
    if count != channels:
        raise DataError(
            f"{name} has {count} bands in {len(pages)} pages, and the autoencoder takes images of {channels} "
            f"channels. Give files with a page for each channel, or arrays ({ARRAY_SUFFIX}) in a folder without "
            "image files."
        )
    if len({(page.shape[:2], page.dtype) for page in pages}) > 1 or image.mode == "P":
        raise ValueError("its pages must have one size and one kind of values, and no palette")
    return _bands(np.concatenate(pages, axis=-1), value_range, name)


def _channel_axis(shape: tuple[int, ...], channels: int, path: str) -> int | None:
    """0 or 2; None of an image (H, W) of one channel."""
    if len(shape) == 2 and channels == 1:
        return None
    found = [axis for axis in (0, 2) if len(shape) == 3 and shape[axis] == channels]
    if len(found) == 1:
        return found[0]
    either = f"({channels}, H, W) or (H, W, {channels})"
    remedy = "cut them otherwise: the sides must not equal the channels" if found else "or use another autoencoder"
    raise DataError(
        f"{path} has the shape {shape}, which {'could be either' if found else 'is neither'} of {either}, as the "
        f"autoencoder takes images; write the arrays again, {remedy}."
    )


def _range_of(dtype: np.dtype, value_range: Range | None, name: str) -> Range:
    known = value_range or KNOWN_RANGES.get(dtype.name)
    if dtype.kind not in "iuf":
        raise DataError(f"{name} must hold integers or floating-point values; it holds {dtype}. Write it again.")
    if known is None:
        raise DataError(
            f"{name} holds {dtype}, whose range is not known. Write {RANGE_FILE} into the data's directory, such as "
            '{"black": 0, "white": 1}: the values that become -1 and 1.'
        )
    return known


def _bands(array: np.ndarray, value_range: Range | None, name: str) -> Bands:
    """Of (H, W, C): bytes as they are, and everything else as floating-point values in [-1, 1]."""
    black, white = _range_of(array.dtype, value_range, name)
    if array.dtype == np.uint8 and value_range is None:
        return Bands([Image.fromarray(np.ascontiguousarray(band)) for band in np.moveaxis(array, -1, 0)])
    values = array.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinity")
    if values.min() < black or values.max() > white:
        raise ValueError(
            f"its values {values.min():g} to {values.max():g} go beyond the range {black:g} to {white:g} that "
            f"{RANGE_FILE} states"
        )
    pixels = (2 * (values - black) / (white - black) - 1).astype(np.float32)
    return Bands([Image.fromarray(np.ascontiguousarray(band)) for band in np.moveaxis(pixels, -1, 0)])
