"""All figures of an autoencoder: first per picture, then over a set, so that batches and processes do not matter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..autoencoders import decode, encode
from .equivariance import equivariance_figures
from .intrinsic_dimension import MIN_POINTS, intrinsic_dimension
from .reconstruction import psnr, ssim
from .spectrum import HIGH_FREQUENCY, high_frequency_share, radial_power_spectrum
from .statistics import channel_statistics

# What `picture_figures` keeps beside its numbers per picture.
LATENTS, SPECTRUM = "latents", "spectrum"


@torch.no_grad()
def picture_figures(
    vae: nn.Module, pixels: Tensor, *, perceptual: nn.Module | None = None, noise: Tensor | None = None
) -> dict[str, Tensor]:
    """Figures of every picture of (B, 3, H, W) in [-1, 1], on the CPU: name -> (B,), two with more axes.

    Args:
        vae: any diffusers autoencoder; leave it in eval mode.
        perceptual: LPIPS, or whatever maps (reconstruction, pixels) to (B,); its figure is called `lpips`.
        noise: (B, C, h, w): reconstruct the posterior sample mean + std * noise; None reconstructs the mean. All
            figures but psnr, ssim and lpips are of the mean.

    Returns:
        `psnr` in dB, `ssim`, `lpips`, the figures of `equivariance_figures`, `high_frequency`; `spectrum` (B, K) and
        `latents` (B, C, h, w), the raw posterior mean.
    """
    posterior = encode(vae, pixels)
    latents = posterior.mode()
    reconstruction = decode(vae, latents if noise is None else posterior.sample(noise)).clamp(-1, 1)
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
    """Figures of a set of pictures, from `picture_figures` of all of them joined in a fixed order.

    Args:
        figures: name -> (N, ...).
        max_points: the intrinsic dimension is taken of the first so many latents; it costs N^2.

    Returns:
        Means of the figures per picture; `gap_rotated` and `gap_halved`, the dB that decoding tau(E(x)) loses against
        decoding E(tau(x)), 0 for an equivariant decoder; `intrinsic_dimension` (None below 10 pictures) and
        `intrinsic_dimension_points`; `spectrum` {frequency in cycles per cell, power}, the power relative to its mean
        so that the scale of the latents does not matter; `channels` {mean, std, kurtosis}; `num_images`.

    Raises:
        ValueError: no pictures.
    """
    latents, spectrum = figures[LATENTS], figures[SPECTRUM].double().mean(0)
    if not len(latents):
        raise ValueError("An autoencoder needs at least one picture to be measured on; got none.")
    summary: dict[str, Any] = {"num_images": len(latents)}
    means = {name: values for name, values in figures.items() if name not in (LATENTS, SPECTRUM)}
    summary |= {name: values.double().mean().item() for name, values in means.items()}
    for name in ("rotated", "halved"):
        summary[f"gap_{name}"] = summary[f"psnr_{name}_pixels"] - summary[f"psnr_{name}_latent"]

    points = latents[:max_points].flatten(1)
    summary["intrinsic_dimension"] = intrinsic_dimension(points) if len(points) >= MIN_POINTS else None
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


def measure_autoencoder(
    vae: nn.Module, batches: Iterable[Tensor], *, perceptual: nn.Module | None = None
) -> dict[str, Any]:
    """`summarize` of `picture_figures` of all `batches`, each (B, 3, H, W) in [-1, 1], with the posterior mean."""
    was_training = vae.training
    vae.eval()
    rows = [picture_figures(vae, pixels, perceptual=perceptual) for pixels in batches]
    vae.train(was_training)
    if not rows:
        raise ValueError("An autoencoder needs at least one picture to be measured on; got none.")
    return summarize({name: torch.cat([row[name] for row in rows]) for name in rows[0]})
