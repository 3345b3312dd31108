"""Draws the images of docs/concepts.md, from the autoencoder that comes with the package and emoji it has not seen.

python docs/draw_concepts.py [FOLDER]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from diffusers_eqvae.autoencoders import Autoencoder, decode, encode, load_autoencoder
from diffusers_eqvae.demo.emoji import SHOWN, write_emoji
from diffusers_eqvae.demo.stages import AUTOENCODER
from diffusers_eqvae.equivariance import Tau, rotation, scaling
from diffusers_eqvae.guidance import from_sigma_edm
from diffusers_eqvae.images import adm_center_crop, latent_pca, to_image, to_pixels, to_rgb
from diffusers_eqvae.inspection.card import pyplot
from diffusers_eqvae.latents import LatentNormalization
from diffusers_eqvae.metrics.reconstruction import psnr

SIDE_PX, STRIDE = 64, 4
LEVELS = (1.0, 0.75, 0.5, 0.25, 0.0)
# Guidance intervals, as noise levels sigma.
INTERVALS = {
    "guidance_interval=(0, .75)": (0.0, 0.75),
    "EDM: .28 to 5.42 (arXiv 2404.07724)": from_sigma_edm((0.28, 5.42)),
}
AXES = {
    "sigma, here (1 = noise)": lambda sigma: f"{sigma:g}",
    "timestep": lambda sigma: f"{1000 * sigma:g}",
    "SiT's time t (1 = data)": lambda sigma: f"{1 - sigma:g}",
    "EDM's sigma": lambda sigma: "inf" if sigma == 1 else f"{sigma / (1 - sigma):.2g}",
    "share of uniform steps done": lambda sigma: f"{1 - sigma:.0%}",
}


def held_out_pixels(count: int | None = None) -> Tensor:
    """Emoji (N, 3, 64, 64) that the autoencoder was not trained on, those of the demo's report first."""
    with tempfile.TemporaryDirectory() as folder:
        files = {path.name: path for path in sorted(write_emoji(Path(folder) / "emoji", held_out=True).rglob("*.png"))}
        paths = [files.pop(name) for name in SHOWN] + list(files.values())
        return torch.stack([to_pixels(adm_center_crop(to_rgb(Image.open(path)), SIDE_PX)) for path in paths[:count]])


def draw_tau(vae: Autoencoder, path: Path) -> None:
    """Image, latent, transformed latent, what is decoded of it, and what it should be."""
    pixels = held_out_pixels(1)
    raw_latents = encode(vae, pixels).mode()
    colours, basis = latent_pca(raw_latents)
    size = (raw_latents.shape[-2], raw_latents.shape[-1])
    taus: dict[str, Tau] = {"a quarter turn": rotation(size, 1), "half the size": scaling(size, 0.5)}
    heads = ("image x", "its latent z", "tau(z)", "tau(z), decoded", "tau(x)")
    figure = pyplot().figure(figsize=(9, 4.1), layout="constrained")
    for row, (name, tau) in zip(figure.subplots(len(taus), len(heads)), taus.items(), strict=True):
        moved, target = tau.apply_to_latents(raw_latents), tau.apply_to_pixels(pixels, STRIDE)
        decoded = decode(vae, moved).clamp(-1, 1)
        for axes, each in zip(row, (pixels, colours, latent_pca(moved, basis)[0], decoded, target), strict=True):
            axes.imshow(to_image(each[0]), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        row[0].set_ylabel(name, fontsize=11)
        row[3].set_xlabel(f"{psnr(decoded, target).item():.1f} dB from tau(x)", fontsize=9)
        if name == next(iter(taus)):
            for axes, head in zip(row, heads, strict=True):
                axes.set_title(head, fontsize=11)
    save(figure, path)


def draw_interval(vae: Autoencoder, path: Path) -> None:
    """Noisy latents, decoded, above the axes on which noise levels are stated, and two guidance intervals."""
    normalization = LatentNormalization.from_vae(vae)
    latents = normalization.normalize(encode(vae, held_out_pixels(1)).mode())
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    figure = pyplot().figure(figsize=(9, 3.9), layout="constrained")
    axes = figure.subplots()
    for sigma in LEVELS:
        noisy = (1 - sigma) * latents + sigma * noise
        image = to_image(decode(vae, normalization.denormalize(noisy)).clamp(-1, 1)[0])
        axes.imshow(image, extent=(sigma + 0.11, sigma - 0.11, 0.9, 3.95), aspect="auto")
    for row, (name, word) in enumerate(AXES.items()):
        axes.text(1.14, -row, name, fontsize=9, ha="right", va="center")
        for sigma in LEVELS:
            axes.text(sigma, -row, word(sigma), fontsize=9, ha="center", va="center")
    for row, (name, (low, high)) in enumerate(INTERVALS.items(), start=len(AXES)):
        axes.barh(-row, high - low, left=low, height=0.55, color=("#0f766e", "#c2410c")[row - len(AXES)], alpha=0.8)
        axes.text(1.14, -row, name, fontsize=9, ha="right", va="center")
    axes.set(xlim=(1.75, -0.13), ylim=(-len(AXES) - len(INTERVALS) + 0.4, 4.2))
    axes.set_axis_off()
    save(figure, path)


def draw_normalization(vae: Autoencoder, path: Path) -> None:
    """Distribution of each channel before and after."""
    raw_latents = encode(vae, held_out_pixels()).mode()
    latents = LatentNormalization.from_vae(vae).normalize(raw_latents)
    figure = pyplot().figure(figsize=(9, 2.6), layout="constrained")
    titles = ("raw latents", "latents: (raw - mean) / std")
    for axes, title, values in zip(figure.subplots(1, 2), titles, (raw_latents, latents), strict=True):
        for channel in range(values.shape[1]):
            numbers = values[:, channel].flatten().numpy()
            label = f"channel {channel}: {numbers.mean():.1f} ± {numbers.std():.1f}"
            axes.hist(numbers, bins=80, histtype="step", density=True, label=label)
        axes.set_title(title, fontsize=11)
        axes.set_yticks([])
        axes.legend(fontsize=8)
    save(figure, path)


def save(figure: object, path: Path) -> None:
    figure.savefig(path, dpi=110, facecolor="white", pil_kwargs={"quality": 85})
    pyplot().close(figure)


@torch.no_grad()
def main(folder: Path) -> None:
    vae = load_autoencoder(str(AUTOENCODER))
    draw_tau(vae, folder / "tau.jpg")
    draw_interval(vae, folder / "noise_levels.jpg")
    draw_normalization(vae, folder / "normalization.jpg")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent / "images")
