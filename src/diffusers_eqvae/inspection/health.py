"""What an inspection finds out about an autoencoder: its metrics, and what they say of several properties."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..autoencoders import downsampling_factor, is_deterministic, latent_channels, require_fitting
from ..images import require_channels
from ..metrics.autoencoder import OFFERS, RECONSTRUCTION_METRICS, measure_autoencoder, reconstruction_card
from ..metrics.base import Measurement, build_metrics
from ..metrics.members.lpips import PerceptualDistance
from ..metrics.result_card import ResultCard
from ..provenance import autoencoder_identity

# EQ-VAE (arXiv 2502.09509), equivariance errors of SD-VAE on ImageNet 256 before and after EQ fine-tuning: the paper's
# first and third version state others.
PUBLISHED = {
    "equivariance_rotation": {"v1": {"SD-VAE": 0.93, "EQ-VAE": 0.49}, "v3": {"SD-VAE": 0.89, "EQ-VAE": 0.56}},
    "equivariance_scale": {"v1": {"SD-VAE": 0.80, "EQ-VAE": 0.15}, "v3": {"SD-VAE": 0.69, "EQ-VAE": 0.43}},
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
    "lnc": ("class of nearest cells (LNC)", ".3f", "higher"),
    "srss": ("similarity inside objects (SRSS)", ".3f", "higher"),
}
# Own choice, not published: 3 dB is twice the squared error, 1 dB a quarter more of it.
SMALL_GAP_DB, LARGE_GAP_DB = 1.0, 3.0
LIMITS_REST_ON, FIRM_FROM = 4, 20  # tokenizers that these limits were looked at on (docs/inspect.md), and should be
# A channel that varies by less than this share of the largest standard deviation carries nothing.
DEAD_CHANNEL_SHARE = 0.01
# Below this a reconstruction is poor whatever the latents are: SD-VAE has 25.8 dB on ImageNet 256.
POOR_PSNR_DB = 20.0


@dataclass(frozen=True)
class Finding:
    """One property of an autoencoder's latents: what was found, what that means, and the numbers it rests on.

    Attributes:
        level: "good", "mixed" or "poor" by the limits that `evidence` ends with; None where there are no limits.

    Example:
        >>> inspect_autoencoder(vae, pixels, name="taesd").findings[1].says
        'the decoder does not follow transformed latents'
    """

    name: str
    says: str
    meaning: str
    evidence: tuple[str, ...]
    level: str | None = None


@dataclass(frozen=True)
class Inspection:
    """One autoencoder: its name, what it is, what was measured (`figures`: numbers and details), and findings.

    Example:
        >>> inspect_autoencoder(vae, pixels, name="taesd").figures["psnr"]
    """

    name: str
    description: dict[str, Any]
    figures: dict[str, Any]
    findings: tuple[Finding, ...]
    measurement: Measurement | None = None


def inspect_autoencoder(
    vae: nn.Module,
    images: Tensor,
    *,
    name: str,
    perceptual: nn.Module | None = None,
    annotations: Mapping[str, Tensor] | None = None,
    batch_size: int = 1,
    progress: Callable[[Sequence[Tensor]], Iterable[Tensor]] = iter,
) -> Inspection:
    """Measures `vae` on images (N, C, S, S) in [-1, 1], one at a time by default, which a CPU does fastest.

    Args:
        annotations: "labels" and "masks" of the images, as `measure_autoencoder` takes them.
        progress: what hands the batches on and may say how far it is, such as `tqdm`.

    Example:
        >>> [finding.name for finding in inspect_autoencoder(vae, pixels, name="taesd").findings]
        ['reconstruction', 'equivariance', 'diffusability', 'channels']
    """
    factor = downsampling_factor(vae)
    require_channels(vae, images.shape[1])
    require_fitting(images.shape[-1], vae, smallest=4 * factor)  # encoded at half and a quarter of it too
    start = time.perf_counter()
    names = [name for name in RECONSTRUCTION_METRICS if name not in ("lpips", "rfid")]
    metrics = build_metrics(names, offers=OFFERS) + ([] if perceptual is None else [PerceptualDistance(perceptual)])
    measured = measure_autoencoder(vae, progress(images.split(batch_size)), metrics=metrics, annotations=annotations)
    figures = {"num_images": len(images), **measured.values(), **measured.details}
    description = {
        "class": type(vae).__name__,
        "latent_channels": latent_channels(vae),
        "downsampling_factor": factor,
        "posterior": "point" if is_deterministic(vae) else "Gaussian, measured at its mean",
        "parameters": sum(parameter.numel() for parameter in vae.parameters()),
        "autoencoder": autoencoder_identity(vae),
        "seconds": round(time.perf_counter() - start, 2),
    }
    parts = {**measured.card_parts(), "protocol": measured.protocol}
    return Inspection(name, description, figures, findings(figures, parts), measured)


def result_card(
    inspection: Inspection, model: str, *, protocol: dict[str, Any], provenance: dict[str, Any]
) -> ResultCard:
    """The numbers as `training/evaluate_autoencoder.py` writes them, for `eqvae compare`.

    Args:
        model: its directory or Hub name.
        protocol: `data_hash` and `resize_rule`.
        provenance: where and when, as `provenance.hardware` says it, and `hub_commit`.

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
        provenance=provenance,
        **protocol,
    )


def findings(figures: Mapping[str, Any], parts: Mapping[str, Any]) -> tuple[Finding, ...]:
    """What the numbers say of four properties, each by itself; no word sums them up.

    Which of them make a generator's samples better is an open question: in the widest study (arXiv 2606.03578)
    equivariance goes least with it of seven properties, and VIV most. Limits are our own choice and say how many
    tokenizers they were looked at on.

    Args:
        figures: values and details.
        parts: `errors` and `caveats` by name, of `Measurement.card_parts`, and its `protocol`.

    Example:
        >>> findings(inspection.figures, inspection.measurement.card_parts())[0].name
        'reconstruction'
    """
    stated = _Stated(figures, *(parts.get(each, {}) for each in ("errors", "caveats", "protocol")))
    return _reconstruction(stated), _equivariance(stated), _diffusability(stated), _channels(stated)


@dataclass(frozen=True)
class _Stated:
    """Figures as text with their standard errors."""

    figures: Mapping[str, Any]
    errors: Mapping[str, float]
    caveats: Mapping[str, str]
    protocol: Mapping[str, Any]

    def __call__(self, name: str, form: str = ".2f") -> str:
        value = self.figures.get(name, math.nan)
        if not math.isfinite(value):
            return "undefined"
        error = f" +- {self.errors[name]:{form}}" if name in self.errors else ""
        return f"{value:{form}}{error}"


def _rest_on(limits: str) -> str:
    """What a limit rests on, which every finding with a level ends with."""
    provisional = ", provisional" if LIMITS_REST_ON < FIRM_FROM else ""
    return f"{limits}: own choice, looked at on {LIMITS_REST_ON} tokenizers{provisional}"


def _reconstruction(stated: _Stated) -> Finding:
    evidence = [f"PSNR {stated('psnr')} dB, SSIM {stated('ssim', '.3f')}"]
    evidence += [f"LPIPS {stated('lpips', '.3f')}"] if "lpips" in stated.figures else []
    evidence.append(_rest_on(f"limit {POOR_PSNR_DB:g} dB"))
    poor = stated.figures["psnr"] < POOR_PSNR_DB
    says = f"plain reconstruction has {stated('psnr')} dB"
    says += f", below {POOR_PSNR_DB:g} dB: too poor to judge the latents by what is decoded" if poor else ""
    meaning = "No generator's samples get better than this."
    return Finding("reconstruction", says, meaning, tuple(evidence), "poor" if poor else None)


def _equivariance(stated: _Stated) -> Finding:
    gaps = {"rotated": "gap_rotated", "halved": "gap_halved"}
    evidence = [f"decoding {how} latents loses {stated(name, '.1f')} dB" for how, name in gaps.items()]
    for key, published in PUBLISHED.items():
        values = "; ".join(
            f"{where}: {', '.join(f'{model} {value}' for model, value in each.items())}"
            for where, each in published.items()
        )
        evidence.append(
            f"{key.removeprefix('equivariance_')} error {stated(key)}, around the channel means "
            f"{stated(f'{key}_centred')} (published on ImageNet 256, {values})"
        )
    evidence.append(_rest_on(f"limits {SMALL_GAP_DB:g} and {LARGE_GAP_DB:g} dB"))
    worst = max(stated.figures[name] for name in gaps.values())
    level: str | None = "mixed"
    says = "transformed latents decode, with a loss"
    if worst >= LARGE_GAP_DB:
        level, says = "poor", "the decoder does not follow transformed latents"
    elif worst <= SMALL_GAP_DB:
        level, says = "good", "transforming latents transforms the image"
    if stated.figures["psnr"] < POOR_PSNR_DB:
        level, says = None, "says nothing beside so poor a reconstruction"
    meaning = "Where it fails, latents hold structure that means nothing for the image. Alone it predicts little."
    return Finding("equivariance", says, meaning, tuple(evidence), level)


def _diffusability(stated: _Stated) -> Finding:
    viv = stated("viv_per_dimension", ".3f")
    says = f"VIV {viv} a dimension" if viv != "undefined" else "VIV is undefined for so few images"
    evidence = [
        f"SEC {stated('sec', '.3f')} (white noise .5), LDS {stated('lds', '.3f')} (white noise 0)",
        f"share of high frequencies {stated('high_frequency', '.3f')}, white noise .80",
        *([f"VIV over {stated.protocol['viv.groups']}"] if "viv.groups" in stated.protocol else []),
        *([f"LNC {stated('lnc', '.3f')}: cells whose nearest are of its class"] if "lnc" in stated.figures else []),
        *([f"SRSS {stated('srss', '.3f')}: within objects less across"] if "srss" in stated.figures else []),
        *([stated.caveats["viv"]] if "viv" in stated.caveats else []),
        "no limits: nobody has measured at how many of these a generator does well",
    ]
    meaning = "The part of a generator's loss that no training removes, were classes Gaussian: pi/2 is white noise."
    return Finding("diffusability", says, meaning, tuple(evidence))


def _channels(stated: _Stated) -> Finding:
    stds = stated.figures["channels"]["std"]
    dead = [str(index) for index, std in enumerate(stds) if std <= DEAD_CHANNEL_SHARE * max(stds)]
    says = f"channels {', '.join(dead)} have collapsed" if dead else f"all {len(stds)} channels carry something"
    evidence = f"standard deviations {min(stds):.3g} to {max(stds):.3g}"
    limit = _rest_on(f"collapsed is below {DEAD_CHANNEL_SHARE:.0%} of the largest")
    meaning = "A collapsed latent space is equivariant too."
    return Finding("channels", says, meaning, (evidence, limit), "poor" if dead else "good")
