"""Classifier-free guidance inside an interval of noise levels, as a denoiser that wraps a denoiser.

    guided = unconditional + w * (conditional - unconditional)    Ho & Salimans, arXiv 2207.12598 (w = 1 + theirs)
    only where lo <= sigma <= hi                                  Kynkaanniemi et al., arXiv 2404.07724

The interval is in noise level sigma in [0, 1], 1 = pure noise: REPA's axis. `from_sigma_edm`, `from_step_fractions`
and `from_flow_time` bring the other axes in use onto it; for DDPM schedules sigma is timestep / 1000.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# (latents (B, C, h, w), timestep (B,) = 1000 * sigma, class_labels (B,)) -> prediction (B, C or more, h, w)
Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]

# Grids are computed in floating point: an interval bound on a grid point means to include it.
SIGMA_TOLERANCE = 1e-6


class IntervalGuidance:
    """A guided denoiser. Outside the interval the unconditional forward is skipped, so a step costs half there.

    Args:
        denoiser: called with (latents, timestep, class_labels) as tensors of one batch size.
        guidance_scale: w; 1 = the conditional prediction, 0 = the unconditional one.
        guidance_interval: (lo, hi) in sigma, both ends included; lo == hi is the empty interval.
        null_class: the label that means "no class".
        guided_channels: guide the first n channels only and leave the others conditional (the DiT and SiT papers
            evaluate with 3 of 4); None = all latent channels.
        latent_channels: channels of the prediction that are latents, the others (a learned variance) stay
            conditional; None = as many as `latents` has.
        batched: one forward of 2B samples instead of two of B; the same result, twice the memory.
        num_train_timesteps: timestep = num_train_timesteps * sigma.
        guide: the denoiser of a weaker model, whose prediction for the same labels takes the place of the
            unconditional one (autoguidance, arXiv 2406.02070); it counts as much as the model itself in `nfe`.

    Differs from the reference: REPA compares floating-point numbers as they come, so a bound that lies on a point of
    the grid may fall to either side; here it is included, within 1e-6.

    Attributes:
        nfe: network evaluations so far per sample, in units of one conditional batch: a guided call counts 2.

    Raises:
        ValueError: a scale that is not finite, an interval outside [0, 1] or reversed, a channel count outside
            1 .. latent channels, a negative null class.

    Example:
        >>> denoiser = lambda latents, timestep, labels: latents * labels.view(-1, 1, 1, 1)
        >>> guidance = IntervalGuidance(denoiser, guidance_scale=1.8, guidance_interval=(0.0, 0.75), null_class=10)
        >>> prediction = guidance(torch.ones(2, 4, 8, 8), 0.9, torch.tensor([3, 5]))
        >>> guidance.nfe
        1.0
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        guidance_scale: float = 1.0,
        guidance_interval: Sequence[float] = (0.0, 1.0),
        null_class: int,
        guided_channels: int | None = None,
        latent_channels: int | None = None,
        batched: bool = True,
        num_train_timesteps: int = 1000,
        guide: Denoiser | None = None,
    ) -> None:
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number; got {guidance_scale}.")
        if null_class < 0:
            raise ValueError(f"null_class is a class label and must be >= 0; got {null_class}.")
        _check_guided_channels(guided_channels, latent_channels)
        self.denoiser = denoiser
        self.guidance_scale = float(guidance_scale)
        self.guidance_interval = validate_interval(guidance_interval)
        self.null_class = null_class
        self.guided_channels = guided_channels
        self.latent_channels = latent_channels
        self.batched = batched
        self.num_train_timesteps = num_train_timesteps
        self.guide = guide
        self.nfe = 0.0

    def is_guided_at(self, sigma: float) -> bool:
        """Whether a call at noise level sigma needs the unconditional prediction."""
        return is_inside(sigma, self.guidance_interval) and self.guidance_scale != 1.0

    def __call__(self, latents: Tensor, sigma: float | Tensor, class_labels: Tensor) -> Tensor:
        """The prediction for latents (B, C, h, w) and labels (B,) at noise level `sigma`, a host float or (B,)."""
        size, device = latents.shape[0], latents.device
        if not isinstance(sigma, Tensor):
            timestep = torch.full((size,), self.num_train_timesteps * sigma, dtype=torch.float32, device=device)
            return self._predict(latents, timestep, class_labels, guided=self.is_guided_at(sigma))
        timestep = (self.num_train_timesteps * sigma).to(device, torch.float32)
        levels = [self.is_guided_at(each) for each in sigma.tolist()]
        parts = [[row for row, guided in enumerate(levels) if guided is wanted] for wanted in (True, False)]
        predictions = [
            self._predict(latents[rows], timestep[rows], class_labels[rows], guided=guided, share=len(rows) / size)
            for rows, guided in zip(parts, (True, False), strict=True)
            if rows
        ]
        return torch.cat(predictions)[torch.tensor(parts[0] + parts[1], device=device).argsort()]

    def _predict(
        self, latents: Tensor, timestep: Tensor, class_labels: Tensor, *, guided: bool, share: float = 1.0
    ) -> Tensor:
        """One call of the denoiser, or two in one, for a `share` of the samples."""
        self.nfe += share * (2.0 if guided else 1.0)
        if not guided:
            return self.denoiser(latents, timestep, class_labels)
        if self.guide is not None:
            conditional = self.denoiser(latents, timestep, class_labels)
            return self._combine(conditional, self.guide(latents, timestep, class_labels), latents.shape[1])
        null_labels = torch.full_like(class_labels, self.null_class)
        if self.batched:
            both = self.denoiser(
                torch.cat([latents, latents]), torch.cat([timestep, timestep]), torch.cat([class_labels, null_labels])
            )
            conditional, unconditional = both.chunk(2)
        else:
            conditional = self.denoiser(latents, timestep, class_labels)
            unconditional = self.denoiser(latents, timestep, null_labels)
        return self._combine(conditional, unconditional, latents.shape[1])

    def _combine(self, conditional: Tensor, unconditional: Tensor, channels_of_latents: int) -> Tensor:
        latent_channels = self.latent_channels or channels_of_latents
        _check_guided_channels(self.guided_channels, latent_channels)
        n = self.guided_channels or latent_channels
        guided = torch.lerp(unconditional[:, :n], conditional[:, :n], self.guidance_scale)
        return guided if n == conditional.shape[1] else torch.cat([guided, conditional[:, n:]], dim=1)


def is_inside(sigma: float, interval: tuple[float, float]) -> bool:
    """Whether lo <= sigma <= hi, within 1e-6; nothing lies in an interval of lo == hi."""
    low, high = interval
    return low < high and low - SIGMA_TOLERANCE <= sigma <= high + SIGMA_TOLERANCE


def validate_interval(interval: Sequence[float]) -> tuple[float, float]:
    """(lo, hi) as floats.

    Raises:
        ValueError: not two numbers with 0 <= lo <= hi <= 1.
    """
    values = tuple(float(value) for value in interval)
    if len(values) != 2 or not 0.0 <= values[0] <= values[1] <= 1.0:
        raise ValueError(
            f"guidance_interval must be (lo, hi) in noise level sigma with 0 <= lo <= hi <= 1; got {values}. "
            "from_sigma_edm, from_step_fractions and from_flow_time convert other axes."
        )
    return values[0], values[1]


def from_sigma_edm(interval: Sequence[float]) -> tuple[float, float]:
    """From EDM's noise levels in [0, inf], sigma_edm = sigma / (1 - sigma): (0.28, 5.42) -> (0.219, 0.844).

    Raises:
        ValueError: not two numbers with 0 <= lo <= hi.
    """
    if len(interval) != 2 or not 0.0 <= interval[0] <= interval[1]:
        raise ValueError(f"An interval of EDM noise levels must be (lo, hi) with 0 <= lo <= hi; got {interval}.")
    low, high = (1.0 if math.isinf(value) else value / (1.0 + value) for value in interval)
    return validate_interval((low, high))


def from_step_fractions(start: float, stop: float) -> tuple[float, float]:
    """From diffusers' guiders, fractions of the steps from the noise end on a uniform grid: (.25, 1) -> (0, .75).

    Raises:
        ValueError: not 0 <= start <= stop <= 1.
    """
    if not 0.0 <= start <= stop <= 1.0:
        raise ValueError(f"Step fractions must satisfy 0 <= start <= stop <= 1; got start={start}, stop={stop}.")
    return validate_interval((1.0 - stop, 1.0 - start))


def from_flow_time(interval: Sequence[float]) -> tuple[float, float]:
    """From SiT's time t = 1 - sigma, where 1 = data: (.25, 1) -> (0, .75).

    Raises:
        ValueError: not two numbers with 0 <= lo <= hi <= 1.
    """
    low, high = validate_interval(interval)
    return 1.0 - high, 1.0 - low


def _check_guided_channels(guided_channels: int | None, latent_channels: int | None) -> None:
    if guided_channels is None:
        return
    if guided_channels < 1 or (latent_channels is not None and guided_channels > latent_channels):
        available = "the number of latent channels" if latent_channels is None else latent_channels
        raise ValueError(f"guided_channels must lie in 1 .. {available}, or be None for all; got {guided_channels}.")
