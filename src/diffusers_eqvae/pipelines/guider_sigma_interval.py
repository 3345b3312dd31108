"""Interval guidance as a guider of diffusers, for Modular Diffusers and loops that take guiders."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ClassifierFreeGuidance
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import GuiderOutput
from torch import Tensor

from ..guidance import is_inside, validate_interval


class SigmaIntervalGuidance(ClassifierFreeGuidance):
    """Classifier-free guidance where lo <= sigma <= hi, sigma = timestep / num_train_timesteps, 1 = noise.

    guided = unconditional + w (conditional - unconditional) inside (arXiv 2207.12598, 2404.07724), and the conditional
    prediction outside, where `num_conditions` is 1, so that no unconditional forward is computed. It is what
    `guidance.IntervalGuidance` computes, bit for bit. Saved and loaded like every guider.

    Differs from the reference: the guiders of diffusers count their start and stop in fractions of the steps, which
    mean other noise levels for every scheduler and number of steps; this one reads the timestep.

    Args:
        guidance_scale: w; 1 = the conditional prediction.
        guidance_interval: (lo, hi) in sigma, both ends included; lo == hi is the empty interval.
        num_train_timesteps: the timestep of pure noise.
        enabled: False gives the conditional prediction everywhere.

    Raises:
        ValueError: an interval outside [0, 1] or reversed.

    Example:
        >>> guider = SigmaIntervalGuidance(guidance_scale=1.8, guidance_interval=(0.0, 0.75))
        >>> guider.set_state(step=0, num_inference_steps=50, timestep=torch.tensor(900.0))
        >>> guider.num_conditions
        1
    """

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 4.0,
        guidance_interval: Sequence[float] = (0.0, 1.0),
        num_train_timesteps: int = 1000,
        enabled: bool = True,
    ) -> None:
        # Not the decorated one, which would put start and stop into the config as well.
        ClassifierFreeGuidance.__init__.__wrapped__(self, guidance_scale=guidance_scale, enabled=enabled)
        self.guidance_interval = validate_interval(guidance_interval)
        self.num_train_timesteps = num_train_timesteps

    def _is_cfg_enabled(self) -> bool:
        if self._timestep is None:
            return False
        sigma = float(torch.as_tensor(self._timestep).flatten()[0]) / self.num_train_timesteps
        return self._enabled and self.guidance_scale != 1.0 and is_inside(sigma, self.guidance_interval)

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        pred = pred_cond if pred_uncond is None else torch.lerp(pred_uncond, pred_cond, self.guidance_scale)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)
