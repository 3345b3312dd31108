"""Latents with cells replaced by a learned token must decode to the whole image (SSVAE, arXiv 2512.05394)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Self

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..autoencoders import latent_channels
from ..models.component import ComponentMixin
from ..options import Checked
from ..randomness import StepRandomness
from .base import AutoencoderRegularizer, register_regularizer

FOLDER = "mask_token"


class MaskToken(ComponentMixin, ConfigMixin):
    """The raw latents (C,) that stand where a cell is masked; learned, from 0."""

    @register_to_config
    def __init__(self, latent_channels: int = 4) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(latent_channels))


@dataclass
class LatentMaskingArguments(Checked):
    """How many cells are masked, and how often."""

    latent_masking_ratios: list[float] = field(
        default_factory=lambda: [0.0, 0.25, 0.5, 0.75],
        metadata={"help": "Shares of cells that may be masked.", "range": "[0, 1]"},
    )
    latent_masking_probabilities: list[float] = field(
        default_factory=lambda: [0.7, 0.1, 0.1, 0.1],
        metadata={"help": "How often each of them is, for an image; they add up to 1.", "range": "[0, 1]"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        ratios, probabilities = self.latent_masking_ratios, self.latent_masking_probabilities
        if len(ratios) != len(probabilities) or not math.isclose(sum(probabilities), 1.0, abs_tol=1e-6):
            raise ValueError(
                "latent_masking_probabilities must be as many as latent_masking_ratios and add up to 1; got "
                f"{probabilities} for {ratios}."
            )


@register_regularizer("latent_masking")
class LatentMaskingRegularizer(AutoencoderRegularizer):
    """Decodes z with round(r * h * w) of its cells replaced by a learned token, r drawn per image, against the image.

    SSVAE's masking (arXiv 2512.05394): what a cell holds can then be told from its neighbours. The token is saved in
    mask_token/ beside the autoencoder, and a run that goes on from there goes on with it. It costs no time, and
    reconstruction: 3 images in 10 are decoded from what is left.

    Own choice: r and the cells are drawn for each image by itself.

    Args:
        token: trained along.
        ratios, probabilities: see `LatentMaskingArguments`.

    Example:
        >>> objective = AutoencoderObjective(vae, {"latent_masking": LatentMaskingRegularizer(MaskToken(4))})
    """

    Arguments = LatentMaskingArguments
    paper = ("SSVAE", "2512.05394")
    reaches = frozenset({"encoder", "decoder", "component"})

    def __init__(
        self,
        token: MaskToken,
        *,
        ratios: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75),
        probabilities: tuple[float, ...] = (0.7, 0.1, 0.1, 0.1),
    ) -> None:
        super().__init__()
        self.token = token.train()
        self.ratios, self.probabilities = ratios, probabilities

    @classmethod
    def from_arguments(cls, arguments: LatentMaskingArguments, model: nn.Module) -> Self:
        token = MaskToken.saved_beside(model, FOLDER, latent_channels=latent_channels(model))
        return cls(
            token or MaskToken(latent_channels(model)),
            ratios=tuple(arguments.latent_masking_ratios),
            probabilities=tuple(arguments.latent_masking_probabilities),
        )

    def draw(self, shape: tuple[int, ...], randomness: StepRandomness) -> tuple[Tensor, Tensor]:
        """Ratios (B,), and numbers (B, m, m) of the longer side m, by whose order cells are chosen."""
        bounds = torch.tensor(list(accumulate(self.probabilities))[:-1])
        chosen = torch.bucketize(randomness.rand((shape[0],)), bounds, right=True)
        side = max(shape[-2:])
        return torch.tensor(self.ratios)[chosen], randomness.rand((shape[0], side, side))

    def transform(self, raw_latents: Tensor, pixels: Tensor, draw: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        height, width = raw_latents.shape[-2:]
        ratios, order = (drawn.to(raw_latents.device) for drawn in draw)
        ranks = order[:, :height, :width].flatten(1).argsort(1).argsort(1)
        masked = ranks < (ratios[:, None] * height * width).round()
        token = self.token.token.view(1, -1, 1, 1).to(raw_latents.dtype)
        return torch.where(masked.view(-1, 1, height, width), token, raw_latents), pixels

    def components(self) -> dict[str, ModelMixin]:
        return {FOLDER: self.token}
