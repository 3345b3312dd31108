"""Posteriors as wide as reconstruction allows, instead of near N(0, I) (arXiv 2603.21085)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Self

from torch import Tensor, nn

from ..autoencoders import is_deterministic
from ..losses._checks import full_precision
from ..options import Checked
from .base import AutoencoderRegularizer, AutoencoderState, register_regularizer


@dataclass
class VarianceExpansionArguments(Checked):
    """The two terms that take the KL divergence's place."""

    variance_expansion_weight: float = field(
        default=0.1, metadata={"help": "Weight of 1 / (variance + delta).", "range": "[0, inf)"}
    )
    variance_expansion_delta: float = field(
        default=0.1, metadata={"help": "What keeps the term of a vanishing variance finite.", "range": "(0, inf)"}
    )
    variance_expansion_range_weight: float = field(
        default=1e-6, metadata={"help": "Weight of exp(|z| - 1), which holds latents near 0.", "range": "[0, inf)"}
    )


@register_regularizer("variance_expansion")
class VarianceExpansionRegularizer(AutoencoderRegularizer):
    """mean of 0.1 / (sigma^2 + delta) + 1e-6 * exp(|z| - 1), of the posterior's variance and a sample z of it.

    The variance expansion loss (arXiv 2603.21085), in place of the KL divergence, whose weight must be 0: variances
    grow until reconstruction holds them, so that the decoder stands the errors of a generator. The gradient reaches
    the encoder alone.

    Its authors' text was known here by others' accounts alone. Own choice: delta, and the mean over all latents. The
    second term is for latents of unit size: at |z| = 30, which SD's autoencoder reaches, it is a million times the
    first. Fine-tune such an autoencoder with a range weight of 0. It costs reconstruction (the accounts say 1.4 dB).

    Args:
        variance_weight, delta, range_weight: as in the formula.

    Example:
        >>> objective = AutoencoderObjective(vae, {"variance_expansion": VarianceExpansionRegularizer()})
        >>> step = AutoencoderStep(objective, objective, weights=AutoencoderLossWeights(kl=0.0), perceptual=lpips)
    """

    Arguments = VarianceExpansionArguments
    prefixes = ("variance_expansion_",)
    paper = ("variance expansion", "2603.21085")
    reaches = frozenset({"encoder"})
    excludes = MappingProxyType({"kl": "it takes the place of the KL divergence, which must have weight 0"})
    mean_over_elements = True

    def __init__(self, variance_weight: float = 0.1, *, delta: float = 0.1, range_weight: float = 1e-6) -> None:
        super().__init__()
        self.variance_weight, self.delta, self.range_weight = variance_weight, delta, range_weight

    @classmethod
    def from_arguments(cls, arguments: VarianceExpansionArguments, model: nn.Module) -> Self:
        if is_deterministic(model):
            raise ValueError(
                f"variance_expansion widens the posterior, and that of {type(model).__name__} is a point; leave the "
                "regularizer out."
            )
        return cls(
            arguments.variance_expansion_weight,
            delta=arguments.variance_expansion_delta,
            range_weight=arguments.variance_expansion_range_weight,
        )

    def penalty(self, state: AutoencoderState, batch: Mapping[str, Tensor], draw: Any) -> Tensor:
        assert state.posterior.logvar is not None
        variance = full_precision(state.posterior.logvar).exp()
        expansion = self.variance_weight * (1 / (variance + self.delta)).mean()
        if not self.range_weight:
            return expansion
        return expansion + self.range_weight * (full_precision(state.raw_latents).abs() - 1).exp().mean()
