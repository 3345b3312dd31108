"""Which spatial frequencies latents are made of: generators learn the high ones last, and tau destroys them first."""

from __future__ import annotations

import torch
from torch import Tensor

# In cycles per latent cell; the finest pattern, cells of alternating sign, has .5.
HIGH_FREQUENCY = 0.25


def radial_power_spectrum(latents: Tensor) -> Tensor:
    """Power of (B, C, h, w) by distance from zero frequency, the mean over channels and directions: (B, K).

    Entry k is the mean of |FFT(z - mean z)|^2 / (h w) over the frequencies (f_y, f_x) whose length, times
    s = min(h, w), rounds to k = 0 .. s // 2; so k / s is in cycles per cell. White noise of variance v is flat at v
    (entry 0 holds the mean, which is taken out, and is 0). Frequencies in the corners beyond .5 are left out.
    """
    power = _power(latents).mean(1).flatten(1)
    side = min(latents.shape[-2:])
    bins = (_radius(latents) * side).round().long().flatten()
    inside = bins <= side // 2
    index, count = bins[inside], side // 2 + 1
    sums = power.new_zeros(len(power), count).index_add_(1, index, power[:, inside])
    return sums / torch.bincount(index, minlength=count)


def high_frequency_share(latents: Tensor) -> Tensor:
    """Share of the variance of (B, C, h, w) above a quarter cycle per cell, half of the finest frequency: (B,).

    All frequencies count, corners included: white noise has 1 - pi/16 = .80, smooth latents have close to 0. Constant
    latents have 0.
    """
    power = _power(latents).mean(1)
    high = (power * (_radius(latents) > HIGH_FREQUENCY)).flatten(1).sum(1)
    return high / power.flatten(1).sum(1).clamp_min(torch.finfo(power.dtype).tiny)


def _power(latents: Tensor) -> Tensor:
    """|FFT|^2 / (h w) of every channel around its mean, (B, C, h, w) in float32 or better."""
    if latents.ndim != 4 or min(latents.shape[-2:]) < 2:
        raise ValueError(
            f"A spectrum needs latents (B, C, h, w) of at least 2 cells a side; got {tuple(latents.shape)}."
        )
    values = latents.detach().to(torch.promote_types(latents.dtype, torch.float32))
    values = values - values.mean((-2, -1), keepdim=True)
    power = torch.fft.fft2(values).abs().square() / (values.shape[-2] * values.shape[-1])
    power[..., 0, 0] = 0.0
    return power


def _radius(latents: Tensor) -> Tensor:
    """Length of each frequency in cycles per cell, (h, w)."""
    rows, columns = (torch.fft.fftfreq(side, device=latents.device) for side in latents.shape[-2:])
    return torch.hypot(rows[:, None], columns)
