"""How far predicted features are from a teacher's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ._checks import full_precision, require_equal_shapes


def alignment_loss(
    prediction: Tensor,
    feature: Tensor,
    *,
    normalized: tuple[Tensor, Tensor] | None = None,
    cosine_weight: float = 0.9,
    smooth_l1_weight: float = 0.1,
) -> Tensor:
    """mean over positions of 0.9 (1 - cos(n(p), n(f))) + 0.1 SmoothL1(p, f), in float32; 0 at p = f.

    p is the prediction, f the teacher's feature and n the teacher's last LayerNorm. The cosine, which most of the
    weight is on, compares what the teacher's readers see; it cannot see a feature's mean and scale, which the
    LayerNorm takes away, and the smooth L1 distance of the features before it gives them. Its gradient is bounded, so
    that a few large tokens of the teacher do not outweigh the rest.

    Own choice: ReaLS (arXiv 2502.00359) is cited for the idea alone. The two weights are those of third-party
    accounts, where both terms compare normalised features.

    Args:
        prediction: (B, D, h, w) patch features or (B, D) global features; dimension 1 is the feature's.
        feature: the teacher's, same shape.
        normalized: n(p) and n(f); without it n is the identity.
        cosine_weight: of the direction.
        smooth_l1_weight: of the values, averaged over D.

    Example:
        >>> alignment_loss(torch.ones(2, 8), torch.ones(2, 8))
        tensor(0.)
    """
    require_equal_shapes(prediction, feature, ("The predicted features", "the teacher's"))
    prediction, feature = full_precision(prediction), full_precision(feature)
    cosine = F.cosine_similarity(*(normalized or (prediction, feature)), dim=1).mean()
    return cosine_weight * (1.0 - cosine) + smooth_l1_weight * F.smooth_l1_loss(prediction, feature)


def spatial_norm(features: Tensor, gamma: float) -> Tensor:
    """iREPA's target (arXiv 2512.10794): (f - gamma mean) / std of features (B, D, h, w), over the places of an image.

    Example:
        >>> spatial_norm(torch.randn(2, 8, 4, 4), 1.0).mean((2, 3)).abs().max() < 1e-5
        tensor(True)
    """
    mean, deviation = features.mean((2, 3), keepdim=True), features.std((2, 3), keepdim=True)
    return (features - gamma * mean) / (deviation + 1e-6)
