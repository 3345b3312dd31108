"""What latents look like to a generator: spatial frequencies, channel statistics, intrinsic dimension.

Generators learn high frequencies last, and tau destroys them first.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# In cycles per latent position; the finest pattern, positions of alternating sign, has .5.
HIGH_FREQUENCY = 0.25
KEPT_SHARE = 0.9  # of the ratios of distances, the lowest, that the intrinsic dimension is fitted to
MIN_POINTS = 10
BLOCK_POINTS = 1024


def radial_power_spectrum(latents: Tensor) -> Tensor:
    """Power of (B, C, h, w) by distance from zero frequency, the mean over channels and directions: (B, K).

    Entry k is the mean of |FFT(z - mean z)|^2 / (h w) over the frequencies (f_y, f_x) whose length, times
    s = min(h, w), rounds to k = 0 .. s // 2; so k / s is in cycles per position. White noise of variance v is flat
    at v (entry 0 holds the mean, which is taken out, and is 0). Frequencies in the corners beyond .5 are left out.

    Example:
        >>> radial_power_spectrum(torch.randn(8, 4, 32, 32)).shape
        torch.Size([8, 17])
    """
    power = _power(latents).mean(1).flatten(1)
    side = min(latents.shape[-2:])
    bins = (_radius(latents) * side).round().long().flatten()
    inside = bins <= side // 2
    index, count = bins[inside], side // 2 + 1
    sums = power.new_zeros(len(power), count).index_add_(1, index, power[:, inside])
    return sums / torch.bincount(index, minlength=count)


def high_frequency_share(latents: Tensor) -> Tensor:
    """Share of the variance of (B, C, h, w) above a quarter cycle per position, half of the finest frequency: (B,).

    All frequencies count, corners included: white noise has 1 - pi/16 = .80, smooth latents have close to 0. Constant
    latents have 0.

    Example:
        >>> high_frequency_share(torch.ones(1, 4, 32, 32))
        tensor([0.])
    """
    power = _power(latents).mean(1)
    high = (power * (_radius(latents) > HIGH_FREQUENCY)).flatten(1).sum(1)
    return high / power.flatten(1).sum(1).clamp_min(torch.finfo(power.dtype).tiny)


def _power(latents: Tensor) -> Tensor:
    """|FFT|^2 / (h w) of every channel around its mean, (B, C, h, w) in float32 or better."""
    if min(latents.shape[-2:]) < 2:
        raise ValueError(f"A spectrum needs latents of at least 2 positions a side; got {tuple(latents.shape)}.")
    values = latents.detach().to(torch.promote_types(latents.dtype, torch.float32))
    values = values - values.mean((-2, -1), keepdim=True)
    power = torch.fft.fft2(values).abs().square() / (values.shape[-2] * values.shape[-1])
    power[..., 0, 0] = 0.0
    return power


def _radius(latents: Tensor) -> Tensor:
    """Length of each frequency in cycles per position, (h, w)."""
    rows, columns = (torch.fft.fftfreq(side, device=latents.device) for side in latents.shape[-2:])
    return torch.hypot(rows[:, None], columns)


def channel_statistics(latents: Tensor) -> dict[str, list[float]]:
    """Mean, standard deviation and excess kurtosis per channel of (B, C, h, w), in float64, over B, h and w.

    Excess kurtosis is E[(z - m)^4] / s^4 - 3: 0 for a Gaussian, which is what a generator starts from; -1.2 for a
    uniform distribution; large for rare outliers. A constant channel has kurtosis 0.

    Example:
        >>> channel_statistics(torch.randn(100, 4, 32, 32))["std"]
    """
    values = latents.detach().double().transpose(0, 1).flatten(1)
    mean = values.mean(1)
    centred = values - mean[:, None]
    variance = centred.square().mean(1)
    fourth = centred.pow(4).mean(1)
    excess = torch.where(variance > 0, fourth / variance.square() - 3.0, torch.zeros_like(variance))
    return {"mean": mean.tolist(), "std": variance.sqrt().tolist(), "kurtosis": excess.tolist()}


def intrinsic_dimension(points: Tensor) -> float:
    """TwoNN (Facco et al. 2017): the dimension d of the manifold that `points` (N, D) lie on.

    With r1, r2 the distances from a point to its two nearest others and F the empirical distribution of mu = r2 / r1,

        -log(1 - F(mu)) = d log(mu),   fitted through the origin on the lower 90 % of mu (eqs. 5 to 8).

    The estimate scatters by about d / sqrt(N) and, for large d, falls short of the truth unless N is large: say N and
    what a point is beside the number. For EQ-VAE's figures a point is the flattened latent of one image.

    Computed in float64 in blocks of rows; memory grows with N, not with N^2. Equal points, which have no r2 / r1,
    count once, and a warning says how many there were.

    Example:
        >>> intrinsic_dimension(raw_latents.flatten(1))
    """
    dimension = intrinsic_dimension_if_defined(points)
    if dimension is None:
        raise ValueError(
            f"An intrinsic dimension needs at least {MIN_POINTS} different points; there are fewer among these "
            f"{len(points)}. Measure on more images."
        )
    return dimension


def intrinsic_dimension_if_defined(points: Tensor) -> float | None:
    """`intrinsic_dimension`, or None for fewer than 10 different points, as those of an encoder that has collapsed."""
    if points.ndim != 2 or not torch.isfinite(points).all():
        raise ValueError(
            f"Points must be finite and of shape (N, D); got {tuple(points.shape)}. Flatten latents first."
        )
    distinct = torch.unique(points.detach().double(), dim=0)
    if len(distinct) < len(points):
        logger.warning("%d of %d points equal another one and count once.", len(points) - len(distinct), len(points))
    if len(distinct) < MIN_POINTS:
        return None
    log_ratios = _log_ratios(distinct).sort().values
    kept = int(KEPT_SHARE * len(log_ratios))
    rank = torch.arange(1, kept + 1, dtype=torch.float64, device=distinct.device)
    survival = -torch.log1p(-rank / len(log_ratios))
    x = log_ratios[:kept]
    return float((x @ survival) / (x @ x))


def _log_ratios(points: Tensor) -> Tensor:
    """log(r2 / r1) of every point, (N,)."""
    centred = points - points.mean(0)
    squares = centred.square().sum(1)
    ratios = []
    for start in range(0, len(points), BLOCK_POINTS):
        rows = centred[start : start + BLOCK_POINTS]
        distances = squares[start : start + len(rows), None] + squares - 2 * rows @ centred.T
        own = torch.arange(len(rows), device=points.device)
        distances[own, own + start] = torch.inf
        # The expansion finds the neighbours; it cancels for close ones, so their distances are taken again.
        neighbours = distances.topk(2, largest=False).indices
        exact = torch.stack([(rows - centred[column]).norm(dim=1) for column in neighbours.T], dim=1).sort(1).values
        ratios.append(torch.log(exact[:, 1] / exact[:, 0]))
    return torch.cat(ratios)
