"""EQ-VAE's explicit penalty on latents, which the paper shows to collapse them, with a guard that says so."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autoencoders import downsampling_factor
from ..equivariance import SMALLEST_SCALE, Tau, TauDistribution
from ..losses._checks import full_precision
from ..options import Checked
from ..randomness import StepRandomness
from ._ranks import mean_over_ranks
from .base import AutoencoderRegularizer, AutoencoderState, register_regularizer

logger = logging.getLogger(__name__)


@dataclass
class ExplicitArguments(Checked):
    """The explicit penalty and its guard."""

    explicit_weight: float = field(
        default=0.1, metadata={"help": "Weight of |tau(E(x)) - E(tau(x))|^2.", "range": "[0, inf)"}
    )
    explicit_stop_gradient: bool = field(
        default=False, metadata={"help": "Take tau(E(x)) as a fixed target, so that only E(tau(x)) moves."}
    )
    explicit_smallest_std: float = field(
        default=0.1,
        metadata={
            "help": "The run stops where the latents' standard deviation falls below this share of what it was in the "
            "first step; 0 lets it go on.",
            "range": "[0, 1)",
        },
    )


@register_regularizer("explicit")
class ExplicitRegularizer(AutoencoderRegularizer):
    """mean (tau(E(x)) - E(tau(x)))^2 of posterior means (EQ-VAE, arXiv 2502.09509, eq. 4), one tau a step.

    The penalty can be met by latents that say nothing, and the paper reports that they come (gFID 141 against 34 of
    the implicit objective, `equivariance`). It is here to show that; a guard ends a run whose latents have collapsed.
    The gradient reaches the encoder alone. A step costs one more encoding of an image of s^2 the pixels. Steps in
    which another method has made the image smaller go without.

    Own choice: the mean over all latents, and which side the stop-gradient is on.

    Args:
        downsampling_factor: pixels per latent cell.
        weight: lambda, .1 in the paper.
        stop_gradient: tau(E(x)) is a fixed target.
        smallest_std: of the guard: the least share of the std that latents had in the first step.
        distribution: how tau is drawn; EQ-VAE's default.

    Example:
        >>> objective = AutoencoderObjective(vae, {"explicit": ExplicitRegularizer(8, stop_gradient=True)})
    """

    Arguments = ExplicitArguments
    paper = ("EQ-VAE", "2502.09509")
    reaches = frozenset({"encoder"})
    mean_over_elements = True
    first_std: Tensor

    def __init__(
        self,
        downsampling_factor: int,
        *,
        weight: float = 0.1,
        stop_gradient: bool = False,
        smallest_std: float = 0.1,
        distribution: TauDistribution | None = None,
    ) -> None:
        super().__init__()
        self.downsampling_factor, self.weight = downsampling_factor, weight
        self.stop_gradient, self.smallest_std = stop_gradient, smallest_std
        self.distribution = distribution or TauDistribution()
        self.register_buffer("first_std", torch.zeros(()))  # 0 until it is measured; goes into checkpoints
        self._share: Tensor | None = None

    @classmethod
    def from_arguments(cls, arguments: ExplicitArguments, model: nn.Module) -> Self:
        logger.warning(
            "The explicit penalty is known to collapse latents (EQ-VAE, arXiv 2502.09509); the regularizer "
            "equivariance is the method that does not."
        )
        return cls(
            downsampling_factor(model),
            weight=arguments.explicit_weight,
            stop_gradient=arguments.explicit_stop_gradient,
            smallest_std=arguments.explicit_smallest_std,
        )

    def smallest_scale(self) -> float:
        return SMALLEST_SCALE

    def draw(self, shape: tuple[int, ...], randomness: StepRandomness) -> tuple[tuple[int, int], Tau]:
        size = (shape[-2], shape[-1])
        return size, self.distribution.draw(size, randomness.shared_generator())

    def penalty(
        self, state: AutoencoderState, batch: Mapping[str, Tensor], draw: tuple[tuple[int, int], Tau]
    ) -> Tensor | None:
        (size, tau), mean = draw, full_precision(state.posterior.mean)
        if tuple(mean.shape[-2:]) != size:
            return None
        self._guard(mean)
        transformed = tau.apply_to_latents(mean)
        encoded = state.encode(tau.apply_to_pixels(state.pixels, self.downsampling_factor)).mean
        return F.mse_loss(full_precision(encoded), transformed.detach() if self.stop_gradient else transformed)

    @torch.no_grad()
    def _guard(self, latents: Tensor) -> None:
        """Raises ValueError once the std of latents (B, C, h, w) has fallen; found a step later, without waiting."""
        if self._share is not None and (share := self._share.item()) < self.smallest_std:
            raise ValueError(
                f"The latents have collapsed: their standard deviation is {share:.1%} of what it was in the first "
                f"step, below {self.smallest_std:.0%} (explicit_smallest_std). Lower explicit_weight, set "
                "explicit_stop_gradient, or use the regularizer equivariance in its place."
            )
        std = mean_over_ranks(latents.std((0, 2, 3), correction=0).mean())
        self.first_std.copy_(torch.where(self.first_std > 0, self.first_std, std))
        self._share = std / self.first_std
