"""Annotated images on disk, and the two tasks measured on them: classes and depths, scored method by method."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..data.hf_datasets import is_image
from ..data.image_datasets import DECODE_ERRORS
from ..images import adm_center_crop, to_pixels, to_rgb
from ..metrics.perception import SegmentationConfusion, depth_errors
from ..models.alignment_network import AlignmentOutput
from .features import to_size
from .heads import LinearDepthHead, LinearSegmentationHead
from .transfer import IGNORE_INDEX, CellTransfer, cell_labels, cell_values, label_targets, target_means
from .visualize import draw_depth, draw_labels

MILLIMETRES = 1000.0
# From the features of images to maps (B, K, h, w): what is measured.
Method: TypeAlias = Callable[[AlignmentOutput], Tensor]


def transfer_methods(features: Tensor, targets: Tensor, *, neighbours: int) -> dict[str, Method]:
    """Three answers from annotated features (B, D, h, w) and targets (B, K, h, w): one looks, two do not.

    `nearest_cells` is `CellTransfer`; `mean_at_each_place` and `mean_of_all_cells` are what it must beat to have seen
    anything in the image (`target_means`).
    """
    transfer = CellTransfer(features, targets, neighbours=neighbours)
    places, overall = target_means(targets, per_position=True), target_means(targets)
    return {
        "nearest_cells": lambda new: transfer(new.patch),
        "mean_at_each_place": lambda new: places.expand(len(new.patch), *places.shape),
        "mean_of_all_cells": lambda new: overall.expand(len(new.patch), *overall.shape),
    }


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The image in a file; whatever hinders its decoding is a ValueError that names the file."""
    try:
        with Image.open(path) as image:
            yield image
    except DECODE_ERRORS as error:
        raise ValueError(f"{path} cannot be read: {error}. Repair or remove it.") from error


def _upright_size(path: Path) -> tuple[int, int]:
    """Width and height once EXIF has turned the image; only one that lies on its side is decoded for it."""
    with _opened(path) as image:
        lying = image.getexif().get(0x0112, 1) > 4
        return ImageOps.exif_transpose(image).size if lying else image.size


def read_pixels(paths: Sequence[Path], resolution: int) -> Tensor:
    """ADM centre crops (B, 3, S, S) in [-1, 1].

    Raises:
        ValueError: a image that cannot be decoded; names it.
    """
    pixels = []
    for path in paths:
        with _opened(path) as image:
            pixels.append(to_pixels(adm_center_crop(to_rgb(image), resolution)))
    return torch.stack(pixels)


def paired_files(images: str | os.PathLike[str], targets: str | os.PathLike[str]) -> list[tuple[Path, Path]]:
    """Images and their annotations, which have the same name up to the suffix, by name.

    An annotation may be larger or smaller than its image, but must show the same part of it: sides in the same
    ratio, up to the rounding of one of them to whole pixels, both turned upright by EXIF.

    Raises:
        ValueError: a folder without images or with two of one name, a image without its annotation (annotations
            may be more) or with one of other proportions.
    """
    folders = [Path(images), Path(targets)]
    found = [_by_name(folder) for folder in folders]
    missing = sorted(found[0].keys() - found[1].keys())
    if not found[0] or missing:
        named = f": {', '.join(missing[:5])}" if missing else ""
        raise ValueError(
            f"{folders[0]} must hold images and {folders[1]} an annotation of the same name for each; got "
            f"{len(found[0])} images, {len(missing)} of them without{named}."
        )
    pairs = [(found[0][name], found[1][name]) for name in sorted(found[0])]
    for image, target in pairs:
        (width, height), (target_width, target_height) = _upright_size(image), _upright_size(target)
        if abs(target_width * height - target_height * width) > max(width, height, target_width, target_height):
            raise ValueError(
                f"An annotation must have its image's proportions; {target} has {target_width}x{target_height} px, "
                f"{image} {width}x{height} px. Crop or turn it as the image was."
            )
    return pairs


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


def nearest_center_crop(values: np.ndarray, size: int) -> np.ndarray:
    """The square that `adm_center_crop` takes of a image, of its annotation (H, W): nearest, so nothing is mixed."""
    height, width = values.shape
    while min(height, width) >= 2 * size:
        height, width = height // 2, width // 2
    scale = size / min(height, width)
    height, width = round(height * scale), round(width * scale)
    top, left = (height - size) // 2, (width - size) // 2
    rows = ((np.arange(size) + top + 0.5) * values.shape[0] / height).astype(np.int64)
    columns = ((np.arange(size) + left + 0.5) * values.shape[1] / width).astype(np.int64)
    return values[rows[:, None], columns]


def read_annotations(paths: Sequence[Path], resolution: int) -> Tensor:
    """Annotations of one channel as integers (B, S, S): labels, palette indices or millimetres, of 8 or 16 bits.

    Raises:
        ValueError: an annotation in colour or in floating point, or one that cannot be decoded; names it.
    """
    crops = [nearest_center_crop(_integers(path), resolution).astype(np.int64) for path in paths]
    return torch.from_numpy(np.stack(crops))


def _integers(path: Path) -> np.ndarray:
    with _opened(path) as image:
        values = np.asarray(ImageOps.exif_transpose(image))
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(
            f"Annotations are images of one channel of integers; {path.name} has {values.dtype} {values.shape}. "
            "Save labels as 8-bit grey, depths as 16-bit grey in millimetres."
        )
    return values


def _highest(path: Path, ignore_index: int) -> int:
    labels = _integers(path).astype(np.int64)
    return int(labels[labels != ignore_index].max(initial=-1))


class SegmentationTask:
    """Classes of pixels, measured by mean IoU and accuracy.

    Args:
        num_classes: K.
        ignore_index: label of pixels that have no class.
    """

    def __init__(self, num_classes: int, *, ignore_index: int = IGNORE_INDEX) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self._confusions: dict[str, SegmentationConfusion] = {}

    @classmethod
    def of_files(
        cls, paths: Sequence[Path], num_classes: int | None = None, *, ignore_index: int = IGNORE_INDEX
    ) -> SegmentationTask:
        """With `num_classes`, or as many as the highest label of these masks says.

        Raises:
            ValueError: masks that hold nothing but the ignored label.
        """
        if num_classes is None:
            highest = [_highest(path, ignore_index) for path in paths]
            num_classes = max(highest) + 1
            if num_classes == 0:
                raise ValueError(f"All pixels of all masks are the ignored label {ignore_index}; name another.")
        return cls(num_classes, ignore_index=ignore_index)

    def head(self, path: str | os.PathLike[str]) -> tuple[LinearSegmentationHead, Method]:
        """DINOv2's linear head in a file, and what it answers.

        Raises:
            ValueError: a head for another number of classes.
        """
        head = LinearSegmentationHead.from_file(path)
        if head.conv_seg.out_channels != self.num_classes:
            raise ValueError(
                f"The head {path} knows {head.conv_seg.out_channels} classes, the masks hold {self.num_classes}. Say "
                "num_classes where some of its classes are absent, and number the masks as the head does."
            )
        return head, lambda features: head(features.patch)

    def read(self, paths: Sequence[Path], resolution: int) -> Tensor:
        """Masks (B, S, S) int64."""
        return read_annotations(paths, resolution)

    def cell_targets(self, truth: Tensor, grid: tuple[int, int]) -> Tensor:
        """One-hot classes of cells (B, K, h, w), NaN where void."""
        labels = cell_labels(truth, grid, ignore_index=self.ignore_index)
        return label_targets(labels, self.num_classes, ignore_index=self.ignore_index)

    def answer(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Classes (B, H, W) of scores (B, K, h, w)."""
        return to_size(maps, size).argmax(1)

    def score(self, method: str, answer: Tensor, truth: Tensor) -> None:
        """Takes in what `method` answered."""
        confusion = SegmentationConfusion(self.num_classes, ignore_index=self.ignore_index)
        self._confusions.setdefault(method, confusion).update(answer.cpu(), truth)

    def figures(self) -> dict[str, dict[str, Any]]:
        """mean_iou, accuracy and the IoU of every class (None: neither there nor predicted) by method."""
        return {
            method: {
                "mean_iou": confusion.mean_iou(),
                "accuracy": confusion.accuracy(),
                "iou": [None if value != value else value for value in confusion.iou().tolist()],
            }
            for method, confusion in self._confusions.items()
        }

    def draw(self, answers: Sequence[Tensor], truth: Tensor) -> list[Tensor]:
        """The truth (H, W) and answers to it as pixels (3, H, W); what is void in the truth is grey in all."""
        void = truth == self.ignore_index
        shown = [truth, *(answer.cpu().masked_fill(void, self.ignore_index) for answer in answers)]
        return [draw_labels(labels, ignore_index=self.ignore_index) for labels in shown]


class DepthTask:
    """Depth in metres from 16-bit images in millimetres where 0 is invalid: RMSE, absolute relative error, delta 1.

    Args:
        median_scaling: compare up to one factor per image.
        max_depth: in metres, of a head's last bin.
    """

    def __init__(self, *, median_scaling: bool = False, max_depth: float = 10.0) -> None:
        self.median_scaling = median_scaling
        self.max_depth = max_depth
        self._errors: dict[str, list[dict[str, Tensor]]] = {}

    def check(self, paths: Sequence[Path], resolution: int) -> None:
        """Raises ValueError naming the first depth map whose crop has no valid pixel: it has no error to average."""
        for path in paths:
            if not self.read([path], resolution).isfinite().any():
                raise ValueError(
                    f"{path} has no valid depth in its centre crop: all of it is 0. Leave out the image, or look "
                    "whether its depths are in millimetres."
                )

    def head(self, path: str | os.PathLike[str]) -> tuple[LinearDepthHead, Method]:
        """DINOv2's linear head in a file, and what it answers."""
        head = LinearDepthHead.from_file(path, max_depth=self.max_depth)
        return head, lambda features: head(features.patch, features.cls)

    def read(self, paths: Sequence[Path], resolution: int) -> Tensor:
        """Metres (B, S, S) float32, NaN where invalid.

        Raises:
            ValueError: images of 8 bits, which cannot hold millimetres.
        """
        narrow = [path.name for path in paths if _integers(path).dtype.itemsize == 1]
        if narrow:
            raise ValueError(f"Depths must have 16 bits, in millimetres; {narrow[0]} has 8. Save 16-bit grey PNGs.")
        metres = read_annotations(paths, resolution).float() / MILLIMETRES
        return metres.masked_fill(metres <= 0, torch.nan)

    def cell_targets(self, truth: Tensor, grid: tuple[int, int]) -> Tensor:
        """Mean depth of cells (B, 1, h, w), NaN without any."""
        return cell_values(truth, truth.isfinite(), grid)

    def answer(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Metres (B, H, W) of maps (B, 1, h, w)."""
        return to_size(maps, size)[:, 0]

    def score(self, method: str, answer: Tensor, truth: Tensor) -> None:
        """Takes in what `method` answered."""
        errors = depth_errors(answer.cpu(), truth, median_scaling=self.median_scaling)
        self._errors.setdefault(method, []).append(errors)

    def figures(self) -> dict[str, dict[str, Any]]:
        """rmse (m), abs_rel and delta1 by method: means over images."""
        return {
            method: {name: float(torch.cat([batch[name] for batch in batches]).mean()) for name in batches[0]}
            for method, batches in self._errors.items()
        }

    def draw(self, answers: Sequence[Tensor], truth: Tensor) -> list[Tensor]:
        """The truth (H, W) and answers to it as grey pixels (3, H, W) between the truth's 2nd and 98th percentile."""
        known = truth[truth.isfinite()]
        near, far = known.quantile(0.02).item(), known.quantile(0.98).item()
        return [draw_depth(depth, (near, max(far, near + 1e-3))) for depth in (truth, *answers)]
