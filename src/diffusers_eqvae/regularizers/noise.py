"""Noisy latents must decode to the clean image (l-DeTok, arXiv 2507.15856)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from torch import Tensor, nn

from ..options import Checked
from ..randomness import StepRandomness
from .base import AutoencoderRegularizer, register_regularizer


@dataclass
class NoiseArguments(Checked):
    """How strong the noise is."""

    noise_gamma: float = field(
        default=1.0,
        metadata={
            "help": "Standard deviation, in raw latents, of the noise at full strength: 3 from scratch, .3 to 1 times "
            "that of the latents for fine-tuning.",
            "range": "(0, inf)",
        },
    )


@register_regularizer("noise")
class NoiseRegularizer(AutoencoderRegularizer):
    """Decodes (1 - s) z + s * gamma * e against the clean image, s ~ U(0, 1) per image, e ~ N(0, I).

    As l-DeTok (arXiv 2507.15856) trains its tokenizer, so that the decoder stands what a generator gets slightly
    wrong. Every step is noisy. It costs no time, and reconstruction: the decoder spends itself on noise that an
    encoded image does not have, and an encoder may answer by larger latents, which only the KL term holds back.

    Args:
        gamma: in units of the raw latents; those of SD's autoencoder have a standard deviation of 5.5.

    Example:
        >>> objective = AutoencoderObjective(vae, {"noise": NoiseRegularizer(gamma=1.0)})
    """

    Arguments = NoiseArguments
    paper = ("l-DeTok", "2507.15856")

    def __init__(self, gamma: float = 1.0) -> None:
        super().__init__()
        self.gamma = gamma

    @classmethod
    def from_arguments(cls, arguments: NoiseArguments, model: nn.Module) -> Self:
        return cls(arguments.noise_gamma)

    def draw(self, shape: tuple[int, ...], randomness: StepRandomness) -> tuple[Tensor, Tensor]:
        """Strengths (B,), and noise (B, C, m, m) of the longer side m, which covers latents that tau has turned."""
        batch, channels, side = shape[0], shape[1], max(shape[-2:])
        return randomness.rand((batch,)), randomness.randn((batch, channels, side, side))

    def transform(self, raw_latents: Tensor, pixels: Tensor, draw: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        height, width = raw_latents.shape[-2:]
        strength, noise = (drawn.to(raw_latents) for drawn in draw)
        strength, noise = strength.view(-1, 1, 1, 1), noise[..., :height, :width]
        return (1 - strength) * raw_latents + strength * self.gamma * noise, pixels
