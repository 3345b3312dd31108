"""Sets of uint8 images to measure, exactly N of one size, and what a feature network gives of them.

A set is cut into batches, and a process takes a stretch of whole ones: each forward is the same whoever runs it, so
the number of processes changes no bit. Another batch size changes the order of sums inside the networks, and with it
figures in their last digits.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..classes import ClassTable, in_order
from ..data.image_datasets import START_CHECKS, ImageSource, model_files
from ..data.image_files import DECODE_ERRORS, class_folders, image_files, note_small, read_image, sizes_of
from ..data.label_files import LABEL_FILES
from ..data.report import DataReport
from ..files import npz_keys, open_npz_array
from ..images import UINT8_RULE, AnyImage, adm_center_crop, to_array
from .base import gather
from .feature_networks import FeatureNetwork
from .result_card import UNKNOWN


class ImageSet:
    """N images of one size, read in batches.

    Args:
        images: uint8 (N, H, W, 3), paths of files, or an `ImageSource`, whose images may have other channels.
        name: of the set, as a result states it.
        resolution: side in pixels that files and datasets are cropped to (ADM centre crop); None takes files as they
            are, which must then be equally large.
        limit: measure the first `limit` images only.
        classes: of the images, where it is known; a dataset knows its own.

    Example:
        >>> images = ImageSet(np.zeros((5, 32, 32, 3), dtype=np.uint8), name="black")
        >>> [(len(index), batch.shape) for index, batch in images.batches(4)]
        [(4, (4, 32, 32, 3)), (1, (1, 32, 32, 3))]
    """

    def __init__(
        self,
        images: np.ndarray | list[Path] | ImageSource,
        *,
        name: str,
        resolution: int | None = None,
        limit: int | None = None,
        classes: ClassTable | None = None,
    ) -> None:
        if isinstance(images, np.ndarray):
            _require_uint8(images, name)
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
        self.classes = images.classes if isinstance(images, ImageSource) else classes or ClassTable()
        self._size: tuple[int, ...] | None = None
        self.report = images.report if isinstance(images, ImageSource) else DataReport()
        if isinstance(images, ImageSource) and resolution is not None:
            images.expect(resolution)
        elif isinstance(images, list) and resolution is not None:
            sizes = sizes_of(images[: self.count], limit=START_CHECKS)
            small = {Path(each).name: side for each, side in sizes.items() if side < resolution}
            note_small(self.report, small, resolution, seen=len(sizes), total=self.count)

    def __len__(self) -> int:
        return self.count

    @property
    def labels(self) -> np.ndarray | None:
        """Class ids by place, where the images come with them."""
        return self.images.labels if isinstance(self.images, ImageSource) else None

    @property
    def resize_rule(self) -> str:
        """How images were brought to their size, as a result card states it."""
        if isinstance(self.images, np.ndarray) or self.resolution is None:
            return "none"
        return f"ADM centre crop to {self.resolution} px"

    def batches(self, batch_size: int, processes: Any = None) -> Batches:
        """(places in the set, uint8 (B, H, W, 3)) of this process's batches.

        All processes in turn give the set in order, in the same batches whatever their number; where there are fewer
        batches than processes, some have none.
        """
        if batch_size < 1:
            raise ValueError(f"Batches must hold at least one image; got batch_size {batch_size}.")
        rank, world_size = (0, 1) if processes is None else (processes.process_index, processes.num_processes)
        starts = range(0, self.count, batch_size)
        ends = [-(-each * len(starts) // world_size) for each in (rank, rank + 1)]  # rounded up: the first has some
        mine = starts[ends[0] : ends[1]]
        return Batches(self, [range(start, min(start + batch_size, self.count)) for start in mine])

    def read(self, index: range) -> np.ndarray:
        """The images at consecutive places, uint8 (B, H, W, 3)."""
        if isinstance(self.images, np.ndarray):
            return np.asarray(self.images[index.start : index.stop])
        return np.stack([self._read(place) for place in index])

    def _read(self, index: int) -> np.ndarray:
        image: AnyImage
        if isinstance(self.images, ImageSource):
            image, _, used = self.images.read(index)
            name = self.images.name(index)
            if used != index:
                raise ValueError(f"{name} of {self.name} cannot be read, and no other image may stand for it.")
        else:
            name = str(self.images[index])
            try:
                image = read_image(self.images[index])
            except DECODE_ERRORS as error:
                raise ValueError(f"{name} cannot be read: {error}. Repair or remove it.") from error
        if self.resolution is not None:
            image = adm_center_crop(image, self.resolution)
        array = to_array(image)
        self._size = self._size or array.shape
        if array.shape != self._size:
            raise ValueError(
                f"All images of {self.name} must have one size: {name} has {array.shape[1]}x{array.shape[0]} px, "
                f"others {self._size[1]}x{self._size[0]} px. Give a resolution to crop them to."
            )
        return array


@dataclass(frozen=True)
class Batches:
    """One process's share of an `ImageSet`; its length is the number of batches."""

    images: ImageSet
    index: list[range]

    def __len__(self) -> int:
        return len(self.index)

    def __iter__(self) -> Iterator[tuple[range, np.ndarray]]:
        return ((index, self.images.read(index)) for index in self.index)


def _require_uint8(array: np.ndarray, name: str) -> None:
    if array.ndim != 4 or array.shape[-1] != 3:
        raise ValueError(f"arr_0 of {name} must have shape (N, H, W, 3); got {array.shape}.")
    if array.dtype != np.uint8:
        raise ValueError(
            f"arr_0 of {name} must be uint8; got {array.dtype}. Turn pixels in [-1, 1] into uint8 by {UINT8_RULE}."
        )


def open_images(path: str | os.PathLike[str], *, resolution: int | None = None, limit: int | None = None) -> ImageSet:
    """The images of an .npz (arr_0, ADM's format) or of a folder and its subfolders by name, hidden ones left out.

    Example:
        >>> images = open_images("samples.npz", limit=5000)
    """
    path = Path(path)
    if path.is_dir():
        if found := model_files(path):
            raise ValueError(
                f"{path} holds {', '.join(found)}: it is a model's directory, and images in it are not a set to "
                "measure. Give an .npz with arr_0, a folder of images or, as samples, a pipeline."
            )
        files = list(image_files(path))
        return ImageSet(
            files, name=path.name, resolution=resolution, limit=limit, classes=_folder_classes(path, files[:limit])
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path} is neither an .npz nor a folder of images.")
    if "arr_0" not in npz_keys(path):
        raise ValueError(f"{path} must hold the images as arr_0; it holds {', '.join(npz_keys(path))}.")
    return ImageSet(open_npz_array(path, "arr_0"), name=path.name, resolution=resolution, limit=limit)


def _folder_classes(root: Path, files: Sequence[Path]) -> ClassTable | None:
    """Of class folders; None of a folder whose labels are not those."""
    folders = class_folders(root, map(str, files))
    names = in_order(folders)
    if "" in names or any((root / name).is_file() for name in LABEL_FILES):
        return None
    return ClassTable(tuple(names), tuple(map(folders.count, names)))


@dataclass
class Features:
    """What a feature network gives of N images, in their order.

    Attributes:
        outputs: "features" (N, D) float32 and, where the network has them, "spatial" (N, S) and "logits" (N, K).
        digests: (N, 32) uint8, a hash of each image.
        image_size: "WIDTHxHEIGHT" of the images.
    """

    outputs: dict[str, Tensor]
    digests: Tensor
    image_size: str = UNKNOWN

    def __len__(self) -> int:
        return len(self.digests)

    @property
    def hash(self) -> str:
        """Of all images, pixel by pixel, in order; no batch size or process count enters."""
        return hash_digests(self.digests)

    @staticmethod
    def join(parts: Sequence[Features]) -> Features:
        """Those of one set, cut into parts, in order."""
        if not parts:
            raise ValueError("Features need at least one image; got none.")
        outputs = {name: torch.cat([part.outputs[name] for part in parts]) for name in parts[0].outputs}
        return Features(outputs, torch.cat([part.digests for part in parts]), parts[0].image_size)


def extract(
    network: FeatureNetwork,
    images: ImageSet | Iterable[np.ndarray],
    *,
    batch_size: int = 64,
    processes: Any = None,
) -> Features:
    """One pass of a feature network over all images, by all processes; the same result on each of them.

    Args:
        images: a set, or this process's batches of uint8 (B, H, W, 3).
        processes: accelerate's `PartialState` or `Accelerator`, where several share the set.

    Example:
        >>> samples = extract(network, open_images("samples.npz"))
        >>> samples.outputs["features"].shape
    """
    mine = (batch for _, batch in images.batches(batch_size, processes)) if isinstance(images, ImageSet) else images
    parts, size = [], None
    for batch in mine:
        size = require_one_size(batch, size)
        outputs = {name: value.cpu() for name, value in network(to_tensor(batch)).items()}
        parts.append(Features(outputs, image_digests(batch), size_of(batch)))
    shares = gather([Features.join(parts)] if parts else [], processes)
    return Features.join([part for share in shares for part in share])


def to_tensor(images_uint8: np.ndarray) -> Tensor:
    """(B, 3, H, W) of (B, H, W, 3), as a copy."""
    return torch.from_numpy(np.array(images_uint8, order="C")).permute(0, 3, 1, 2)


def size_of(images_uint8: np.ndarray) -> str:
    """ "WIDTHxHEIGHT" of (B, H, W, 3), as cards and references state it."""
    return f"{images_uint8.shape[2]}x{images_uint8.shape[1]}"


def require_one_size(images_uint8: np.ndarray, size: tuple[int, ...] | None) -> tuple[int, ...]:
    """Height and width of (B, H, W, 3); raises ValueError where they are not the `size` of those before."""
    if size is not None and images_uint8.shape[1:3] != size:
        (height, width), (other_height, other_width) = size, images_uint8.shape[1:3]
        raise ValueError(
            f"All images of a set must have one size; got {width}x{height} and {other_width}x{other_height} px."
        )
    return images_uint8.shape[1:3]


def image_digests(arrays: np.ndarray) -> Tensor:
    """A sha256 of each of B equally large arrays, of its shape and values: (B, 32) uint8."""
    digests = [
        hashlib.sha256(f"{each.shape}".encode() + np.ascontiguousarray(each).tobytes()).digest() for each in arrays
    ]
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(-1, hashlib.sha256().digest_size)


def hash_digests(digests: Tensor) -> str:
    """16 hex digits of a set of images in its order, of `image_digests`."""
    return hashlib.sha256(digests.numpy().tobytes()).hexdigest()[:16]
