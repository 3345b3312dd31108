"""Pictures of latents: what becomes of a rotated or shrunken latent, and the latents' principal components."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from .autoencoders import decode, downsampling_factor, encode
from .equivariance import rotation, scaling

CAPTIONS = ("picture", "reconstruction", "latent rotated 90°", "latent halved", "latent PCA")
CAPTION_PX = 16


def to_image(pixels: Tensor) -> Image.Image:
    """A picture of pixels (3, H, W) in [-1, 1], by clamp(127.5 x + 128) truncated to uint8."""
    levels = (pixels.detach().float().cpu() * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


def latent_pca(latents: Tensor, basis: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The first three principal components of latents as colours.

    Args:
        latents: (B, C, h, w).
        basis: (C, 3) from an earlier call, to compare two sets in the same colours; computed when absent.

    Returns:
        Colours (B, 3, h, w) in [-1, 1], scaled to two standard deviations, and the basis (C, 3).
    """
    cells = latents.detach().float().permute(0, 2, 3, 1)
    centred = cells - cells.mean((0, 1, 2), keepdim=True)
    if basis is None:
        flat = centred.flatten(0, 2)
        _, _, components = torch.linalg.svd(flat.T @ flat / len(flat))
        components = components[:3]
        # A component's sign is arbitrary: the largest coefficient is made positive.
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        basis = F.pad((components * largest.sign()).T, (0, 3 - len(components)))
    colours = centred @ basis
    scale = colours.flatten(0, 2).std(0).clamp_min(1e-6)
    return (colours / (2 * scale)).clamp(-1, 1).permute(0, 3, 1, 2), basis


@torch.no_grad()
def comparison_rows(vae: nn.Module, pixels: Tensor) -> list[list[Tensor]]:
    """For each picture of (B, 3, H, W): the five pictures named in `CAPTIONS`, all (3, H, W)."""
    was_training = vae.training
    vae.eval()
    factor = downsampling_factor(vae)
    size = (pixels.shape[-2], pixels.shape[-1])
    latents = encode(vae, pixels).mode()
    cells = (size[0] // factor, size[1] // factor)
    columns = [
        pixels,
        decode(vae, latents),
        decode(vae, rotation(cells, 1).apply_to_latents(latents)),
        decode(vae, scaling(cells, 0.5).apply_to_latents(latents)),
        latent_pca(latents)[0],
    ]
    vae.train(was_training)
    fitted = [c if c.shape[-2:] == size else F.interpolate(c.float(), size, mode="nearest-exact") for c in columns]
    return [list(row) for row in zip(*fitted, strict=True)]


def grid(rows: list[list[Tensor]], captions: tuple[str, ...] = (), *, gap_px: int = 4) -> Image.Image:
    """One picture of rows of equally large pixels (3, H, W), with an optional caption above each column."""
    columns, pictures = len(rows[0]), [to_image(pixels) for row in rows for pixels in row]
    drawn = image_grid(pictures, columns, gap_px=gap_px)
    if not captions:
        return drawn
    canvas = Image.new("RGB", (drawn.width, drawn.height + CAPTION_PX), "white")
    canvas.paste(drawn, (0, CAPTION_PX))
    for column, caption in enumerate(captions):
        ImageDraw.Draw(canvas).text((column * (pictures[0].width + gap_px) + 2, 2), caption, fill="black")
    return canvas


def image_grid(
    images: Sequence[Image.Image | np.ndarray], columns: int | None = None, *, gap_px: int = 2
) -> Image.Image:
    """Equally large pictures (PIL, or uint8 (H, W, 3)) row by row on white; near-square where `columns` is absent."""
    pictures = [Image.fromarray(image) if isinstance(image, np.ndarray) else image for image in images]
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    width, height = (side + gap_px for side in pictures[0].size)
    rows = math.ceil(len(pictures) / columns)
    canvas = Image.new("RGB", (columns * width - gap_px, rows * height - gap_px), "white")
    for position, picture in enumerate(pictures):
        canvas.paste(picture, (position % columns * width, position // columns * height))
    return canvas
