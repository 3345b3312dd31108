"""What a finished autoencoder run leaves behind: weights, normalisation, its components and the facts about it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import ModelMixin
from torch import nn
from tqdm.auto import tqdm

from ...autoencoders import encode
from ...data.image_datasets import PixelDataset
from ...hub import RunFacts, write_run_facts
from ...latents import LatentNormalization, LatentStatistics
from ...objectives.autoencoder import AutoencoderObjective
from ..arguments import DataArguments
from ..run import TrainingRun
from .arguments import (
    AutoencoderArguments,
    AutoencoderEvaluationArguments,
    AutoencoderLossArguments,
    RegularizerArguments,
)

MEASURED = {
    "psnr": "reconstruction from the posterior mean, dB",
    "equivariance_rotation": "|tau(E(x)) - E(tau(x))|^2 / |E(tau(x))|^2 over 90, 180 and 270 degrees",
    "equivariance_scale": "the same over scales .25, .5 and .75",
    "psnr_rotated_latent": "decoding latents turned by 90 degrees against the turned image, dB",
    "psnr_halved_latent": "decoding latents at half the size against the image at half the size, dB",
}


def autoencoder_facts(
    run: TrainingRun,
    *,
    model: AutoencoderArguments,
    losses: AutoencoderLossArguments,
    regularizing: RegularizerArguments,
    data: DataArguments,
) -> dict[str, Any]:
    """What the arguments say about the run, in `RunFacts`' words."""
    weights = {
        losses.reconstruction_loss: 1.0,
        f"lpips-{losses.perceptual_net}": losses.perceptual_weight,
        "kl": losses.kl_weight,
        f"discriminator ({losses.disc_loss})": losses.disc_weight,
    }
    return {
        "base_model": model.pretrained_model_name_or_path,
        "dataset": data.name,
        "resolution_px": data.resolution,
        "steps": run.step,
        "batch_size": run.global_batch_size,
        "learning_rate": run.arguments.learning_rate,
        "mixed_precision": run.accelerator.mixed_precision,
        "ema_decay": run.arguments.ema_decay if run.arguments.use_ema else None,
        "seed": run.arguments.seed,
        "losses": {name: weight for name, weight in weights.items() if weight},
        "regularizers": {name: regularizing.of(name) for name in regularizing.regularizers if name != "none"},
    }


def measure_normalization(vae: ModelMixin, images: PixelDataset, num_samples: int) -> LatentStatistics:
    """Mean and standard deviation of the raw latents of evenly spaced images, posterior variance included."""
    statistics = LatentStatistics()
    was_training = vae.training
    vae.eval()
    with torch.no_grad():
        batches = list(_batches(len(images), min(num_samples, len(images))))
        for indices in tqdm(batches, desc="latent mean and std", unit="batch"):
            pixels = torch.stack([images[index]["pixel_values"] for index in indices])
            posterior = encode(vae, pixels.to(vae.device))
            statistics.update(posterior.mean, posterior.logvar)
    vae.train(was_training)
    return statistics


def _batches(length: int, count: int, batch_size: int = 8) -> Iterator[list[int]]:
    """`count` evenly spaced indices below `length`, in batches."""
    indices = np.linspace(0, length - 1, count).round().astype(int).tolist()
    for start in range(0, count, batch_size):
        yield indices[start : start + batch_size]


def save_autoencoder(
    directory: Path,
    objective: AutoencoderObjective,
    *,
    discriminator: nn.Module | None,
    images: PixelDataset,
    evaluation: AutoencoderEvaluationArguments,
    facts: Mapping[str, Any],
    figures: Mapping[str, float],
) -> None:
    """Writes the autoencoder in diffusers layout, mean_std.json, the components trained with it and run_facts.json.

    Args:
        objective: its `vae` and what its regularizers keep are written.
        images: training images, on which mean and std of the latents are measured.
        evaluation: how many of them, and whether the config takes the result.
        facts: further fields of `RunFacts`.
        figures: measured values by name.
    """
    vae = objective.vae
    num_samples = None
    if evaluation.normalization != "config":
        statistics = measure_normalization(vae, images, evaluation.num_normalization_images)
        scalar, num_samples = evaluation.normalization == "scalar", statistics.num_samples
        LatentNormalization.from_statistics(statistics, scalar=scalar).apply_to(vae)
    # mean_std.json is always the map in the config, so that whoever reads either normalises alike.
    normalization = LatentNormalization.from_vae(vae)
    vae.save_pretrained(directory)
    normalization.save_json(directory / "mean_std.json", num_samples=num_samples)
    for regularizer in objective.regularizers.values():
        regularizer.save_components(directory)
    if discriminator is not None:
        discriminator.save_pretrained(directory / "discriminator")
    write_run_facts(
        directory / "run_facts.json",
        RunFacts(
            model_class=type(vae).__name__,
            padding_mode=vae.config.get("padding_mode"),
            latent_space_changed=True,
            normalization={
                "mean": normalization.mean and list(normalization.mean),
                "std": normalization.std and list(normalization.std),
                "scaling_factor": normalization.scaling_factor,
                "shift_factor": normalization.shift_factor,
                "num_samples": num_samples,
            },
            figures=[
                {"name": name, "value": value, "how": MEASURED[name]}
                for name, value in figures.items()
                if name in MEASURED
            ],
            versions={"torch": torch.__version__, "diffusers": diffusers.__version__},
            command=f"{sys.argv[0]} {shlex.join(sys.argv[1:])}",
            **facts,
        ),
    )
