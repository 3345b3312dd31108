"""What is typically wrong with reconstructions, each as one number an image: colour, sharpness, a grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses._checks import require_equal_shapes


def reconstruction_artefacts(reconstruction: Tensor, target: Tensor, cell_px: int) -> dict[str, Tensor]:
    """Signs of three sicknesses, each (B,), of reconstructions (B, C, H, W) clamped to [-1, 1]. Own choice.

        colour_shift = max over channels of |mean(r) - mean(x)|              0 = none; 2 is black for white
        sharpness    = sum |laplace(r)| / sum |laplace(x)|                   1 = as sharp; 0 = blurred away
        grid         = share of the error's variance that its place inside a latent cell explains, less what chance
                       explains: 0 = none; 1 = the same pattern in every cell

    Args:
        reconstruction: nominally in [-1, 1].
        target: the images, the same shape.
        cell_px: pixels of a latent cell along one side, which divide H and W.

    Example:
        >>> reconstruction_artefacts(vae(pixels).sample, pixels, downsampling_factor(vae))["sharpness"].mean()
    """
    require_equal_shapes(reconstruction, target, ("A reconstruction", "its target"))
    image, target = reconstruction.float().clamp(-1, 1), target.float()
    error = image - target
    return {
        "colour_shift": error.mean((-2, -1)).abs().amax(1),
        "sharpness": _detail(image) / _detail(target).clamp_min(1e-6),
        "grid": _grid(error - error.mean((-2, -1), keepdim=True), cell_px),
    }


def _detail(images: Tensor) -> Tensor:
    """Sum of the absolute Laplacian (4-neighbour) of each image."""
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]], device=images.device)
    channels = images.flatten(0, 1).unsqueeze(1)
    return F.conv2d(channels, kernel.view(1, 1, 3, 3)).abs().unflatten(0, images.shape[:2]).flatten(1).sum(1)


def _grid(error: Tensor, cell_px: int) -> Tensor:
    """1 - (1 - R^2) n / (n - 1) of the mean error by place in a cell, with n cells: 0 on average for noise."""
    cells = error.unflatten(-2, (-1, cell_px)).unflatten(-1, (-1, cell_px))
    count = cells.shape[-4] * cells.shape[-2]
    explained = cells.mean((-4, -2)).square().mean((1, 2, 3)) / error.square().flatten(1).mean(1).clamp_min(1e-12)
    return ((explained - 1 / count) / (1 - 1 / count)).clamp_min(0.0) if count > 1 else torch.zeros_like(explained)
