"""How far predicted features are from a teacher's (ReaLS, arXiv 2502.00359, section 3)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ._checks import full_precision, require_equal_shapes


def alignment_loss(
    prediction: Tensor, feature: Tensor, *, cosine_weight: float = 0.9, smooth_l1_weight: float = 0.1
) -> Tensor:
    """mean over places of 0.9 (1 - cos(prediction, feature)) + 0.1 SmoothL1(prediction, feature), in float32.

    ReaLS publishes no formula; the weights are those of third-party accounts, and both are arguments.

    Args:
        prediction: (B, D, h, w) patch features or (B, D) global features; dimension 1 is the feature's.
        feature: the teacher's, same shape.
        cosine_weight: of the direction.
        smooth_l1_weight: of the values, averaged over D.

    Returns:
        A scalar; 0 where prediction and feature are equal (and not null).

    Raises:
        ValueError: on unequal shapes.
    """
    require_equal_shapes(prediction, feature, ("The predicted features", "the teacher's"))
    prediction, feature = full_precision(prediction), full_precision(feature)
    cosine = F.cosine_similarity(prediction, feature, dim=1).mean()
    return cosine_weight * (1.0 - cosine) + smooth_l1_weight * F.smooth_l1_loss(prediction, feature)
