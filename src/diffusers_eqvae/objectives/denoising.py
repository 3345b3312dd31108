"""Denoising of a discrete chain (DiT, arXiv 2212.09748): the noise and, where the model learns it, the variance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import DDPMScheduler
from torch import Tensor, nn

from ..diffusion import BETA_END, BETA_START, NUM_STEPS, DiffusionChain
from ..losses.diffusion import flow_matching_loss, variational_bound
from ..models.backbone import Backbone
from ..regularizers.base import GeneratorRegularizer, GeneratorState
from .base import NUM_TRAIN_TIMESTEPS, LatentObjective, register_objective


@register_objective("denoising")
class DenoisingObjective(LatentObjective):
    """|noise - prediction|^2 at a uniform step of the linear chain of 1000, plus the variational bound.

    The bound trains the learned variance alone, its mean is detached; a model without one (C output channels) is
    trained by the first term. Both count once, as DiT's do.

    Args:
        model: a backbone that predicts "epsilon", of the timesteps 0 .. 999.
        regularizers: by name, applied in this order.

    Example:
        >>> objective = DenoisingObjective(SiTTransformer2DModel.from_preset("DiT-S/2", num_classes=10))
    """

    own_terms = ("noise", "bound")
    prediction_types = ("epsilon",)

    def __init__(
        self, model: Backbone | nn.Module, regularizers: Mapping[str, GeneratorRegularizer] | None = None
    ) -> None:
        super().__init__(model, regularizers)
        self.chain = DiffusionChain()

    def sigmas(self, uniform: Tensor) -> Tensor:
        """t / 1000 of a uniform step t = 0 .. 999."""
        return (uniform * NUM_STEPS).floor().clamp(max=NUM_STEPS - 1) / NUM_TRAIN_TIMESTEPS

    def timestep(self, sigmas: Tensor) -> Tensor:
        return (NUM_TRAIN_TIMESTEPS * sigmas).round()

    def corrupt(self, latents: Tensor, noise: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        return self.chain.interpolate(latents, noise, self.timestep(sigmas).long()), noise

    def losses(self, state: GeneratorState, extra: Tensor | None) -> dict[str, Tensor]:
        terms = {"noise": flow_matching_loss(state.prediction, state.target).mean()}
        if extra is not None:
            steps = self.timestep(state.sigmas).long()
            given = {"clean": state.clean, "noisy": state.noisy, "steps": steps}
            terms["bound"] = variational_bound(self.chain, state.prediction, extra, **given).mean()
        return terms

    def scheduler(self) -> DDPMScheduler:
        """Ancestral sampling as ADM and DiT do it: N of the 1000 steps evenly from first to last, nothing clipped."""
        config: Any = self.model.config
        return self.chain_scheduler(learned_variance=getattr(config, "learn_sigma", False))

    @staticmethod
    def chain_scheduler(*, learned_variance: bool) -> DDPMScheduler:
        """The scheduler of a model with or without a learned variance.

        Differs from the reference: ADM adds up its stride before rounding, so for some N (21, 23, 31, not 10, 25, 50,
        100, 250, 500) a few of its steps are one away from these.
        """
        return DDPMScheduler(
            num_train_timesteps=NUM_STEPS,
            beta_start=BETA_START,
            beta_end=BETA_END,
            beta_schedule="linear",
            variance_type="learned_range" if learned_variance else "fixed_small",
            clip_sample=False,
            timestep_spacing="linspace",
        )
