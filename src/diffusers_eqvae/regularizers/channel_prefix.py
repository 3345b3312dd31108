"""The first latent channels alone must decode to the image, as well as they can (DC-AE 1.5, arXiv 2508.00413)."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor, nn

from ..autoencoders import latent_channels
from ..options import Checked
from ..randomness import StepRandomness
from .base import AutoencoderRegularizer, register_regularizer


@dataclass
class ChannelPrefixArguments(Checked):
    """How few channels may be left."""

    channel_prefix_smallest: int = field(
        default=1, metadata={"help": "Least number of latent channels that are kept.", "range": "(0, inf)"}
    )


@register_regularizer("channel_prefix")
class ChannelPrefixRegularizer(AutoencoderRegularizer):
    """Decodes the first k channels, the others 0, with k uniform on smallest .. C for each image.

    The structured latent space of DC-AE 1.5 (arXiv 2508.00413): front channels come to hold the object, later ones its
    detail. For a convolution that reads them, channels at 0 are channels that are not there.

    Own choice: k is drawn per image, and from every number of channels. It costs reconstruction with all channels, and
    most where there are few; with 4 it leaves a quarter of the images one channel.

    Args:
        smallest: least k.

    Example:
        >>> objective = AutoencoderObjective(vae, {"channel_prefix": ChannelPrefixRegularizer(smallest=4)})
    """

    Arguments = ChannelPrefixArguments
    paper = ("DC-AE 1.5", "2508.00413")
    excludes = MappingProxyType(
        {"latent_anchor": "that keeps every channel as it was, and this moves what images need into the first ones"}
    )

    def __init__(self, smallest: int = 1) -> None:
        super().__init__()
        self.smallest = smallest

    @classmethod
    def from_arguments(cls, arguments: ChannelPrefixArguments, model: nn.Module) -> Self:
        channels, smallest = latent_channels(model), arguments.channel_prefix_smallest
        if smallest >= channels:
            raise ValueError(
                f"channel_prefix_smallest must be below the {channels} channels that this autoencoder has, so that "
                f"some are left out; got {smallest}."
            )
        return cls(smallest)

    def draw(self, shape: tuple[int, ...], randomness: StepRandomness) -> Tensor:
        """k of each image, (B,)."""
        choices = shape[1] - self.smallest + 1
        return self.smallest + (choices * randomness.rand((shape[0],))).long().clamp(max=choices - 1)

    def transform(self, raw_latents: Tensor, pixels: Tensor, draw: Tensor) -> tuple[Tensor, Tensor]:
        kept = torch.arange(raw_latents.shape[1]) < draw.cpu()[:, None]
        return raw_latents * kept[:, :, None, None].to(raw_latents), pixels
