"""Sets of uint8 images to measure: an .npz of arr_0, a folder, an array or a dataset; exactly N, all of one size."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.hf_datasets import image_files
from ..data.image_datasets import DECODE_ERRORS, ImageSource, model_files
from ..files import npz_keys, open_npz_array
from ..images import adm_center_crop, to_rgb


class ImageSet:
    """N images of one size, read in batches.

    Args:
        images: uint8 (N, H, W, 3), paths of files, or an `ImageSource`.
        name: of the set, as a result states it.
        resolution: side in pixels that files and datasets are cropped to (ADM centre crop); None takes files as they
            are, which must then be equally large.
        limit: measure the first `limit` images only.

    Raises:
        ValueError: an array of another shape or dtype, a dataset without `resolution`, no images, fewer than
            `limit`.
    """

    def __init__(
        self,
        images: np.ndarray | list[Path] | ImageSource,
        *,
        name: str,
        resolution: int | None = None,
        limit: int | None = None,
    ) -> None:
        if isinstance(images, np.ndarray):
            check_array(images, name)
            if resolution is not None and images.shape[1:3] != (resolution, resolution):
                raise ValueError(
                    f"{name} holds images of {images.shape[2]}x{images.shape[1]} px and is never resized; "
                    f"got resolution {resolution}."
                )
        elif isinstance(images, ImageSource) and resolution is None:
            raise ValueError(f"The dataset {name} needs a resolution that its images are cropped to.")
        if len(images) == 0 or (limit is not None and not 1 <= limit <= len(images)):
            raise ValueError(f"{name} holds {len(images)} images; {limit or 'at least one'} are to be measured.")
        self.images = images
        self.name = name
        self.resolution = resolution
        self.count = len(images) if limit is None else limit
        self._size: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return self.count

    @property
    def resize_rule(self) -> str:
        if isinstance(self.images, np.ndarray) or self.resolution is None:
            return "none"
        return f"ADM centre crop to {self.resolution} px"

    def blocks(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> list[range]:
        """Indices of this rank's batches: consecutive, so that all ranks in turn give the set in order.

        The set is cut into the same batches for any number of processes; where there are fewer batches than
        processes, some processes have none.

        Raises:
            ValueError: a batch size below 1.
        """
        if batch_size < 1:
            raise ValueError(f"Batches must hold at least one image; got batch_size {batch_size}.")
        starts = range(0, self.count, batch_size)
        mine = starts[rank * len(starts) // world_size : (rank + 1) * len(starts) // world_size]
        return [range(start, min(start + batch_size, self.count)) for start in mine]

    def read(self, block: range) -> np.ndarray:
        """The images of a block of consecutive indices, uint8 (B, H, W, 3)."""
        if isinstance(self.images, np.ndarray):
            return np.asarray(self.images[block.start : block.stop])
        return np.stack([self._read(index) for index in block])

    def batches(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[np.ndarray]:
        """`read` of each of `blocks`."""
        return map(self.read, self.blocks(batch_size, rank=rank, world_size=world_size))

    def _read(self, index: int) -> np.ndarray:
        if isinstance(self.images, ImageSource):
            image, _, used = self.images.read(index)
            name = self.images.name(index)
            if used != index:
                raise ValueError(f"{name} of {self.name} cannot be read, and no other image may stand for it.")
        else:
            name = str(self.images[index])
            try:
                with Image.open(self.images[index]) as opened:
                    image = to_rgb(opened)
            except DECODE_ERRORS as error:
                raise ValueError(f"{name} cannot be read: {error}. Repair or remove it.") from error
        if self.resolution is not None:
            image = adm_center_crop(image, self.resolution)
        levels = np.asarray(image)
        self._size = self._size or levels.shape
        if levels.shape != self._size:
            raise ValueError(
                f"All images of {self.name} must have one size: {name} has {levels.shape[1]}x{levels.shape[0]} px, "
                f"others {self._size[1]}x{self._size[0]} px. Give a resolution to crop them to."
            )
        return levels


def check_array(array: np.ndarray, name: str) -> None:
    """Raises ValueError unless the array is uint8 (N, H, W, 3)."""
    if array.ndim != 4 or array.shape[-1] != 3:
        raise ValueError(f"arr_0 of {name} must have shape (N, H, W, 3); got {array.shape}.")
    if array.dtype != np.uint8:
        raise ValueError(
            f"arr_0 of {name} must be uint8; got {array.dtype}. Turn [-1, 1] into levels by clamp(127.5 x + 128), "
            "truncated."
        )


def open_images(path: str | os.PathLike[str], *, resolution: int | None = None, limit: int | None = None) -> ImageSet:
    """The images of an .npz (arr_0, ADM's format) or of a folder and its subfolders, by name; hidden ones are none.

    Raises:
        FileNotFoundError: neither a file nor a folder.
        ValueError: no .npz, one without arr_0 or of another shape or dtype, the directory of a model, a folder without
            images, fewer than `limit`.
    """
    path = Path(path)
    if path.is_dir():
        if found := model_files(path):
            raise ValueError(
                f"{path} holds {', '.join(found)}: it is a model's directory, and images in it are not a set to "
                "measure. Give an .npz with arr_0, a folder of images or, as samples, a pipeline."
            )
        files = sorted(image_files(path))
        return ImageSet(files, name=path.name, resolution=resolution, limit=limit)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is neither an .npz nor a folder of images.")
    if "arr_0" not in archive_keys(path):
        raise ValueError(f"{path} must hold the images as arr_0; it holds {', '.join(archive_keys(path))}.")
    return ImageSet(open_npz_array(path, "arr_0"), name=path.name, resolution=resolution, limit=limit)


def archive_keys(path: Path) -> list[str]:
    """Names of the arrays of an .npz; raises ValueError where the file is none."""
    try:
        return npz_keys(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no whole .npz archive: {error}. Write it with np.savez.") from error
