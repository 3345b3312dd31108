"""PIL images, pixels in [-1, 1] and uint8: conversions, crops, grids, and images of latents."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageDraw
from torch import Tensor, nn

from .autoencoders import decode, encode, evaluating, image_channels, takes_any_size, uncompiled
from .equivariance import rotation, scaling

logger = logging.getLogger(__name__)

CAPTIONS = ("image", "reconstruction", "latent rotated 90°", "latent downscaled", "latent PCA")
CAPTION_PX = 16
UINT8_RULE = "clamp(127.5 x + 128), truncated"
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # PIL's, by the channels that an ordinary image is read with


class Bands:
    """An image of any number of channels, with those of PIL's operations that crops are made of.

    Args:
        bands: equally large PIL images of one channel each: "L" (0 to 255), or "F" in [-1, 1].

    Example:
        >>> adm_center_crop(Bands([Image.new("L", (40, 60))] * 5), 32).size
        (32, 32)
    """

    def __init__(self, bands: Sequence[Image.Image]) -> None:
        self.bands = tuple(bands)
        self.size = self.bands[0].size
        self.width, self.height = self.size

    def resize(self, *arguments: Any, **options: Any) -> Bands:
        return Bands([band.resize(*arguments, **options) for band in self.bands])

    def crop(self, box: tuple[int, int, int, int]) -> Bands:
        return Bands([band.crop(box) for band in self.bands])

    def transpose(self, method: Image.Transpose) -> Bands:
        return Bands([band.transpose(method) for band in self.bands])


AnyImage: TypeAlias = Image.Image | Bands


def evenly_spaced(length: int, count: int) -> list[int]:
    """Up to `count` different indices below `length`, ends included.

    Example:
        >>> evenly_spaced(10, 4), evenly_spaced(2, 4)
        ([0, 3, 6, 9], [0, 1])
    """
    return np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()


def require_channels(vae: nn.Module, *channels: int) -> int:
    """How many channels the autoencoder's images have; refused where it is none of these, if any are given.

    Example:
        >>> source = load_image_dataset(train_data_dir="scans", channels=require_channels(vae))
    """
    own = image_channels(vae)
    if channels and own not in channels:
        said = " or ".join(f"{count} ({MODES[count]})" if count in MODES else str(count) for count in channels)
        raise ValueError(
            f"Images have {said} channels here, and this {type(uncompiled(vae)).__name__} takes {own}; use another "
            "autoencoder."
        )
    return own


def to_image(pixels: Tensor) -> Image.Image:
    """A PIL image of finite pixels (C, H, W) in [-1, 1], by `to_uint8`: e.g. `to_image(pixels[0]).save("x.png")`.

    As RGB: one channel is grey, of two the first is shown, and of more than three the first three.
    """
    shown = pixels.detach().cpu()[: 3 if len(pixels) > 2 else 1]
    return Image.fromarray(to_uint8(shown.expand(3, -1, -1)).permute(1, 2, 0).numpy())


def latent_pca(latents: Tensor, basis: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The first three principal components of latents as colours.

    Args:
        latents: (B, C, h, w).
        basis: (C, 3) from an earlier call, to compare two sets in the same colours; computed when absent.

    Returns:
        Colours (B, 3, h, w) in [-1, 1], scaled to two standard deviations, and the basis (C, 3).
    """
    require_finite(latents, whose=f"The encoder, in {latents.dtype},")
    positions = latents.detach().float().permute(0, 2, 3, 1)
    centred = positions - positions.mean((0, 1, 2), keepdim=True)
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
    """For each image of pixels (B, C, H, W): the five images named in `CAPTIONS`, (C, H, W) but for the colours.

    Grey stands for a downscaled latent where the autoencoder takes none (AutoencoderRAE).

    Example:
        >>> grid(comparison_rows(vae, pixels), CAPTIONS).save("comparison.png")
    """
    size = (pixels.shape[-2], pixels.shape[-1])
    with evaluating(vae):
        raw_latents = encode(vae, pixels).mode()
        latent_size = (raw_latents.shape[-2], raw_latents.shape[-1])
        columns = [
            pixels,
            decode(vae, raw_latents),
            decode(vae, rotation(latent_size, 1).apply_to_latents(raw_latents)),
            decode(vae, scaling(latent_size, 0.5).apply_to_latents(raw_latents))
            if takes_any_size(vae)
            else torch.zeros_like(pixels),
            latent_pca(raw_latents)[0],
        ]
    fitted = [c if c.shape[-2:] == size else F.interpolate(c.float(), size, mode="nearest-exact") for c in columns]
    return [list(row) for row in zip(*fitted, strict=True)]


def grid(rows: list[list[Tensor]], captions: tuple[str, ...] = (), *, gap_px: int = 4) -> Image.Image:
    """One image of rows of equally large pixels (C, H, W), with an optional caption above each column."""
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


# EXIF's orientation -> what turns such an image upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def orientation(image: Image.Image) -> int:
    """EXIF's number, 1 = upright; metadata that cannot be read say nothing, and that is logged."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception as error:  # a broken field raises nearly anything
        name = getattr(image, "filename", "") or "an image"
        logger.warning("The orientation of %s cannot be read (%s); it is taken as it lies.", name, error)
        return 1


def upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation says it is to be seen: `upright(Image.open("0001.jpg"))`."""
    image.load()  # TIFF images turn upright then, and forget their orientation
    turn = _UPRIGHT.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height as `upright` gives them, of the header: `upright_size(Image.open("0001.jpg"))`.

    What a PNG says of its orientation behind its pixels is not seen.
    """
    stated = image.format != "PNG" or "exif" in image.info  # else the search for it would decode all pixels
    turned = stated and image.format != "TIFF" and orientation(image) >= 5  # a TIFF's size is that of upright pixels
    return image.size[::-1] if turned else image.size


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB, rotated upright by its EXIF orientation: `to_rgb(Image.open("0001.jpg"))`.

    Transparency is laid over white, 16-bit grey values are divided by 257 and rounded, CMYK, palette, grey and YCbCr
    are converted.

    Raises:
        ValueError: floating-point images and integer ones beyond 16 bits, whose range is unknown.
    """
    image = upright(image)
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"integer values {values.min()}..{values.max()} do not fit 16 bits")
        return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point values have no known range; save the image with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """As `to_rgb`, in one channel (its luma) or three; in four with its transparency, opaque where it has none.

    Example:
        >>> to_channels(Image.open("scan.png"), 1).mode
        'L'
    """
    if channels == 4 and image.has_transparency_data:
        return upright(image).convert("RGBA")
    return to_rgb(image).convert(MODES[channels])


def adm_center_crop(image: AnyImage, size: int | tuple[int, int]) -> AnyImage:
    """The centre square of (size, size) pixels as ADM (Dhariwal & Nichol 2021) prepares ImageNet.

    While the short side is at least twice `size` the image is downscaled by 2 with a box filter; then it is resized
    (bicubic) so that the short side is `size`, and the middle is cut out. Of a rectangle (height, width), whatever is
    said of a side holds of both: the image is resized to cover it.

    Example:
        >>> pixels = to_pixels(adm_center_crop(to_rgb(Image.open("0001.jpg")), 256))
    """
    height, width = (size, size) if isinstance(size, int) else size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def random_crop_resize(
    image: AnyImage,
    size: int | tuple[int, int],
    rng: np.random.Generator,
    min_fraction: float = 0.5,
    max_fraction: float = 1.0,
) -> AnyImage:
    """A random square of `min_fraction`..`max_fraction` of the short side, resized (bicubic) to (size, size).

    The fraction and the place are uniform; this is the training crop of latent diffusion and EQ-VAE. Of a rectangle
    (height, width), the fraction is of the largest one of its form that the image holds.

    Raises:
        ValueError: fractions that do not satisfy 0 < min <= max <= 1.
    """
    if not 0 < min_fraction <= max_fraction <= 1:
        raise ValueError(f"Crop fractions must satisfy 0 < min <= max <= 1; got {min_fraction} and {max_fraction}.")
    height, width = (size, size) if isinstance(size, int) else size
    # The narrower of the two: as wide as the image, or as high.
    largest = min((image.width, image.width * height / width), (image.height * width / height, image.height))
    fraction = rng.uniform(min_fraction, max_fraction)
    across, down = (max(1, round(side * fraction)) for side in largest)
    left = int(rng.integers(0, image.width - across + 1))
    top = int(rng.integers(0, image.height - down + 1))
    return image.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, left + across, top + down))


def augmented(
    image: AnyImage,
    size: int | tuple[int, int],
    generator: np.random.Generator | None,
    *,
    random_crop: bool,
    random_flip: bool,
) -> tuple[AnyImage, bool]:
    """A square of `size` px of an image, or a rectangle, and whether it is mirrored; ADM's crop without a generator.

    Example:
        >>> augmented(image, 256, None, random_crop=True, random_flip=True)[1]
        False
    """
    if generator is not None and random_crop:
        image = random_crop_resize(image, size, generator)
    else:
        image = adm_center_crop(image, size)
    mirrored = generator is not None and random_flip and bool(generator.random() < 0.5)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image, mirrored


def to_pixels(image: AnyImage, channels: int = 3) -> Tensor:
    """Pixels (C, H, W) float32 in [-1, 1]: x / 127.5 - 1, of one channel (grey), three, or four (with alpha).

    `Bands` keep their channels; floating-point values, which a bicubic filter may carry beyond, are clamped.
    """
    if isinstance(image, Bands):
        planes = [torch.from_numpy(np.array(band, dtype=np.float32)) for band in image.bands]
        return torch.stack(
            [
                plane.clamp(-1, 1) if band.mode == "F" else plane / 127.5 - 1
                for plane, band in zip(planes, image.bands, strict=True)
            ]
        )
    values = np.array(image.convert(MODES[channels])).reshape(image.height, image.width, channels)
    images_uint8 = torch.from_numpy(values).permute(2, 0, 1)
    return images_uint8.to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1


def to_uint8(pixels: Tensor) -> Tensor:
    """Of pixels in [-1, 1], in the same shape, by `UINT8_RULE`; the inverse of `to_pixels` on its range.

    Raises:
        ValueError: NaN or infinity, which would be black or white pixels.

    Example:
        >>> to_uint8(torch.tensor([-1.0, 0.0, 0.99, 3.0])).tolist()
        [0, 128, 254, 255]
    """
    require_finite(pixels, whose=f"What made these pixels, in {pixels.dtype},")
    return (pixels.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def to_array(image: AnyImage) -> np.ndarray:
    """uint8 (H, W, C) of an image; floating-point values by `UINT8_RULE`.

    Example:
        >>> to_array(Image.new("L", (8, 6))).shape
        (6, 8, 1)
    """
    if isinstance(image, Bands):
        return to_uint8(to_pixels(image)).permute(1, 2, 0).contiguous().numpy()
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def require_finite(values: Tensor, *, whose: str) -> None:
    """Refuses NaN and infinity, which an image would hide.

    Args:
        whose: what gave the values, and in which dtype, for the message.

    Example:
        >>> require_finite(pixels, whose=f"The autoencoder in {vae.dtype}")
    """
    if not values.isfinite().all():
        raise ValueError(
            f"{whose} gave NaN or infinity; use float32 or bfloat16 where it was float16, which overflows in some "
            "autoencoders, else check its weights."
        )
