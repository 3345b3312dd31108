"""A tiny latent store with its autoencoder, for trajectories and scripts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import ModelMixin

from diffusers_eqvae.autoencoders import downsampling_factor, is_deterministic, latent_channels
from diffusers_eqvae.data.latent_format import StoreSettings
from diffusers_eqvae.data.latent_writer import LatentStoreWriter
from diffusers_eqvae.provenance import autoencoder_identity
from diffusers_eqvae.tokens import codebook, has_codebook

CLASS_NAMES = {0: "cat", 1: "dog", 2: "otter"}


def write_store(path: Path, vae: ModelMixin, *, num_examples: int = 48, side: int = 4, labelled: bool = True) -> Path:
    """Random moments, or tokens of a VQ model, with labels 0..2 in two shards, and the autoencoder beside them."""
    channels = latent_channels(vae) * (1 if is_deterministic(vae) else 2)
    size = len(codebook(vae)) if has_codebook(vae) else None
    kind = "tokens" if size else "latents" if is_deterministic(vae) else "moments"
    settings = StoreSettings(
        num_examples=num_examples,
        shape=(side, side) if size else (channels, side, side),
        dtype="uint16" if size else "float32",
        views=2,
        kind=kind,
        codebook_size=size,
        shard_size=num_examples // 2,
        batch_size=8,
        resolution=side * downsampling_factor(vae),
        downsampling_factor=downsampling_factor(vae),
        labelled=labelled,
        encoder=autoencoder_identity(vae)["encoder"]["float32"],
        source={"dataset": "animals"},
    )
    writer = LatentStoreWriter(path, settings)
    generator = torch.Generator().manual_seed(0)
    for shard in range(settings.num_shards):
        count = len(settings.examples(shard))
        shape = (count, 2, *settings.shape)
        moments = torch.randn(shape, generator=generator)
        if size:
            moments = torch.randint(size, shape, generator=generator).to(torch.uint16)
        labels = torch.from_numpy(np.arange(count) % len(CLASS_NAMES)) if labelled else None
        writer.write_shard(shard, moments, labels=labels)
    writer.finish(autoencoder=autoencoder_identity(vae), id2label=CLASS_NAMES if labelled else None)
    vae.save_pretrained(path / "vae")
    return path
