"""What REPA and VAE-REPA share: hidden states after one block must predict features of the clean image."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from diffusers import ModelMixin
from torch import Tensor

from ..data.latent_format import FeatureSettings
from ..models.feature_projector import FeatureProjector
from ..randomness import StepRandomness
from .base import GeneratorRegularizer, GeneratorState


class HiddenAlignment(GeneratorRegularizer):
    """A projector after block `layer` whose output is compared with features brought to the grid of tokens.

    Args:
        projector: trained along with the transformer.
        grid: tokens along height and width.
        layer: block, counted from 1, whose hidden states are read.
        weight: factor of the penalty.
        stop_at: optimizer step from which on it is off (HASTE, arXiv 2505.16792); None = never.
        folder: that the projector is saved in.
    """

    def __init__(
        self,
        projector: FeatureProjector,
        grid: tuple[int, int],
        *,
        layer: int,
        weight: float,
        stop_at: int | None,
        folder: str,
    ) -> None:
        super().__init__()
        self.projector = projector.train()
        self.grid, self.hidden_layers = grid, (layer,)
        self.weight, self.stop_at, self.folder = weight, stop_at, folder

    @abstractmethod
    def target(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Features (B, F, h, w) of the clean images, on any grid."""

    @abstractmethod
    def compare(self, predicted: Tensor, target: Tensor) -> Tensor:
        """The loss of features (B, F, h, w) on the grid of tokens, float32."""

    def draw(self, shape: tuple[int, ...], randomness: StepRandomness) -> Any:
        return None if self.stop_at is not None and randomness.step >= self.stop_at else ()

    def penalty(self, state: GeneratorState, batch: Mapping[str, Tensor], draw: Any) -> Tensor:
        predicted = self.projector(state.hidden_states[self.hidden_layers[0]], grid=self.grid)
        target = F.adaptive_avg_pool2d(self.target(batch).float(), self.grid)
        return self.compare(predicted.float(), target)

    def components(self) -> dict[str, ModelMixin]:
        return {self.folder: self.projector}


def require_grid(name: str, features: FeatureSettings, grid: tuple[int, int], *, averaged: bool = False) -> None:
    """Refuses stored features over another grid than the tokens', of which they may be a multiple where `averaged`."""
    own = features.shape[-2:]
    if own != grid and not (averaged and not (own[0] % grid[0] or own[1] % grid[1])):
        raise ValueError(
            f"The features {name} are stored over a grid of {own[0]}x{own[1]}, and this transformer has "
            f"{grid[0]}x{grid[1]} tokens; store them over {'a multiple of that' if averaged else 'that'} grid, or "
            "train a model of another patch size."
        )
