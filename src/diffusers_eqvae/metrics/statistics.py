"""The distribution of latents, channel by channel."""

from __future__ import annotations

import torch
from torch import Tensor


def channel_statistics(latents: Tensor) -> dict[str, list[float]]:
    """Mean, standard deviation and excess kurtosis per channel of (B, C, h, w), in float64, over B, h and w.

    Excess kurtosis is E[(z - m)^4] / s^4 - 3: 0 for a Gaussian, which is what a generator starts from; -1.2 for a
    uniform distribution; large for rare outliers. A constant channel has kurtosis 0.

    Raises:
        ValueError: other than four axes, or no values.
    """
    if latents.ndim != 4 or latents.numel() == 0:
        raise ValueError(f"Channel statistics need latents (B, C, h, w); got {tuple(latents.shape)}.")
    values = latents.detach().double().transpose(0, 1).flatten(1)
    mean = values.mean(1)
    centred = values - mean[:, None]
    variance = centred.square().mean(1)
    fourth = centred.pow(4).mean(1)
    excess = torch.where(variance > 0, fourth / variance.square() - 3.0, torch.zeros_like(variance))
    return {"mean": mean.tolist(), "std": variance.sqrt().tolist(), "kurtosis": excess.tolist()}
