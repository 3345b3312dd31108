"""The two tasks measured on annotated images, classes and depths, scored method by method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..metrics.perception import SegmentationConfusion, depth_errors
from .annotated_images import read_annotations, read_integers
from .features import LatentFeatures, to_size
from .heads import LinearSegmentationHead
from .transfer import (
    IGNORE_INDEX,
    NearestTransfer,
    label_targets,
    position_labels,
    position_values,
    target_means,
)
from .visualize import draw_depth, draw_labels

MILLIMETRES = 1000.0
# From the features of images to maps (B, K, h, w): what is measured.
Method: TypeAlias = Callable[[LatentFeatures], Tensor]


def transfer_methods(features: Tensor, targets: Tensor, *, neighbours: int) -> dict[str, Method]:
    """Three answers from annotated features (B, D, h, w) and targets (B, K, h, w): one looks, two do not.

    `nearest_positions` is `NearestTransfer`; `mean_at_each_position` and `mean_of_all_positions` are what it must
    beat to have seen anything in the image (`target_means`).

    Example:
        >>> maps = transfer_methods(features, targets, neighbours=5)["nearest_positions"](latent_features(raw_latents))
    """
    transfer = NearestTransfer(features, targets, neighbours=neighbours)
    places, overall = target_means(targets, per_position=True), target_means(targets)
    return {
        "nearest_positions": lambda new: transfer(new.patch),
        "mean_at_each_position": lambda new: places.expand(len(new.patch), *places.shape),
        "mean_of_all_positions": lambda new: overall.expand(len(new.patch), *overall.shape),
    }


class SegmentationTask:
    """Classes of pixels, measured by mean IoU and accuracy.

    Args:
        num_classes: K.
        ignore_index: label of pixels that have no class.

    Example:
        >>> task = SegmentationTask(11)
        >>> task.score("head", task.answer(logits, (256, 256)), masks)
        >>> task.results()["head"]["mean_iou"]
    """

    name = "segmentation"

    def __init__(self, num_classes: int, *, ignore_index: int = IGNORE_INDEX) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self._confusions: dict[str, SegmentationConfusion] = {}

    @classmethod
    def of_files(cls, paths: Sequence[Path], *, ignore_index: int = IGNORE_INDEX) -> SegmentationTask:
        """With as many classes as the highest label of these masks says."""
        masks = (read_integers(path).astype(np.int64) for path in paths)
        highest = max(int(mask[mask != ignore_index].max(initial=-1)) for mask in masks)
        if highest < 0:
            raise ValueError(f"All pixels of all masks are the ignored label {ignore_index}; name another.")
        return cls(highest + 1, ignore_index=ignore_index)

    @property
    def annotation(self) -> str:
        """What the annotations are, for a result card."""
        return f"classes, {self.ignore_index} is void"

    def check_head(self, head: LinearSegmentationHead) -> None:
        """Raises ValueError for a head that knows another number of classes."""
        if head.conv_seg.out_channels != self.num_classes:
            raise ValueError(
                f"The head knows {head.conv_seg.out_channels} classes, the masks hold {self.num_classes}. Say "
                "num_classes where some of its classes are absent, and number the masks as the head does."
            )

    def read(self, paths: Sequence[Path], resolution: int) -> Tensor:
        """Masks (B, S, S) int64."""
        return read_annotations(paths, resolution)

    def targets(self, truth: Tensor, grid: tuple[int, int]) -> Tensor:
        """One-hot classes of latent positions (B, K, h, w), NaN where void."""
        labels = position_labels(truth, grid, ignore_index=self.ignore_index)
        return label_targets(labels, self.num_classes, ignore_index=self.ignore_index)

    def answer(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Classes (B, H, W) of scores (B, K, h, w)."""
        return to_size(maps, size).argmax(1)

    def score(self, method: str, answer: Tensor, truth: Tensor) -> None:
        """Takes in what `method` answered."""
        confusion = SegmentationConfusion(self.num_classes, ignore_index=self.ignore_index)
        self._confusions.setdefault(method, confusion).update(answer.cpu(), truth)

    def results(self) -> dict[str, dict[str, Any]]:
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

    Example:
        >>> task = DepthTask()
        >>> task.score("head", task.answer(head.read(features), (256, 256)), metres)
        >>> task.results()["head"]["rmse"]
    """

    name = "depth"

    def __init__(self, *, median_scaling: bool = False) -> None:
        self.median_scaling = median_scaling
        self._errors: dict[str, list[dict[str, Tensor]]] = {}

    @property
    def annotation(self) -> str:
        """What the annotations are, for a result card."""
        return "depth" + (" up to a factor per image" if self.median_scaling else " in metres")

    def check_files(self, paths: Sequence[Path], resolution: int) -> None:
        """Raises ValueError naming the first depth map whose crop has no valid pixel: it has no error to average."""
        for path in paths:
            if not self.read([path], resolution).isfinite().any():
                raise ValueError(
                    f"{path} has no valid depth in its centre crop: all of it is 0. Leave out the image, or look "
                    "whether its depths are in millimetres."
                )

    def read(self, paths: Sequence[Path], resolution: int) -> Tensor:
        """Metres (B, S, S) float32, NaN where invalid; 8 bits, which cannot hold millimetres, are refused."""
        narrow = [path.name for path in paths if read_integers(path).dtype.itemsize == 1]
        if narrow:
            raise ValueError(f"Depths must have 16 bits, in millimetres; {narrow[0]} has 8. Save 16-bit grey PNGs.")
        metres = read_annotations(paths, resolution).float() / MILLIMETRES
        return metres.masked_fill(metres <= 0, torch.nan)

    def targets(self, truth: Tensor, grid: tuple[int, int]) -> Tensor:
        """Mean depth of latent positions (B, 1, h, w), NaN without any."""
        return position_values(truth, truth.isfinite(), grid)

    def answer(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Metres (B, H, W) of maps (B, 1, h, w)."""
        return to_size(maps, size)[:, 0]

    def score(self, method: str, answer: Tensor, truth: Tensor) -> None:
        """Takes in what `method` answered."""
        errors = depth_errors(answer.cpu(), truth, median_scaling=self.median_scaling)
        self._errors.setdefault(method, []).append(errors)

    def results(self) -> dict[str, dict[str, Any]]:
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


Task: TypeAlias = SegmentationTask | DepthTask
