"""What an inspection finds out about an autoencoder: its metrics, and a verdict in words with the reasons."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..autoencoders import downsampling_factor, is_deterministic, latent_channels, require_fitting
from ..metrics.autoencoder import OFFERS, RECONSTRUCTION_METRICS, measure_autoencoder, reconstruction_card
from ..metrics.base import Measurement, build_metrics
from ..metrics.members.lpips import PerceptualDistance
from ..metrics.result_card import ResultCard
from ..provenance import autoencoder_identity, model_revision

# EQ-VAE (arXiv 2502.09509, v3), equivariance errors of SD-VAE on ImageNet 256 before and after EQ fine-tuning.
PUBLISHED = {
    "equivariance_rotation": {"SD-VAE": 0.89, "EQ-VAE": 0.56},
    "equivariance_scale": {"SD-VAE": 0.69, "EQ-VAE": 0.43},
}
# Metrics of the card's table: key -> what it is, how it is written, which direction is better.
TABLE = {
    "psnr": ("reconstruction, PSNR in dB", ".2f", "higher"),
    "ssim": ("reconstruction, SSIM", ".3f", "higher"),
    "lpips": ("reconstruction, LPIPS", ".3f", "lower"),
    "equivariance_rotation": ("rotation error R", ".3f", "lower"),
    "equivariance_rotation_centred": ("R around the channel means", ".3f", "lower"),
    "equivariance_scale": ("scale error S", ".3f", "lower"),
    "equivariance_scale_centred": ("S around the channel means", ".3f", "lower"),
    "psnr_rotated_latent": ("decoding rotated latents, dB", ".2f", "higher"),
    "gap_rotated": ("... lost by it, dB", ".2f", "lower"),
    "psnr_halved_latent": ("decoding latents x 0.5, dB", ".2f", "higher"),
    "gap_halved": ("... lost by it, dB", ".2f", "lower"),
    "high_frequency": ("share of high frequencies", ".3f", "lower"),
    "intrinsic_dimension": ("intrinsic dimension (TwoNN)", ".1f", "lower"),
    "viv_per_dimension": ("VIV per dimension", ".3f", "lower"),
    "sec": ("energy of fine patterns (SEC)", ".3f", "lower"),
    "lds": ("local similarity (LDS)", ".3f", "higher"),
}
# Own choice, not published: 3 dB is twice the squared error, 1 dB a quarter more of it.
SMALL_GAP_DB, LARGE_GAP_DB = 1.0, 3.0
# A channel that varies by less than this share of the largest standard deviation carries nothing.
DEAD_CHANNEL_SHARE = 0.01
# Below this a reconstruction is poor whatever the latents are: SD-VAE has 25.8 dB on ImageNet 256.
POOR_PSNR_DB = 20.0


@dataclass(frozen=True)
class Verdict:
    """`level` is "good", "mixed" or "poor"; `headline` says it in a sentence; `reasons` with the numbers.

    Example:
        >>> inspect_autoencoder(vae, pixels, name="taesd").verdict.reasons[0]
    """

    level: str
    headline: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """One autoencoder: its name, what it is, what was measured (`figures`: numbers and details) and the verdict.

    Example:
        >>> inspect_autoencoder(vae, pixels, name="taesd").figures["psnr"]
    """

    name: str
    description: dict[str, Any]
    figures: dict[str, Any]
    verdict: Verdict
    measurement: Measurement | None = None


def inspect_autoencoder(
    vae: nn.Module, images: Tensor, *, name: str, perceptual: nn.Module | None = None, batch_size: int = 1
) -> Inspection:
    """Measures `vae` on images (N, 3, S, S) in [-1, 1], one at a time by default, which a CPU does fastest.

    Example:
        >>> inspect_autoencoder(vae, pixels, name="taesd").verdict.level
        'poor'
    """
    factor = downsampling_factor(vae)
    require_fitting(images.shape[-1], factor, smallest=4 * factor)  # encoded at half and a quarter of it too
    start = time.perf_counter()
    names = [name for name in RECONSTRUCTION_METRICS if name not in ("lpips", "rfid")]
    metrics = build_metrics(names, offers=OFFERS) + ([] if perceptual is None else [PerceptualDistance(perceptual)])
    measured = measure_autoencoder(vae, images.split(batch_size), metrics=metrics)
    figures = {"num_images": len(images), **measured.values(), **measured.details}
    description = {
        "class": type(vae).__name__,
        "latent_channels": latent_channels(vae),
        "downsampling_factor": factor,
        "posterior": "point" if is_deterministic(vae) else "Gaussian, measured at its mean",
        "parameters": sum(parameter.numel() for parameter in vae.parameters()),
        "revision": model_revision(vae),
        "autoencoder": autoencoder_identity(vae),
        "seconds": round(time.perf_counter() - start, 2),
    }
    return Inspection(name, description, figures, judge(figures), measured)


def result_card(
    inspection: Inspection, model: str, *, protocol: dict[str, Any], provenance: dict[str, Any]
) -> ResultCard:
    """The numbers as `training/evaluate_autoencoder.py` writes them, for `eqvae compare`.

    Args:
        model: its directory or Hub name.
        protocol: `data_hash` and `resize_rule`.
        provenance: where and when, as `provenance.hardware` says it.

    Example:
        >>> result_card(inspection, "madebyollin/taesd", protocol=protocol, provenance=hardware()).save("card.json")
    """
    measured, described = inspection.measurement, inspection.description
    assert measured is not None
    settings = {"model": model, "model_class": described["class"], "autoencoder": described["autoencoder"]}
    return reconstruction_card(
        measured,
        num_images=inspection.figures["num_images"],
        settings={**settings, "dtype": "float32"},
        provenance={**provenance, "revision": described["revision"]},
        **protocol,
    )


def judge(figures: dict[str, Any]) -> Verdict:
    """What the numbers mean.

    "good": transforming latents instead of images costs at most `SMALL_GAP_DB`; "poor": at least `LARGE_GAP_DB`;
    "mixed": between. Poor reconstructions and dead channels are "poor" whatever the rest, because a collapsed latent
    space is equivariant too. The equivariance errors stand among the reasons beside the published ones of SD-VAE and
    EQ-VAE; they do not decide, because an offset of the latents flatters them.

    Example:
        >>> judge(inspection.figures).level
        'poor'
    """
    gaps = {"rotated": figures["gap_rotated"], "downscaled": figures["gap_halved"]}
    reasons = [
        f"decoding {name} latents is {gap:.1f} dB worse than encoding and decoding {name} images"
        for name, gap in gaps.items()
    ]
    for key, published in PUBLISHED.items():
        values = ", ".join(f"{model} {value}" for model, value in published.items())
        reasons.append(
            f"{key.removeprefix('equivariance_')} error {_written(figures[key])}, around the channel means "
            f"{_written(figures[f'{key}_centred'])} (published on ImageNet 256: {values})"
        )
    if figures["psnr"] < POOR_PSNR_DB:
        reason = f"plain reconstruction has {figures['psnr']:.1f} dB, below {POOR_PSNR_DB:g} dB"
        return Verdict("poor", "The reconstruction is too poor to judge the latents by it.", (reason, *reasons))
    stds = figures["channels"]["std"]
    if dead := [str(index) for index, std in enumerate(stds) if std <= DEAD_CHANNEL_SHARE * max(stds)]:
        reason = f"channels {', '.join(dead)} vary by less than {DEAD_CHANNEL_SHARE:.0%} of the largest"
        return Verdict("poor", "A channel has collapsed.", (reason, *reasons))
    if max(gaps.values()) >= LARGE_GAP_DB:
        return Verdict("poor", "The decoder does not follow transformed latents.", tuple(reasons))
    if max(gaps.values()) > SMALL_GAP_DB:
        return Verdict("mixed", "Transformed latents decode, with a loss.", tuple(reasons))
    return Verdict("good", "Transforming latents transforms the image.", tuple(reasons))


def _written(value: float) -> str:
    """Latents of one position, or of no variance, have no error relative to it."""
    return f"{value:.2f}" if math.isfinite(value) else "undefined"
