"""How right classes and depths are: mean intersection over union, and the usual errors of depth."""

from __future__ import annotations

import torch
from torch import Tensor


class SegmentationConfusion:
    """Counts of (class, predicted class) over pixels, from which IoU and accuracy follow; joined exactly by `merge`.

        IoU_k = n_kk / (sum_j n_kj + sum_j n_jk - n_kk)

    Args:
        num_classes: K.
        ignore_index: label of pixels that do not count.

    Attributes:
        counts: (K, K) int64, rows the classes, columns what was predicted.

    Example:
        >>> confusion = SegmentationConfusion(2)
        >>> confusion.update(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]))
        >>> confusion.iou().tolist(), confusion.mean_iou()
        ([0.5, 0.5], 0.5)
    """

    def __init__(self, num_classes: int, *, ignore_index: int = 255) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Takes in integer classes of one shape.

        Raises:
            ValueError: unequal shapes, or a class beyond 0 .. K - 1 where the target is not ignored.
        """
        if prediction.shape != target.shape or prediction.is_floating_point():
            raise ValueError(
                "Predicted and true classes must be integers of one shape; got "
                f"{prediction.dtype} {tuple(prediction.shape)} and {tuple(target.shape)}."
            )
        counted = target != self.ignore_index
        predicted, true = prediction[counted].long(), target[counted].long()
        for name, classes in (("Predicted", predicted), ("True", true)):
            if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < self.num_classes:
                raise ValueError(
                    f"{name} classes must be 0..{self.num_classes - 1}; got {int(classes.min())}.."
                    f"{int(classes.max())}. Only {self.ignore_index} is ignored, and only in the target."
                )
        pairs = torch.bincount(true * self.num_classes + predicted, minlength=self.num_classes**2)
        self.counts += pairs.view(self.num_classes, self.num_classes).cpu()

    def merge(self, other: SegmentationConfusion) -> None:
        """Takes in what `other` has counted, as if it had been counted here.

        Raises:
            ValueError: where it counts other classes.
        """
        if (other.num_classes, other.ignore_index) != (self.num_classes, self.ignore_index):
            raise ValueError(
                f"Only counts of the same {self.num_classes} classes that ignore {self.ignore_index} can be merged; "
                f"got {other.num_classes} classes that ignore {other.ignore_index}."
            )
        self.counts += other.counts

    def iou(self) -> Tensor:
        """(K,) float64; NaN for a class that is neither there nor predicted."""
        counts = self.counts.double()
        hits = counts.diagonal()
        return hits / (counts.sum(0) + counts.sum(1) - hits)

    def mean_iou(self) -> float:
        """Mean over the classes that are there or predicted; NaN where nothing was counted."""
        return float(self.iou().nanmean())

    def accuracy(self) -> float:
        """Share of counted pixels that are right; NaN where nothing was counted."""
        return float(self.counts.diagonal().sum().double() / self.counts.sum())


def depth_errors(
    prediction: Tensor, target: Tensor, valid: Tensor | None = None, *, median_scaling: bool = False
) -> dict[str, Tensor]:
    """Errors of each image's depth over its valid pixels, (B,) float64; reported is their mean over images.

        rmse = sqrt(mean (p - t)^2),  abs_rel = mean |p - t| / t,  delta1 = share of max(p / t, t / p) < 1.25

    (Eigen et al. 2014, arXiv 1406.2283).

    Args:
        prediction, target: (B, H, W) in metres, positive where valid.
        valid: (B, H, W) booleans; None counts the pixels where the target is finite and positive.
        median_scaling: first multiply each prediction by median(target) / median(prediction), for depth that is known
            up to a factor (Zhou et al. 2017, arXiv 1704.07813).

    Raises:
        ValueError: unequal shapes, an image without valid pixels, or a depth among them that is not positive.
    """
    valid = target.isfinite() & (target > 0) if valid is None else valid
    if not prediction.shape == target.shape == valid.shape or target.ndim != 3:
        raise ValueError(
            "Predicted depth, depth and mask must be (B, H, W); got "
            f"{tuple(prediction.shape)}, {tuple(target.shape)} and {tuple(valid.shape)}."
        )
    rows = [
        _errors(one[mask].double(), true[mask].double(), median_scaling)
        for one, true, mask in zip(prediction, target, valid, strict=True)
    ]
    return {name: torch.stack([row[name] for row in rows]) for name in ("rmse", "abs_rel", "delta1")}


def _errors(prediction: Tensor, target: Tensor, median_scaling: bool) -> dict[str, Tensor]:
    if not len(target) or not bool((prediction > 0).all() & (target > 0).all()):
        raise ValueError(
            f"Every image needs valid pixels with positive depths; got {len(target)} pixels, the lowest depths "
            f"{prediction.min().item() if len(target) else None} (predicted) and "
            f"{target.min().item() if len(target) else None}. Mask what is invalid, clamp what is predicted."
        )
    if median_scaling:
        prediction = prediction * (target.quantile(0.5) / prediction.quantile(0.5))
    error, ratio = (prediction - target).abs(), prediction / target
    return {
        "rmse": error.square().mean().sqrt(),
        "abs_rel": (error / target).mean(),
        "delta1": (torch.maximum(ratio, 1 / ratio) < 1.25).double().mean(),
    }
