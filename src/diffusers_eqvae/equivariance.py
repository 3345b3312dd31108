"""Tau: the scalings and quarter turns of EQ-VAE, drawn once and applied alike to latents and to pixels.

    tau(z) = rot90(resize(z, s), k)                               EQ-VAE, arXiv 2502.09509, section 3

Scale first, then rotate: an anisotropic scaling and a rotation do not commute. Beyond the paper, a window may be cut
out before, and the result mirrored after. A tau carries the latent size it
resizes to, in whole cells, and pixels are resized to exactly `downsampling_factor` times that size, so that what is
decoded from tau(z) always has the size of tau(x).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

T = TypeVar("T")
ScaleMode = Literal["isotropic", "anisotropic", "uniform", "uniform_anisotropic", "discrete", "none"]
Interpolation = Literal["bilinear", "bicubic"]

# What equivariance errors are averaged over (EQ-VAE, table 1): R(90, 180, 270 degrees) and S(.25, .5, .75).
ROTATIONS = (1, 2, 3)
SCALES = (0.25, 0.5, 0.75)
SMALLEST_SCALE = 0.25
SMALLEST_WINDOW = 0.5  # of a side; own choice
# (quarter turns, mirrored) of the symmetries of a square (D4) and of a rectangle, but the identity.
SQUARE = tuple((turns, flip) for flip in (False, True) for turns in range(4) if turns or flip)
RECTANGLE = ((2, False), (0, True), (2, True))


@dataclass(frozen=True)
class Tau:
    """One drawn transform.

    Args:
        latent_size: (h, w) in cells after scaling and before rotating; each >= 1.
        quarter_turns: k of `torch.rot90` on (height, width): 0, 1, 2 or 3 counter-clockwise quarter turns.
        flip: mirror left and right after rotating; with two quarter turns that mirrors top and bottom.
        window: (top, left, height, width) in cells, cut out before scaling; None = everything.
        interpolation: "bilinear" (the released EQ-VAE code) or "bicubic" (the paper's text).
        antialias: low-pass before shrinking; off in the reference.

    Raises:
        ValueError: a size below 1, other quarter turns, or an unknown interpolation.

    Example:
        >>> tau = Tau((16, 16), quarter_turns=1)
        >>> tau.apply_to_latents(torch.zeros(1, 4, 32, 32)).shape
        torch.Size([1, 4, 16, 16])
    """

    latent_size: tuple[int, int]
    quarter_turns: int = 0
    interpolation: Interpolation = "bilinear"
    antialias: bool = False
    flip: bool = False
    window: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        if len(self.latent_size) != 2 or min(self.latent_size) < 1:
            raise ValueError(f"latent_size must be (height, width) of at least one cell each; got {self.latent_size}.")
        if self.quarter_turns not in (0, *ROTATIONS):
            raise ValueError(f"quarter_turns must be 0, 1, 2 or 3; got {self.quarter_turns}.")
        _check_interpolation(self.interpolation)

    def apply_to_latents(self, latents: Tensor) -> Tensor:
        """tau(z): (B, C, H, W) -> (B, C, h, w), or (B, C, w, h) for an odd number of quarter turns."""
        return self.turn(self._resize(self._cut(latents, 1), 1))

    def apply_to_pixels(self, pixels: Tensor, downsampling_factor: int) -> Tensor:
        """tau(x): (B, 3, H*f, W*f) -> (B, 3, h*f, w*f), sides swapped for an odd number of quarter turns."""
        return self.turn(self._resize(self._cut(pixels, downsampling_factor), downsampling_factor))

    def resize_pixels(self, pixels: Tensor, downsampling_factor: int) -> Tensor:
        """The scaling alone, (B, 3, h*f, w*f): the images of a prior-preservation step at low resolution."""
        return self._resize(pixels, downsampling_factor)

    def _resize(self, images: Tensor, cell_px: int) -> Tensor:
        if images.ndim != 4:
            raise ValueError(f"tau works on (B, C, height, width); got a tensor of shape {tuple(images.shape)}.")
        if cell_px < 1:
            raise ValueError(f"downsampling_factor is the pixels per latent cell and must be >= 1; got {cell_px}.")
        size = (self.latent_size[0] * cell_px, self.latent_size[1] * cell_px)
        if size == tuple(images.shape[-2:]):
            return images
        return F.interpolate(images, size=size, mode=self.interpolation, align_corners=False, antialias=self.antialias)

    def turn(self, images: Tensor) -> Tensor:
        """The quarter turns and the mirroring alone, of images (..., H, W)."""
        images = torch.rot90(images, self.quarter_turns, dims=(-2, -1)) if self.quarter_turns else images
        return images.flip(-1) if self.flip else images

    def _cut(self, images: Tensor, cell_px: int) -> Tensor:
        if self.window is None:
            return images
        top, left, height, width = (cell_px * cells for cells in self.window)
        return images[..., top : top + height, left : left + width]


@dataclass(frozen=True)
class TauDistribution:
    """How tau is drawn: every row of EQ-VAE's ablation is one of these.

    Args:
        scale: of a latent side of L cells,
            "isotropic": s = k/L with k uniform on L//4 .. L-1 (both sides alike; L is the shorter side);
            "anisotropic": the same grid, drawn for height and width independently;
            "uniform": s uniform in [1/4, 1), both sides alike, rounded to whole cells and never to all of them;
            "uniform_anisotropic": the same for height and width independently;
            "discrete": s one of 1/4, 1/2, 3/4, both sides alike, rounded in the same way;
            "none": s = 1.
        rotation: k uniform on {1, 2, 3} quarter turns; else 0.
        flip: mirror too: with rotation all seven symmetries of a square (D4) but the identity are as likely, without
            it the three of a rectangle (left-right, top-bottom, both).
        crop: share of taus that first cut out a window, of a side uniform in [1/2, 1) and at a place uniform in whole
            cells; scales are then of the window.
        interpolation, antialias: see `Tau`.

    Differs from the reference: its grid is k/32 whatever the latent side, which for 16 cells makes the decoded
    image and its target differ in size half of the time. For 32 cells the two are the same grid, 8/32 .. 31/32.

    Raises:
        ValueError: an unknown scale mode or interpolation.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> tau = TauDistribution(scale="isotropic").draw((32, 32), generator)
        >>> tau.apply_to_latents(torch.zeros(1, 4, 32, 32)).shape[-1] * 8 == tau.apply_to_pixels(
        ...     torch.zeros(1, 3, 256, 256), 8).shape[-1]
        True
    """

    scale: ScaleMode = "isotropic"
    rotation: bool = True
    interpolation: Interpolation = "bilinear"
    antialias: bool = False
    flip: bool = False
    crop: float = 0.0

    def __post_init__(self) -> None:
        if self.scale not in get_args(ScaleMode):
            raise ValueError(f"scale must be one of {', '.join(get_args(ScaleMode))}; got {self.scale!r}.")
        _check_interpolation(self.interpolation)

    @property
    def turns(self) -> tuple[tuple[int, bool], ...]:
        """(quarter turns, mirrored), one of which is drawn; all are as likely."""
        if self.flip:
            return SQUARE if self.rotation else RECTANGLE
        return tuple((turns, False) for turns in ROTATIONS) if self.rotation else ((0, False),)

    @property
    def is_identity(self) -> bool:
        """Whether every tau leaves everything as it is."""
        return self.scale == "none" and not (self.rotation or self.flip or self.crop)

    @property
    def smallest_scale(self) -> float:
        """Least factor by which a tau shrinks an image."""
        return (1.0 if self.scale == "none" else SMALLEST_SCALE) * (SMALLEST_WINDOW if self.crop else 1.0)

    def draw(self, latent_size: tuple[int, int], generator: torch.Generator) -> Tau:
        """One tau for latents of (H, W) cells; takes three numbers from `generator` in every mode, seven with `crop`.

        Raises:
            ValueError: a side below 2 cells where a scale is to be drawn: there is no smaller size.
        """
        if self.scale != "none" and min(latent_size) < 2:
            raise ValueError(
                f"A scaling needs latents of at least 2 cells a side; got {latent_size}. "
                "Use a higher resolution or scale='none'."
            )
        numbers: dict[str, Any] = {"generator": generator, "device": generator.device, "dtype": torch.float64}
        uniform, window = torch.rand(3, **numbers).tolist(), None
        if self.crop:
            window = self._draw_window(latent_size, torch.rand(4, **numbers).tolist())
            latent_size = latent_size if window is None else window[2:]
        quarter_turns, flip = _pick(self.turns, uniform[2])
        size = self._draw_size(latent_size, uniform[:2])
        return Tau(size, quarter_turns, self.interpolation, self.antialias, flip, window)

    def _draw_window(self, latent_size: tuple[int, int], uniform: list[float]) -> tuple[int, int, int, int] | None:
        """A window of at least two cells a side, or None where this tau cuts nothing out."""
        if uniform[0] >= self.crop or min(latent_size) <= 2:
            return None
        sides = _shrunk(latent_size, SMALLEST_WINDOW + (1.0 - SMALLEST_WINDOW) * uniform[1])
        height, width = max(2, sides[0]), max(2, sides[1])
        top, left = (
            _pick(range(side - cut + 1), u)
            for side, cut, u in zip(latent_size, (height, width), uniform[2:], strict=True)
        )
        return top, left, height, width

    def _draw_size(self, latent_size: tuple[int, int], uniform: list[float]) -> tuple[int, int]:
        height, width = latent_size
        if self.scale == "anisotropic":
            return _pick(_grid(height), uniform[0]), _pick(_grid(width), uniform[1])
        if self.scale == "isotropic":
            shorter = min(height, width)
            return _scaled(latent_size, _pick(_grid(shorter), uniform[0]) / shorter)
        if self.scale in ("uniform", "uniform_anisotropic"):
            scales = [SMALLEST_SCALE + (1.0 - SMALLEST_SCALE) * each for each in uniform]
            across = scales[0] if self.scale == "uniform" else scales[1]
            return _shrunk(latent_size, scales[0])[0], _shrunk(latent_size, across)[1]
        if self.scale == "discrete":
            return _shrunk(latent_size, _pick(SCALES, uniform[0]))
        return height, width


def apply_each(taus: Sequence[Tau], images: Tensor, cell_px: int = 1) -> Tensor:
    """Each image of (B, C, H, W) by its own tau; they cut and scale alike, and turn each in its way.

    Args:
        taus: B of them, of one window and size, all turned to one shape.
        images: latents, or pixels.
        cell_px: pixels of `images` per latent cell; 1 for latents.

    Example:
        >>> apply_each([Tau((4, 4), 1), Tau((4, 4), 2)], torch.zeros(2, 4, 4, 4)).shape
        torch.Size([2, 4, 4, 4])
    """
    resized = taus[0]._resize(taus[0]._cut(images, cell_px), cell_px)
    return torch.stack([tau.turn(image) for tau, image in zip(taus, resized, strict=True)])


def rotation(latent_size: tuple[int, int], quarter_turns: int) -> Tau:
    """R: quarter turns alone, for measuring."""
    return Tau(latent_size, quarter_turns)


def scaling(latent_size: tuple[int, int], scale: float) -> Tau:
    """S: a scaling alone, both sides alike and rounded to whole cells, for measuring; `scale` in (0, 1]."""
    if not 0.0 < scale <= 1.0:
        raise ValueError(f"scale must lie in (0, 1]; got {scale}.")
    return Tau(_scaled(latent_size, scale))


def equivariance_error(
    latents_of_transformed_pixels: Tensor, transformed_latents: Tensor, *, centred: bool = False
) -> Tensor:
    """Relative squared error |tau(E(x)) - E(tau(x))|^2 / |E(tau(x))|^2 per image (EQ-VAE, table 1).

    Args:
        latents_of_transformed_pixels: E(tau(x)), (B, C, h, w).
        transformed_latents: tau(E(x)), (B, C, h, w).
        centred: measure |E(tau(x))|^2 around its mean over space, per image and channel, so that an offset of the
            latents, which enlarges the plain denominator and which every tau leaves in place, does not flatter.

    Returns:
        (B,) in float32 or better, >= 0; 0 = equivariant.

    Raises:
        ValueError: the two differ in shape.
    """
    if latents_of_transformed_pixels.shape != transformed_latents.shape:
        raise ValueError(
            "E(tau(x)) and tau(E(x)) must have one shape; "
            f"got {tuple(latents_of_transformed_pixels.shape)} and {tuple(transformed_latents.shape)}."
        )
    dtype = torch.promote_types(latents_of_transformed_pixels.dtype, torch.float32)
    reference = latents_of_transformed_pixels.to(dtype)
    error = (transformed_latents.to(dtype) - reference).square().flatten(1).sum(1)
    if centred:
        reference = reference - reference.mean(dim=(-2, -1), keepdim=True)
    return error / reference.square().flatten(1).sum(1).clamp_min(torch.finfo(dtype).tiny)


def _grid(side: int) -> range:
    """Sizes L//4 .. L-1 of a side of L cells, never below one cell."""
    return range(max(1, side // 4), side)


def _pick(choices: Sequence[T], uniform: float) -> T:
    """The choice that `uniform` in [0, 1) falls on, all equally likely."""
    return choices[int(uniform * len(choices))]


def _scaled(latent_size: tuple[int, int], scale: float) -> tuple[int, int]:
    return max(1, round(latent_size[0] * scale)), max(1, round(latent_size[1] * scale))


def _shrunk(latent_size: tuple[int, int], scale: float) -> tuple[int, int]:
    """As `_scaled`, where rounding up to the full side would make a scaling below 1 the identity."""
    height, width = _scaled(latent_size, scale)
    return min(height, latent_size[0] - 1), min(width, latent_size[1] - 1)


def _check_interpolation(interpolation: str) -> None:
    if interpolation not in get_args(Interpolation):
        raise ValueError(f"interpolation must be one of {', '.join(get_args(Interpolation))}; got {interpolation!r}.")
