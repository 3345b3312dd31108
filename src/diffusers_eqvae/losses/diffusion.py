"""What a generator of latents minimises. Targets come from `flow`; this file only compares."""

from __future__ import annotations

from torch import Tensor

from ._checks import full_precision, require_equal_shapes


def flow_matching_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean square of prediction - target per sample, (B,), in float32 (SiT, arXiv 2401.08740, eq. 6).

    Kept per sample so that the caller may weight or bin it by noise level; its mean over the batch is the objective.

    Args:
        prediction: (B, C, h, w), the transformer's output without a learned variance.
        target: the same shape, for example `flow.velocity_target`.

    Raises:
        ValueError: on unequal shapes.
    """
    require_equal_shapes(prediction, target, ("The prediction (without learned variance)", "its target"))
    return (full_precision(prediction) - full_precision(target)).square().flatten(1).mean(1)
