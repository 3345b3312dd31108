"""How close a reconstruction is to its picture."""

from __future__ import annotations

import torch
from torch import Tensor


def psnr(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture, 10 log10(4 / MSE): (B,) in dB.

    Args:
        reconstruction: (B, 3, H, W), clamped to [-1, 1] here, as a saved picture would be.
        target: (B, 3, H, W) in [-1, 1].

    The data range is the constant 2 of [-1, 1]. Differs from evaluators that estimate the range from each picture,
    which flatters pictures of low contrast.
    """
    if reconstruction.shape != target.shape:
        raise ValueError(
            f"A reconstruction and its target must have one shape; got {tuple(reconstruction.shape)} and "
            f"{tuple(target.shape)}."
        )
    error = (reconstruction.float().clamp(-1, 1) - target.float()).square().flatten(1).mean(1)
    return 10.0 * torch.log10(4.0 / error.clamp_min(1e-12))
