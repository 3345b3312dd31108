"""Images of latents: what becomes of a rotated or shrunken latent, and the latents' principal components."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn

from .autoencoders import decode, downsampling_factor, encode
from .equivariance import rotation, scaling

CAPTIONS = ("image", "reconstruction", "latent rotated 90°", "latent halved", "latent PCA")
CAPTION_PX = 16
# What `to_uint8` does, as result cards state it.
UINT8_RULE = "clamp(127.5 x + 128), truncated"


def to_image(pixels: Tensor) -> Image.Image:
    """A image of pixels (3, H, W) in [-1, 1], by clamp(127.5 x + 128) truncated to uint8."""
    return Image.fromarray(to_uint8(pixels.detach().cpu()).permute(1, 2, 0).numpy())


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
    """For each image of (B, 3, H, W): the five images named in `CAPTIONS`, all (3, H, W)."""
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
    """One image of rows of equally large pixels (3, H, W), with an optional caption above each column."""
    columns, images = len(rows[0]), [to_image(pixels) for row in rows for pixels in row]
    drawn = image_grid(images, columns, gap_px=gap_px)
    if not captions:
        return drawn
    canvas = Image.new("RGB", (drawn.width, drawn.height + CAPTION_PX), "white")
    canvas.paste(drawn, (0, CAPTION_PX))
    for column, caption in enumerate(captions):
        ImageDraw.Draw(canvas).text((column * (images[0].width + gap_px) + 2, 2), caption, fill="black")
    return canvas


def image_grid(
    images: Sequence[Image.Image | np.ndarray], columns: int | None = None, *, gap_px: int = 2
) -> Image.Image:
    """Equally large images (PIL, or uint8 (H, W, 3)) row by row on white; near-square where `columns` is absent."""
    tiles = [Image.fromarray(image) if isinstance(image, np.ndarray) else image for image in images]
    columns = columns or math.ceil(math.sqrt(len(tiles)))
    width, height = (side + gap_px for side in tiles[0].size)
    rows = math.ceil(len(tiles) / columns)
    canvas = Image.new("RGB", (columns * width - gap_px, rows * height - gap_px), "white")
    for position, tile in enumerate(tiles):
        canvas.paste(tile, (position % columns * width, position // columns * height))
    return canvas


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image as 8-bit RGB, turned upright by its EXIF orientation.

    Transparency is laid over white, 16-bit grey levels are divided by 257 and rounded, CMYK, palette, grey and YCbCr
    are converted.

    Raises:
        ValueError: floating-point images and integer ones beyond 16 bits, whose range is unknown.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"integer levels {levels.min()}..{levels.max()} do not fit 16 bits")
        return Image.fromarray(np.round(levels / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point levels have no known range; save the image with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def adm_center_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre square of (size, size) pixels as ADM (Dhariwal & Nichol 2021) prepares ImageNet.

    While the short side is at least twice `size` the image is halved with a box filter; then it is resized
    (bicubic) so that the short side is `size`, and the middle is cut out.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop_resize(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    min_fraction: float = 0.5,
    max_fraction: float = 1.0,
) -> Image.Image:
    """A random square of `min_fraction`..`max_fraction` of the short side, resized (bicubic) to (size, size).

    The fraction and the place are uniform; this is the training crop of latent diffusion and EQ-VAE.

    Raises:
        ValueError: fractions that do not satisfy 0 < min <= max <= 1.
    """
    if not 0 < min_fraction <= max_fraction <= 1:
        raise ValueError(f"Crop fractions must satisfy 0 < min <= max <= 1; got {min_fraction} and {max_fraction}.")
    short = min(image.size)
    side = max(1, round(short * rng.uniform(min_fraction, max_fraction)))
    left = int(rng.integers(0, image.width - side + 1))
    top = int(rng.integers(0, image.height - side + 1))
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def to_pixels(image: Image.Image) -> Tensor:
    """Pixels (3, H, W) float32 in [-1, 1]: x / 127.5 - 1."""
    levels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    return levels.to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1


def to_uint8(pixels: Tensor) -> Tensor:
    """Samples of the same shape, uint8: clamp(127.5 x + 128) truncated, the inverse of `to_pixels` on its range."""
    return (pixels.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)
