"""All figures of an autoencoder: first per image, then over a set, so that batches and processes do not matter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..autoencoders import decode, downsampling_factor, encode, evaluating, is_deterministic, latent_channels
from ..randomness import torch_generator
from .equivariance import equivariance_figures
from .feature_networks import FeatureExtractor
from .image_sets import Collected, Collector, hash_digests, image_digests, require_finite, to_levels
from .latent_statistics import (
    HIGH_FREQUENCY,
    MIN_POINTS,
    channel_statistics,
    high_frequency_share,
    intrinsic_dimension_if_defined,
    radial_power_spectrum,
)
from .reconstruction import psnr, ssim

# What `image_figures` keeps beside its numbers per image.
LATENTS, SPECTRUM = "latents", "spectrum"
# What the figures mean, as a result card states it; changes when the same images would give other numbers.
DEFINITIONS = "1 (PSNR and SSIM clamped to [-1, 1] with range 2; SSIM in a Gaussian window of 11 px, sigma 1.5)"
# What `summarize` gives beside figures.
_DETAILS = ("num_images", "intrinsic_dimension_points", "spectrum", "high_frequency_above", "channels")


@torch.no_grad()
def image_figures(
    vae: nn.Module,
    pixels: Tensor,
    *,
    perceptual: nn.Module | None = None,
    noise: Tensor | None = None,
    reconstructions: Collector | None = None,
) -> dict[str, Tensor]:
    """Figures of every image of (B, 3, H, W) in [-1, 1], on the CPU: name -> (B,), two with more axes.

    Args:
        vae: any diffusers autoencoder; leave it in eval mode.
        perceptual: LPIPS, or whatever maps (reconstruction, pixels) to (B,); its figure is called `lpips`.
        noise: (B, C, h, w): reconstruct the posterior sample mean + std * noise; None reconstructs the mean. All
            figures but psnr, ssim and lpips are of the mean.
        reconstructions: given them as uint8 images, for a Fréchet distance.

    Returns:
        `psnr` in dB, `ssim`, `lpips`, the figures of `equivariance_figures`, `high_frequency`; `spectrum` (B, K) and
        `latents` (B, C, h, w), the raw posterior mean.

    Raises:
        ValueError: a reconstruction with NaN or infinity.
    """
    posterior = encode(vae, pixels)
    latents = posterior.mode()
    decoded = decode(vae, latents if noise is None else posterior.sample(noise))
    require_finite(decoded)
    if reconstructions is not None:
        reconstructions.add(to_levels(decoded))
    reconstruction = decoded.clamp(-1, 1)
    figures = {"psnr": psnr(reconstruction, pixels), "ssim": ssim(reconstruction, pixels)}
    if perceptual is not None:
        figures["lpips"] = perceptual(reconstruction, pixels)
    figures |= equivariance_figures(vae, pixels, latents)
    figures |= {
        "high_frequency": high_frequency_share(latents),
        SPECTRUM: radial_power_spectrum(latents),
        LATENTS: latents,
    }
    return {name: values.float().cpu() for name, values in figures.items()}


def summarize(figures: dict[str, Tensor], *, max_points: int = 10_000) -> dict[str, Any]:
    """Figures of a set of images, from `image_figures` of all of them joined in a fixed order.

    Args:
        figures: name -> (N, ...).
        max_points: the intrinsic dimension is taken of the first so many latents; it costs N^2.

    Returns:
        Means of the figures per image; `gap_rotated` and `gap_halved`, the dB that decoding tau(E(x)) loses against
        decoding E(tau(x)), 0 for an equivariant decoder; `intrinsic_dimension` (None below 10 different
        latents) and `intrinsic_dimension_points`; `spectrum` {frequency in cycles per cell, power}, the power relative
        to its mean so that the scale of the latents does not matter; `channels` {mean, std, kurtosis}; `num_images`.

    Raises:
        ValueError: no images.
    """
    latents, spectrum = figures[LATENTS], figures[SPECTRUM].double().mean(0)
    if not len(latents):
        raise ValueError("An autoencoder needs at least one image to be measured on; got none.")
    summary: dict[str, Any] = {"num_images": len(latents)}
    means = {name: values for name, values in figures.items() if name not in (LATENTS, SPECTRUM)}
    summary |= {name: values.double().mean().item() for name, values in means.items()}
    for name in ("rotated", "halved"):
        summary[f"gap_{name}"] = summary[f"psnr_{name}_pixels"] - summary[f"psnr_{name}_latent"]

    points = latents[:max_points].flatten(1)
    summary["intrinsic_dimension"] = intrinsic_dimension_if_defined(points)
    summary["intrinsic_dimension_points"] = len(points)
    side = min(latents.shape[-2:])
    relative = spectrum / spectrum[1:].mean().clamp_min(torch.finfo(spectrum.dtype).tiny)
    summary["spectrum"] = {
        "frequency": [k / side for k in range(1, len(spectrum))],
        "power": relative[1:].tolist(),
    }
    summary["high_frequency_above"] = HIGH_FREQUENCY
    summary["channels"] = channel_statistics(latents)
    return summary


def split_summary(summary: dict[str, Any]) -> tuple[dict[str, float], dict[str, str], dict[str, Any]]:
    """`summarize` as `metrics`, `marks` and `details` of a result card.

    A figure that is None or not finite is no number and leaves a mark in its place: of latents of 4x4 cells, scaled
    to a quarter, one cell is left, and no error relative to its deviation is defined.
    """
    figures = {name: value for name, value in summary.items() if name not in _DETAILS}
    numbers = {name: value for name, value in figures.items() if value is not None and math.isfinite(value)}
    undefined = f"undefined for fewer than {MIN_POINTS} different latents"
    marks = {
        name: undefined if value is None else f"{value} for these images"
        for name, value in figures.items()
        if name not in numbers
    }
    return numbers, marks, {name: summary[name] for name in _DETAILS}


def measure_autoencoder(
    vae: nn.Module, batches: Iterable[Tensor], *, perceptual: nn.Module | None = None
) -> dict[str, Any]:
    """`summarize` of `image_figures` of all `batches`, each (B, 3, H, W) in [-1, 1], with the posterior mean."""
    with evaluating(vae):
        rows = [image_figures(vae, pixels, perceptual=perceptual) for pixels in batches]
    if not rows:
        raise ValueError("An autoencoder needs at least one image to be measured on; got none.")
    return summarize({name: torch.cat([row[name] for row in rows]) for name in rows[0]})


def image_noise(index: int, seed: int, shape: tuple[int, int, int]) -> Tensor:
    """Standard normal noise that depends on the seed and the image's place in its set alone."""
    return torch.randn(shape, generator=torch_generator(seed, index))


@dataclass
class AutoencoderMeasurement:
    """What a pass over a image set leaves, in the order of the images.

    Attributes:
        figures: as `image_figures` gives them, for all images; `summarize` makes means of them.
        digests: one hash per image.
        images, reconstructions: features of both, where a feature network was given.
    """

    figures: dict[str, Tensor] = field(default_factory=dict)
    digests: list[bytes] = field(default_factory=list)
    images: Collected | None = None
    reconstructions: Collected | None = None

    @property
    def hash(self) -> str:
        """Of all images, pixel by pixel, in order."""
        return hash_digests(self.digests)


class AutoencoderPass:
    """Measures an autoencoder image by image: one reconstruction each serves all figures and both feature sets.

    Args:
        vae: any diffusers autoencoder in eval mode, on the device where it is to run.
        perceptual: as in `image_figures`.
        extractor: network whose features of images and reconstructions are kept, for rFID.
        noise_seed: reconstruct samples of the posterior with noise from this seed; None reconstructs its mean.

    Raises:
        ValueError: `noise_seed` with an autoencoder whose posterior is a point (AutoencoderTiny, VQModel).
    """

    def __init__(
        self,
        vae: nn.Module,
        *,
        perceptual: nn.Module | None = None,
        extractor: FeatureExtractor | None = None,
        noise_seed: int | None = None,
    ) -> None:
        if noise_seed is not None and is_deterministic(vae):
            raise ValueError(
                f"The posterior of {type(vae).__name__} is a point and has no samples; leave --sample_posterior "
                "(noise_seed) out."
            )
        self.vae = vae
        self.perceptual = perceptual
        self.noise_seed = noise_seed
        self.images = None if extractor is None else Collector(extractor)
        self.reconstructions = None if extractor is None else Collector(extractor)
        self._rows: list[dict[str, Tensor]] = []
        self._digests: list[bytes] = []

    def add(self, levels: np.ndarray, *, first_index: int) -> None:
        """Adds images uint8 (B, H, W, 3), the first of which has this index in its set.

        Raises:
            ValueError: a side that is no multiple of the autoencoder's stride, and what `image_figures` refuses.
        """
        device = next(self.vae.parameters()).device
        pixels = torch.from_numpy(np.array(levels, order="C")).permute(0, 3, 1, 2).to(device).contiguous() / 127.5 - 1
        noise = None
        if self.noise_seed is not None:
            factor = downsampling_factor(self.vae)
            shape = (latent_channels(self.vae), pixels.shape[-2] // factor, pixels.shape[-1] // factor)
            indices = range(first_index, first_index + len(pixels))
            noise = torch.stack([image_noise(index, self.noise_seed, shape) for index in indices]).to(device)
        if self.images is not None:
            self.images.add(levels)
        self._digests += image_digests(levels)
        self._rows.append(
            image_figures(
                self.vae, pixels, perceptual=self.perceptual, noise=noise, reconstructions=self.reconstructions
            )
        )

    def join(self, gather: Callable[[list[Any]], list[Any]] = list) -> AutoencoderMeasurement:
        """What all processes have measured, in the order of their ranks; `gather` joins everybody's lists.

        Raises:
            ValueError: no process has measured a image.
        """
        own = []
        if self._rows:
            figures = {name: torch.cat([row[name] for row in self._rows]) for name in self._rows[0]}
            collected = [None if each is None else each.collected() for each in (self.images, self.reconstructions)]
            own = [AutoencoderMeasurement(figures, self._digests, *collected)]
        parts = gather(own)
        if not parts:
            raise ValueError("An autoencoder needs at least one image to be measured on; got none.")

        def joined(name: str) -> Collected | None:
            found = [getattr(part, name) for part in parts if getattr(part, name) is not None]
            return Collected.join(found) if found else None

        return AutoencoderMeasurement(
            {name: torch.cat([part.figures[name] for part in parts]) for name in parts[0].figures},
            [digest for part in parts for digest in part.digests],
            joined("images"),
            joined("reconstructions"),
        )
