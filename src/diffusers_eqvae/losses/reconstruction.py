"""Pixel reconstruction and the posterior's KL term.

Both follow one of two reductions. "sum" is the form of latent-diffusion and EQ-VAE: summed over C, H, W and averaged
over the batch, so a target scaled by s weighs s^2. "mean" averages over every element.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from ..autoencoders import Posterior
from ._checks import full_precision, require_equal_shapes

Reduction = Literal["sum", "mean"]
REDUCTIONS = ("sum", "mean")


def reconstruction_loss(
    reconstruction: Tensor, target: Tensor, *, kind: Literal["l1", "l2"] = "l1", reduction: Reduction = "sum"
) -> Tensor:
    """|x - D| ("l1") or (x - D)^2 ("l2") of pixels (EQ-VAE eq. 5, first term), in float32.

    Args:
        reconstruction: (B, C, H, W), nominally in [-1, 1].
        target: the same shape: the transformed image where the latents were transformed.
        kind: "l1" (LDM, EQ-VAE) or "l2".
        reduction: "sum" over C, H, W and mean over B, or "mean" over all elements.

    Returns:
        A scalar.

    Raises:
        ValueError: on unequal shapes, an unknown kind or an unknown reduction.
    """
    require_equal_shapes(reconstruction, target, ("The reconstruction", "its target"))
    if kind not in ("l1", "l2"):
        raise ValueError(f"The reconstruction loss must be 'l1' or 'l2'; got {kind!r}.")
    distance = F.l1_loss if kind == "l1" else F.mse_loss
    mean = distance(full_precision(reconstruction), full_precision(target))
    return mean * _elements(target, reduction)


def kl_loss(posterior: Posterior, reduction: Reduction = "sum") -> Tensor:
    """KL(q(z | x) || N(0, I)), in nats (LDM eq. 25): per image ("sum") or per latent value ("mean").

    It belongs to the posterior of the image that was encoded, never to transformed latents.
    """
    return posterior.kl().mean() * _elements(posterior.mean, reduction) / posterior.mean[0].numel()


def _elements(example: Tensor, reduction: Reduction) -> int:
    """What turns a mean over all elements of a (B, ...) tensor into its reduction: the elements of one image, or 1."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"The reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}.")
    return example[0].numel() if reduction == "sum" else 1
