"""How close a reconstruction is to its image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses._checks import require_equal_shapes

# Wang et al. 2004: an 11 x 11 Gaussian window of sigma 1.5, K1 = .01, K2 = .03, and the range L of [-1, 1].
SSIM_WINDOW_PX = 11
SSIM_SIGMA_PX = 1.5
DATA_RANGE = 2.0


def psnr(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, 10 log10(4 / MSE): (B,) in dB.

    Args:
        reconstruction: (B, 3, H, W), clamped to [-1, 1] here, as a saved image would be.
        target: (B, 3, H, W) in [-1, 1].

    The data range is the constant 2 of [-1, 1]. Differs from evaluators that estimate the range from each image,
    which flatters images of low contrast.

    Example:
        >>> psnr(vae(pixels).sample, pixels).mean()
    """
    require_equal_shapes(reconstruction, target, ("A reconstruction", "its target"))
    error = (reconstruction.float().clamp(-1, 1) - target.float()).square().flatten(1).mean(1)
    return 10.0 * torch.log10(DATA_RANGE**2 / error.clamp_min(1e-12))


def ssim(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004, eq. 13), its mean over channels and windows: (B,).

        SSIM = (2 m_a m_b + C1) (2 c_ab + C2) / ((m_a^2 + m_b^2 + C1) (v_a + v_b + C2)),  C_i = (K_i L)^2

    with means m, variances v and covariance c under a Gaussian window that lies wholly inside the image, and the
    constant range L = 2. Computed in float64; 1 for equal images.

    Args:
        reconstruction: (B, C, H, W), clamped to [-1, 1] here, as a saved image would be.
        target: (B, C, H, W) in [-1, 1].

    Differs from the reference: the EQ-VAE release lets its library estimate L from each batch, so that the
    figure of an image depends on the images beside it.

    Example:
        >>> ssim(vae(pixels).sample, pixels).mean()
    """
    require_equal_shapes(reconstruction, target, ("A reconstruction", "its target"))
    if target.ndim != 4 or min(target.shape[-2:]) < SSIM_WINDOW_PX:
        raise ValueError(
            f"SSIM compares images (B, C, H, W) of at least {SSIM_WINDOW_PX} px a side; got {tuple(target.shape)}."
        )
    a, b = reconstruction.detach().double().clamp(-1, 1), target.detach().double()
    mean_a, mean_b = _windowed(a), _windowed(b)
    variance_a = _windowed(a * a) - mean_a.square()
    variance_b = _windowed(b * b) - mean_b.square()
    covariance = _windowed(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (luminance * structure).flatten(1).mean(1)


def _windowed(values: Tensor) -> Tensor:
    """Means under the Gaussian window at every place where it fits, (B, C, H - 10, W - 10)."""
    offsets = torch.arange(SSIM_WINDOW_PX, dtype=values.dtype, device=values.device) - SSIM_WINDOW_PX // 2
    weights = torch.exp(-0.5 * (offsets / SSIM_SIGMA_PX).square())
    weights = (weights / weights.sum()).expand(values.shape[1], 1, 1, -1)
    rows = F.conv2d(values, weights, groups=values.shape[1])
    return F.conv2d(rows, weights.transpose(-2, -1), groups=values.shape[1])
