"""Shrunken latents must decode to the shrunken image, beside the plain step (arXiv 2502.14831)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn

from ..autoencoders import downsampling_factor
from ..equivariance import Tau, scaling
from ..options import Checked
from ..randomness import StepRandomness
from .base import AutoencoderRegularizer, AutoencoderState, register_regularizer


@dataclass
class ScaleOnlyArguments(Checked):
    """By how much latents shrink, and how much that counts."""

    scale_only_weight: float = field(
        default=0.25, metadata={"help": "Weight of the shrunken pair beside the plain one.", "range": "(0, inf)"}
    )
    scale_only_scales: list[float] = field(
        default_factory=lambda: [0.5, 0.25],
        metadata={"help": "Scales, one of which is drawn in each step.", "range": "(0, 1)"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scale_only_scales:
            raise ValueError("scale_only_scales must name at least one scale; got none.")


@register_regularizer("scale_only")
class ScaleOnlyRegularizer(AutoencoderRegularizer):
    """loss(D(z), x) + weight * loss(D(down(z)), down(x)): scale equivariance as an added term (arXiv 2502.14831).

    The plain step stays in every step, where EQ-VAE replaces it in half of them. The shrunken pair is judged by all
    terms that judge the plain one. Both halves of the autoencoder are moved. A step costs a decoding of s^2 the pixels
    more: 1.25 decodings at 1/2. Where another method has shrunk the image as far already, the pair is left out.

    Own choice: the weight, the scales 1/2 and 1/4, and that all images of a step have one; resampling is bilinear.

    Args:
        downsampling_factor: pixels per latent cell.
        weight: of the shrunken pair.
        scales: of which one is drawn per step.

    Example:
        >>> objective = AutoencoderObjective(vae, {"scale_only": ScaleOnlyRegularizer(8, scales=(0.5,))})
    """

    Arguments = ScaleOnlyArguments
    paper = ("scale equivariance", "2502.14831")

    def __init__(
        self, downsampling_factor: int, *, weight: float = 0.25, scales: tuple[float, ...] = (0.5, 0.25)
    ) -> None:
        super().__init__()
        self.downsampling_factor, self.pair_weight, self.scales = downsampling_factor, weight, scales

    @classmethod
    def from_arguments(cls, arguments: ScaleOnlyArguments, model: nn.Module) -> Self:
        scales = tuple(arguments.scale_only_scales)
        return cls(downsampling_factor(model), weight=arguments.scale_only_weight, scales=scales)

    def smallest_scale(self) -> float:
        return min(self.scales)

    def draw(self, shape: tuple[int, ...], randomness: StepRandomness) -> Tau:
        chosen = torch.randint(len(self.scales), (), generator=randomness.shared_generator())
        return scaling((shape[-2], shape[-1]), self.scales[int(chosen)])

    def decodings(self, state: AutoencoderState, draw: Tau) -> list[tuple[Tensor, Tensor, float]]:
        if any(small >= side for small, side in zip(draw.latent_size, state.raw_latents.shape[-2:], strict=True)):
            return []
        target = draw.apply_to_pixels(state.pixels, self.downsampling_factor)
        return [(draw.apply_to_latents(state.raw_latents), target, self.pair_weight)]
