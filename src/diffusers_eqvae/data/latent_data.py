"""Training data of a generator: posteriors with labels, from a store or from images encoded on the way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from torch import Tensor

from ..autoencoders import Posterior, downsampling_factor, encode
from .image_datasets import PixelDataset
from .latent_store import LatentStore


@dataclass
class LatentData:
    """Training data of a transformer: posteriors with labels, and the autoencoder that they belong to.

    Args:
        dataset: a `LatentStore` ("moments") or a `PixelDataset` ("pixel_values"), both with "class_labels".
        vae: float32 and frozen.
        id2label: class names; empty where there are none.
        latent_shape: (C, h, w).
        name: of the data, for the model card.

    Example:
        >>> raw_latents = latents.posterior(batch).sample(noise)
    """

    dataset: LatentStore | PixelDataset
    vae: ModelMixin
    num_classes: int
    id2label: dict[int, str]
    latent_shape: tuple[int, int, int]
    name: str | None

    @property
    def resolution_px(self) -> int:
        """Shorter side of the images behind the latents."""
        return min(self.latent_shape[1:]) * downsampling_factor(self.vae)

    @property
    def stored(self) -> bool:
        return isinstance(self.dataset, LatentStore)

    @torch.no_grad()
    def posterior(self, batch: dict[str, Tensor]) -> Posterior:
        """Of a batch on the device, in float32: read from the store, or encoded now."""
        if isinstance(self.dataset, LatentStore):
            return self.dataset.posterior(batch["moments"].float())
        return encode(self.vae, batch["pixel_values"])
