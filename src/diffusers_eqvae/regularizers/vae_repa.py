"""VAE-REPA (SRA 2, arXiv 2601.17830): hidden states align with the frozen autoencoder's own encoder features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn

from ..data.image_features import ENCODER
from ..data.latent_format import FeatureSettings, feature_tensor
from ..models.backbone import Backbone
from ..models.feature_projector import FeatureProjector
from ..options import Checked
from ._hidden_alignment import HiddenAlignment, require_grid
from .base import register_regularizer

FOLDER = "vae_repa_projector"


@dataclass
class VAEREPAArguments(Checked):
    """Where the encoder's features are met, and how they are compared.

    Example:
        >>> VAEREPARegularizer.from_arguments(VAEREPAArguments(), transformer, features=latents.features)
    """

    vae_repa_weight: float = field(default=0.5, metadata={"help": "Weight of the alignment.", "range": "[0, inf)"})
    vae_repa_layer: int = field(
        default=8, metadata={"help": "Block, counted from 1, after which features are predicted.", "range": "(0, inf)"}
    )
    vae_repa_projector_size: int = field(
        default=2048, metadata={"help": "Width of the mlp on the hidden states.", "range": "(0, inf)"}
    )
    vae_repa_beta: float = field(
        default=0.05, metadata={"help": "Error at which smooth-L1 turns from square to absolute.", "range": "(0, inf)"}
    )
    vae_repa_stop_at: int | None = field(
        default=None,
        metadata={"help": "Optimizer step from which on the alignment is off; unset, never.", "range": "[0, inf)"},
    )


@register_regularizer("vae_repa")
class VAEREPARegularizer(HiddenAlignment):
    """Smooth-L1 between projector(hidden states after block n) and the features that the VAE's encoder ends with.

    These are the input of its last convolution, averaged to the grid of tokens: no network beside the two that are
    there, so it trains offline. They are taken as the images are encoded, or read from a store that holds them.
    Gradients reach the projector and the blocks up to n.

    Own choice: the weight, the block, and the projector, which is REPA's.

    Args:
        projector: trained along.
        grid: tokens along height and width.
        layer, weight, stop_at, beta: see `VAEREPAArguments`.

    Example:
        >>> projector = FeatureProjector(hidden_size=768, feature_size=512)
        >>> VAEREPARegularizer(projector, grid=transformer.token_grid)
    """

    Arguments = VAEREPAArguments
    features = (ENCODER,)

    def __init__(
        self,
        projector: FeatureProjector,
        *,
        grid: tuple[int, int],
        layer: int = 8,
        weight: float = 0.5,
        stop_at: int | None = None,
        beta: float = 0.05,
    ) -> None:
        super().__init__(projector, grid, layer=layer, weight=weight, stop_at=stop_at, folder=FOLDER)
        self.beta = beta

    @classmethod
    def from_arguments(
        cls, arguments: VAEREPAArguments, model: nn.Module, *, features: Mapping[str, FeatureSettings] | None = None
    ) -> Self:
        assert isinstance(model, Backbone) and features is not None
        require_grid(ENCODER, features[ENCODER], model.token_grid, averaged=True)
        projector = FeatureProjector(
            hidden_size=model.hidden_size,
            feature_size=features[ENCODER].shape[0],
            projector_size=arguments.vae_repa_projector_size,
        )
        return cls(
            projector,
            grid=model.token_grid,
            layer=arguments.vae_repa_layer,
            weight=arguments.vae_repa_weight,
            stop_at=arguments.vae_repa_stop_at,
            beta=arguments.vae_repa_beta,
        )

    def target(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch[feature_tensor(ENCODER)]

    def compare(self, predicted: Tensor, target: Tensor) -> Tensor:
        return F.smooth_l1_loss(predicted, target, beta=self.beta)
