"""What a discriminator may see instead of the images: DiffAugment (Zhao et al., arXiv 2006.10738).

The transforms and their ranges are those of the authors' published code (mit-han-lab/data-efficient-gans).
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

KINDS = ("color", "translation", "cutout")
NUM_UNIFORMS = 7  # brightness, saturation, contrast; two of the translation, two of the cutout


def augment(images: Tensor, uniforms: Tensor, kinds: Collection[str]) -> Tensor:
    """Transforms each image by its own numbers, differentiably; in the order colour, translation, cutout.

        color        x + (u_0 - 1/2); then 2 u_1 times the distance to the mean over channels; then (u_2 + 1/2) times
                     the distance to the mean of the image
        translation  by whole pixels, uniform in [-floor(side / 8), floor(side / 8)] each way; 0 comes in
        cutout       a rectangle of half the height and width is 0; its centre is anywhere in the image

    Args:
        images: (B, C, H, W); the ranges are made for pixels in [-1, 1].
        uniforms: (B, 7) in [0, 1); the numbers of transforms that are not chosen are not read.
        kinds: of "color", "translation" and "cutout"; without any the images come back as they are.

    Example:
        >>> seen = augment(pixels, torch.rand(len(pixels), 7), ("color", "translation", "cutout"))
    """
    if "color" in kinds:
        brightness, saturation, contrast = (uniforms[:, i].view(-1, 1, 1, 1).to(images) for i in range(3))
        images = images + (brightness - 0.5)
        images = _from_mean(images, 2 * saturation, (1,))
        images = _from_mean(images, contrast + 0.5, (1, 2, 3))
    sides = images.shape[-2:]
    if "translation" in kinds:
        for dim, side in ((2, sides[0]), (3, sides[1])):
            images = _shifted(images, _whole(uniforms[:, dim + 1], 2 * (side // 8) + 1) - side // 8, dim)
    if "cutout" in kinds:
        inside = [
            _near(_whole(uniforms[:, dim + 3], side + 1 - (side // 2) % 2), side)
            for dim, side in ((2, sides[0]), (3, sides[1]))
        ]
        images = images * ~(inside[0][:, None, :, None] & inside[1][:, None, None, :])
    return images


def _from_mean(images: Tensor, factor: Tensor, dims: tuple[int, ...]) -> Tensor:
    mean = images.mean(dims, keepdim=True)
    return (images - mean) * factor + mean


def _whole(uniforms: Tensor, count: int) -> Tensor:
    """Numbers of 0 .. count - 1, as (B,) integers."""
    return (uniforms * count).long().clamp(max=count - 1)


def _shifted(images: Tensor, shift: Tensor, dim: int) -> Tensor:
    """Row i of an image becomes its row i + shift, 0 where there is none."""
    side = images.shape[dim]
    places = torch.arange(side, device=images.device) + shift.to(images.device)[:, None]
    shape = [len(images), 1, 1, 1]
    shape[dim] = side
    index = places.clamp(0, side - 1).view(shape).expand_as(images)
    return images.gather(dim, index) * ((places >= 0) & (places < side)).view(shape)


def _near(centre: Tensor, side: int) -> Tensor:
    """(B, side): whether a place lies in the half of a side around a centre."""
    first = centre[:, None] - (side // 2) // 2
    places = torch.arange(side, device=centre.device)
    return (places >= first) & (places < first + side // 2)
