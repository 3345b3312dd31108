"""What a finished autoencoder run leaves behind: weights, normalisation, its components and metadata."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from ...autoencoders import autoencoder_location, encode, evaluating, load_autoencoder
from ...data.image_datasets import PixelDataset
from ...data.image_streams import PixelStream
from ...images import CAPTIONS
from ...inspection.compatibility import NotComparable, compatibility
from ...latents import LatentNormalization, LatentStatistics
from ...model_card import METADATA_FILE, RunMetadata, stated_license
from ...randomness import preserved_global_state
from ...regularizers.base import REGULARIZERS
from ...stated_normalization import scale_complaint
from ...tokens import has_codebook
from ..card import how_it_was_made, settings_of
from ..console import progress_bar
from ..lora import LORA, fused, save_adapter
from ..next_steps import NEXT
from ..run import TrainingRun
from ..tracking import drawn_images, figures_at
from .arguments import AutoencoderArguments, AutoencoderEvaluationArguments, AutoencoderOptions
from .trainable import WHOLE

logger = logging.getLogger(__name__)

NORMALIZATION_BATCH = 8
NOT_COMPARED = "It could not be measured when the run ended; eqvae compat NEW BASE --data_dir IMAGES does it."
CHECKED_IMAGES = 16  # where nothing is measured but whether the config is right
MEASURED = {
    "psnr": "reconstruction from the posterior mean, dB",
    "equivariance_rotation": "|tau(E(x)) - E(tau(x))|^2 / |E(tau(x))|^2 over 90, 180 and 270 degrees",
    "equivariance_scale": "the same over scales .25, .5 and .75",
    "psnr_rotated_latent": "decoding latents rotated by 90 degrees against the rotated image, dB",
    "psnr_halved_latent": "decoding latents at half the size against the image at half the size, dB",
}


def training_metadata(run: TrainingRun, given: AutoencoderOptions) -> dict[str, Any]:
    """The settings of the run that its card shows."""
    model, losses, methods = given.model, given.losses, given.methods
    weights = {
        losses.reconstruction_loss: 1.0,
        f"lpips-{losses.lpips_net}": losses.perceptual_weight,
        "kl": losses.kl_weight,
        f"discriminator ({losses.disc_loss})": losses.disc_weight,
    }
    chosen = [name for name in given.regularizing.regularizers if name != "none"]
    return {
        **settings_of(run),
        **({} if given.data.aspect_buckets is None else {"aspect_buckets": given.data.aspect_buckets}),
        **({} if model.trainable == [WHOLE] else {"trainable": " ".join(model.trainable)}),
        **({} if model.latent_channels is None else {"latent_channels": model.latent_channels}),
        **({"lora": {"rank": given.lora.lora_rank, "alpha": given.lora.alpha}} if LORA in model.trainable else {}),
        "losses": {name: weight for name, weight in weights.items() if weight},
        "regularizers": {name: vars(methods[name]) if name in methods else {} for name in chosen},
    }


def evaluation_metadata(run: TrainingRun, figures: Mapping[str, float], given: AutoencoderOptions) -> dict[str, Any]:
    """The last validation, beside the figures that were measured before the first step where any were, and drawn.

    Images of a local folder are private: a card shows them only where its owner says so.
    """
    before = {key.removeprefix("validation/"): value for key, value in figures_at(run.output_dir, 0).items()}
    metrics = [
        {"name": key, "value": figures[key], "how": how} | ({"before": before[key]} if key in before else {})
        for key, how in MEASURED.items()
        if key in figures
    ]
    private = given.evaluation.validation_data_dir is not None or given.data.is_local
    shown: dict[str, Any] = {"caption": ", ".join(CAPTIONS), "private": private}
    return {"metrics": metrics, "images": drawn_images(run.output_dir, run.step, "comparison", **shown)}


def measure_normalization(vae: ModelMixin, images: PixelDataset | PixelStream, num_samples: int) -> LatentStatistics:
    """Mean and standard deviation of the raw latents of images all over the data, posterior variance included."""
    statistics, pixels_of = LatentStatistics(), images.evenly(num_samples)
    batches = iter(lambda: list(islice(pixels_of, NORMALIZATION_BATCH)), [])
    most = num_samples if isinstance(images, PixelStream) else min(num_samples, len(images))
    shown: dict[str, Any] = {"desc": "latent mean and std", "unit": "batch", "total": -(-most // NORMALIZATION_BATCH)}
    with evaluating(vae), torch.no_grad():
        for batch in progress_bar(batches, **shown):
            pixels = torch.stack(batch)
            posterior = encode(vae, pixels.to(vae.device))
            statistics.update(posterior.mean, posterior.logvar)
    return statistics


def settle_normalization(
    vae: ModelMixin,
    images: PixelDataset | PixelStream,
    evaluation: AutoencoderEvaluationArguments,
    *,
    pretrained: bool,
    latents_kept: bool = False,
) -> int | None:
    """Writes what --normalization means into the config; on how many images it was measured, or None."""
    chosen, came = evaluation.normalization, LatentNormalization.from_vae(vae)
    if chosen is None:
        chosen = "config" if latents_kept or (pretrained and came.mean is None) else "channel"
        logger.info("--normalization %s: unset, and decided by what the autoencoder came with.", chosen)
    if chosen == "config" and has_codebook(vae):
        return None  # tokens need none
    count = CHECKED_IMAGES if chosen == "config" else evaluation.num_normalization_images
    statistics = measure_normalization(vae, images, count)
    if chosen == "config":
        if complaint := scale_complaint(came, statistics):
            logger.warning("%s --normalization channel or scalar writes what is measured.", complaint)
        return None
    normalization = LatentNormalization.from_statistics(statistics, scalar=chosen == "scalar")
    normalization.apply_to(vae)
    if note := normalization.unread(vae):
        logger.warning("%s; for those use --normalization config%s.", note, "" if chosen == "scalar" else " or scalar")
    return statistics.num_samples


def compared_with_base(vae: ModelMixin, model: AutoencoderArguments, held_out: Tensor) -> dict[str, Any]:
    """What `eqvae compat` finds of the trained autoencoder and the one it was fine-tuned from, and the next step.

    Where the two cannot be compared, "refused" says why.
    """
    name = model.pretrained_model_name_or_path
    assert name is not None
    found: dict[str, Any] = {"num_images": len(held_out), "resolution_px": held_out.shape[-1]}
    with preserved_global_state(), evaluating(vae):
        try:
            location = autoencoder_location(name, subfolder=model.subfolder, revision=model.revision)
            base = load_autoencoder(name, **location).to(vae.device)
            compared = compatibility(vae, base, held_out.to(vae.device))
        except (ValueError, OSError, RuntimeError) as error:  # gone meanwhile, or no memory: that costs no run
            logger.warning("Not compared with %s: %s", name, error)
            # Of other errors the words may hold folders of this machine, and the card is published.
            return {**found, "refused": str(error) if isinstance(error, NotComparable) else NOT_COMPARED}
    fits = {"per_channel": compared.per_channel, "one_by_one": compared.one_by_one}
    return {
        **found,
        "verdict": compared.verdict,
        "next": NEXT[compared.verdict],
        "relative_distance": compared.distance,
        "left_by_fit": {name: fit.residual for name, fit in fits.items()},
        "psnr": compared.psnr,
    }


def save_autoencoder(
    directory: Path,
    run: TrainingRun,
    given: AutoencoderOptions,
    *,
    latents_kept: bool,
    discriminator: nn.Module | None,
    images: PixelDataset | PixelStream,
    held_out: Tensor,
    figures: Mapping[str, float],
) -> None:
    """Writes the autoencoder in diffusers layout, mean_std.json, the components trained with it and run_metadata.json.

    Adapters are fused into it, and written beside it.

    Args:
        run: the averages of its objective's model and components are written.
        latents_kept: whether the encoder was left as it was.
        images: training images, on which mean and std of the latents are measured.
        held_out: validation images (N, 3, S, S), on which it is compared with what it was fine-tuned from.
        figures: of the last validation.
    """
    objective, base, data = run.averaged("objective"), given.model.pretrained_model_name_or_path, given.data
    training, provenance = training_metadata(run, given), how_it_was_made()
    vae: Any = objective.model
    if LORA in given.model.trainable:
        save_adapter(vae, directory / LORA, base=base)
        vae = fused(vae)
    known = base is not None and given.model.latent_channels is None
    num_samples = settle_normalization(vae, images, given.evaluation, pretrained=known, latents_kept=latents_kept)
    # mean_std.json is always the map in the config, so that whoever reads either normalises alike.
    normalization = LatentNormalization.from_vae(vae)
    vae.save_pretrained(directory)
    normalization.save_json(directory / "mean_std.json", num_samples=num_samples)
    for folder, component in objective.components().items():
        component.save_pretrained(directory / folder)
    if discriminator is not None:
        discriminator.save_pretrained(directory / "discriminator")
    papers = [REGULARIZERS[name].paper for name in training["regularizers"]]
    RunMetadata(
        model={
            "class": type(vae).__name__,
            "base_model": base,
            "base_license": stated_license(base, given.model.revision) if base else None,
            "measured_compatibility": compared_with_base(vae, given.model, held_out) if base else None,
            "padding_mode": vae.config.get("padding_mode"),
            "latent_space_changed": not latents_kept,
            "compatibility": "drop-in" if latents_kept else None,
            "papers": [{"name": paper[0], "arxiv": paper[1]} for paper in papers if paper is not None],
            "normalization": {
                "mean": normalization.mean and list(normalization.mean),
                "std": normalization.std and list(normalization.std),
                "scaling_factor": normalization.scaling_factor,
                "shift_factor": normalization.shift_factor,
                "num_samples": num_samples,
                "unread": normalization.unread(vae),
            },
        },
        training=training,
        data={
            "dataset": data.name,
            "resolution_px": data.resolution,
            **({} if images.buckets is None else {"shapes": str(images.buckets)}),
            **({"stream": images.identity} if isinstance(images, PixelStream) else {}),
            "report": images.source.report.to_json(),
        },
        evaluation=evaluation_metadata(run, figures, given),
        provenance=provenance,
    ).save(directory / METADATA_FILE)
