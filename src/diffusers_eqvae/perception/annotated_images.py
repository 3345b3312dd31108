"""Annotated images on disk: which file annotates which image, and the same centre crop of both."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..classes import listed
from ..data.array_images import is_array
from ..data.hf_datasets import is_image
from ..data.image_datasets import ImageSource
from ..data.image_files import DECODE_ERRORS, image_files, open_image
from ..images import adm_center_crop, orientation, to_pixels, to_rgb, upright


def paired_files(images: str | os.PathLike[str], *annotations: str | os.PathLike[str]) -> list[tuple[Path, ...]]:
    """Every image, by name, with its annotation of the same name (up to the suffix) from each further folder.

    An annotation may be larger or smaller than its image, but must show the same part of it: sides in the same
    ratio, up to the rounding of one of them to whole pixels, both turned upright by EXIF. Annotations may be more
    than images; an image without one is refused.

    Example:
        >>> paired_files("images", "masks", "depths")[0]
        (PosixPath('images/0.jpg'), PosixPath('masks/0.png'), PosixPath('depths/0.png'))
    """
    found = [_by_name(Path(folder)) for folder in (images, *annotations)]
    for folder, files in zip(annotations, found[1:], strict=True):
        missing = sorted(found[0].keys() - files.keys())
        if not found[0] or missing:
            named = f": {', '.join(missing[:5])}" if missing else ""
            raise ValueError(
                f"{images} must hold images and {folder} an annotation of the same name for each; got "
                f"{len(found[0])} images, {len(missing)} of them without{named}."
            )
    rows = [tuple(files[name] for files in found) for name in sorted(found[0])]
    for image, *targets in rows:
        for target in targets:
            _require_proportions(image, target)
    return rows


class ImageMasks:
    """The masks of a set of images, which have their names (up to the suffix) and, in subfolders, their paths.

    Called with places in the set it gives them as `read_annotations` does, (B, S, S).

    Args:
        source: the images, as files in a folder.
        folder: of the masks, which may be more than images; all of it is looked through at once.
        places: of the images that need one.

    Example:
        >>> masks = ImageMasks(source, "masks", resolution=256, places=[0, 1])
        >>> masks([0, 1]).shape
        torch.Size([2, 256, 256])
    """

    def __init__(
        self, source: ImageSource, folder: str | os.PathLike[str], *, resolution: int, places: Sequence[int]
    ) -> None:
        self.resolution, root = resolution, source.root
        names = {place: Path(source.name(place)) for place in places}
        files = {each for each in names.values() if root and (root / each).is_file() and not is_array(each)}
        unnamed = [str(name) for name in names.values() if name not in files]
        if root is None or unnamed:
            raise ValueError(
                f"Masks go by the names of image files, and these images have none ({listed(unnamed)}); give a folder "
                "of image files, or leave the masks out."
            )
        own: dict[Path, list[Path]] = {}
        for path in image_files(folder):
            own.setdefault(path.relative_to(folder).with_suffix(""), []).append(path)
        found = {place: own.get(name.with_suffix(""), []) for place, name in names.items()}
        if wrong := [str(names[place]) for place, files in found.items() if len(files) != 1]:
            raise ValueError(
                f"{folder} must hold one mask of the same name and subfolder for each image; it has none, or several, "
                f"for {len(wrong)} of {len(names)}: {listed(wrong)}."
            )
        self.pairs = {place: (root / name, found[place][0]) for place, name in names.items()}

    def __call__(self, index: Sequence[int]) -> Tensor:
        for place in index:
            _require_proportions(*self.pairs[place])
        return read_annotations([self.pairs[place][1] for place in index], self.resolution)


def _require_proportions(image: Path, target: Path) -> None:
    (width, height), (own_width, own_height) = _upright_size(image), _upright_size(target)
    if abs(own_width * height - own_height * width) > max(width, height, own_width, own_height):
        raise ValueError(
            f"An annotation must have its image's proportions; {target} has {own_width}x{own_height} px, "
            f"{image} {width}x{height} px. Crop or rotate it as the image was."
        )


def read_pixels(paths: Sequence[Path], resolution: int) -> Tensor:
    """ADM centre crops (B, 3, S, S) in [-1, 1] of the images in files.

    Example:
        >>> read_pixels([Path("0.jpg")], 256).shape
        torch.Size([1, 3, 256, 256])
    """
    pixels = []
    for path in paths:
        with _opened(path) as image:
            pixels.append(to_pixels(adm_center_crop(to_rgb(image), resolution)))
    return torch.stack(pixels)


def read_annotations(paths: Sequence[Path], resolution: int) -> Tensor:
    """Annotations of one channel as integers (B, S, S): labels, palette indices or millimetres, of 8 or 16 bits.

    Example:
        >>> read_annotations([Path("0.png")], 256).shape
        torch.Size([1, 256, 256])
    """
    crops = [nearest_center_crop(read_integers(path), resolution).astype(np.int64) for path in paths]
    return torch.from_numpy(np.stack(crops))


def read_integers(path: Path) -> np.ndarray:
    """An annotation as it is stored, upright: (H, W) of integers.

    Example:
        >>> read_integers(Path("0.png")).dtype
        dtype('uint8')
    """
    with _opened(path) as image:
        if image.format == "JPEG":
            raise ValueError(f"{path} is a JPEG, whose compression mixes labels; save annotations as PNG.")
        values = np.asarray(upright(image))
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(
            f"Annotations are images of one channel of integers; {path.name} has {values.dtype} {values.shape}. "
            "Save labels as 8-bit grey, depths as 16-bit grey in millimetres."
        )
    return values


def nearest_center_crop(values: np.ndarray, size: int) -> np.ndarray:
    """The square that `adm_center_crop` takes of an image, of its annotation (H, W): nearest, so nothing is mixed.

    Example:
        >>> nearest_center_crop(np.zeros((48, 64), np.uint8), 32).shape
        (32, 32)
    """
    height, width = values.shape
    while min(height, width) >= 2 * size:
        height, width = height // 2, width // 2
    scale = size / min(height, width)
    height, width = round(height * scale), round(width * scale)
    top, left = (height - size) // 2, (width - size) // 2
    rows = ((np.arange(size) + top + 0.5) * values.shape[0] / height).astype(np.int64)
    columns = ((np.arange(size) + left + 0.5) * values.shape[1] / width).astype(np.int64)
    return values[rows[:, None], columns]


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image in a file; whatever hinders its decoding is a ValueError that names the file."""
    try:
        with open_image(path, smallest=1) as image:
            yield image
    except DECODE_ERRORS as error:
        raise ValueError(f"{path} cannot be read: {error}. Repair or remove it.") from error


def _upright_size(path: Path) -> tuple[int, int]:
    """Width and height once EXIF has rotated the image; only one that lies on its side is decoded for it."""
    with _opened(path) as image:
        return upright(image).size if orientation(image) > 4 else image.size


def _by_name(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for file in sorted(folder.glob("*")):
        if not is_image(file.name):
            continue
        if file.stem in files:
            raise ValueError(
                f"{folder} holds {files[file.stem].name} and {file.name}, so that the name {file.stem} does not say "
                "which one is meant. Keep one of them."
            )
        files[file.stem] = file
    return files
