"""Stored latents with the images that they were encoded from: what a decoder is trained on without its encoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..provenance import require_same_data
from .image_datasets import ImageSource, PixelDataset
from .latent_store import LatentStore


class StoredImages(Dataset):
    """{"moments": (c, h, w) of a store, "pixel_values": (3, S, S) of the same image, crop and side}.

    Args:
        store: of posteriors.
        source: the images that it was encoded from, in their order.
        random_flip: draw either view where a generator is given; the store must hold both.

    Raises:
        ValueError: a store of tokens; other images (as far as `provenance.data_identity` tells); no mirrored view.

    Example:
        >>> StoredImages(LatentStore("latents/images", vae=vae), source)[0]["moments"].shape
        torch.Size([8, 32, 32])
    """

    def __init__(self, store: LatentStore, source: ImageSource, *, random_flip: bool = False) -> None:
        if store.settings.is_tokens:
            raise ValueError(f"The store {store.path} holds tokens; a decoder is trained on posteriors.")
        whose, remedy = f"the store {store.path}", "give the images that it was encoded from, or encode these"
        require_same_data({**store.settings.source, "images": len(store)}, source.identity, whose=whose, remedy=remedy)
        if random_flip and store.settings.views < 2:
            raise ValueError(f"The store {store.path} holds no mirrored views; encode it with them, or do not flip.")
        self.store, self.random_flip = store, random_flip
        self.images = PixelDataset(source, resolution=store.settings.resolution)  # the centre crops of a store

    @property
    def identity(self) -> dict[str, Any]:
        """Of the store."""
        return self.store.identity

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.get(index)

    def get(self, index: int, generator: np.random.Generator | None = None) -> dict[str, Any]:
        """The example at `index`, of a view drawn from `generator`."""
        mirrored = generator is not None and self.random_flip and generator.random() < 0.5
        pixels = self.images[index]["pixel_values"]
        return {
            "moments": self.store.get_many([index], view=int(mirrored))["moments"][0],
            "pixel_values": torch.flip(pixels, [-1]) if mirrored else pixels,
        }
