"""Latents must stay near those of another, frozen autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autoencoders import Autoencoder, downsampling_factor, encode, latent_channels, load_autoencoder
from ..losses._checks import full_precision
from ..options import Checked
from .base import AutoencoderRegularizer, AutoencoderState, register_regularizer


@dataclass
class LatentAnchorArguments(Checked):
    """Which autoencoder the latents stay near."""

    latent_anchor_autoencoder: str | None = field(
        default=None,
        metadata={
            "reads": True,
            "help": "Autoencoder whose latents are kept: a directory or Hub name, as of the one that is fine-tuned.",
        },
    )
    latent_anchor_weight: float = field(
        default=1.0, metadata={"help": "Weight of the mean square distance.", "range": "[0, inf)"}
    )


@register_regularizer("latent_anchor")
class LatentAnchorRegularizer(AutoencoderRegularizer):
    """mean (mean(x) - mean_anchor(x))^2 between posterior means, the anchor being a frozen autoencoder.

    Own choice throughout. It holds a latent space while something else moves it, so that a generator of the anchor's
    latents needs less adaptation; against a regularizer it is a trade, and a latent space that moved at all is another
    one. The gradient reaches the encoder alone. A step costs one more forward of an encoder, and its memory.

    Args:
        anchor: of the same channels and stride; its decoder is not kept.
        weight: factor of the penalty, in squared raw latents.

    Example:
        >>> anchor = LatentAnchorRegularizer(load_autoencoder("stabilityai/sdxl-vae"))
    """

    Arguments = LatentAnchorArguments
    reaches = frozenset({"encoder"})
    mean_over_elements = True

    def __init__(self, anchor: Autoencoder, weight: float = 1.0) -> None:
        super().__init__()
        anchor.decoder = None
        self.hold(anchor)
        self.weight = weight

    @classmethod
    def from_arguments(cls, arguments: LatentAnchorArguments, model: nn.Module) -> Self:
        if arguments.latent_anchor_autoencoder is None:
            raise ValueError("latent_anchor needs the autoencoder to stay near: set latent_anchor_autoencoder.")
        anchor = load_autoencoder(arguments.latent_anchor_autoencoder)
        ours, theirs = ((latent_channels(vae), downsampling_factor(vae)) for vae in (model, anchor))
        if ours != theirs:
            raise ValueError(
                f"latent_anchor needs latents of one shape: the autoencoder has {ours[0]} channels at stride "
                f"{ours[1]}, {arguments.latent_anchor_autoencoder} has {theirs[0]} at {theirs[1]}."
            )
        return cls(anchor, arguments.latent_anchor_weight)

    def penalty(self, state: AutoencoderState, batch: Mapping[str, Tensor], draw: Any) -> Tensor:
        with torch.no_grad():
            kept = encode(self.frozen_modules()[0], state.pixels).mean
        return F.mse_loss(full_precision(state.posterior.mean), full_precision(kept))
