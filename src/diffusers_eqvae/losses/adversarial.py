"""The adversarial game of VQGAN and latent diffusion: two discriminator losses, the generator's, and its weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import full_precision

KINDS = ("hinge", "vanilla")
MAX_WEIGHT = 1e4  # limit of the adaptive weight (VQGAN)


def discriminator_loss(
    logits_real: Tensor, logits_fake: Tensor, kind: Literal["hinge", "vanilla"] = "hinge"
) -> Tensor:
    """What the discriminator minimises, in float32; the two means count half each.

    hinge:   1/2 (mean max(0, 1 - D(real)) + mean max(0, 1 + D(fake)))            (Lim & Ye, arXiv 1705.02894)
    vanilla: 1/2 (mean softplus(-D(real)) + mean softplus(D(fake)))               (Goodfellow et al. 2014, eq. 1)

    Args:
        logits_real: logits of real images, any shape.
        logits_fake: logits of reconstructions, which must be detached from the generator; any shape: an
            equivariance step decodes smaller images, and each mean is over its own patches.
        kind: "hinge" or "vanilla".

    Raises:
        ValueError: on an unknown kind.
    """
    real, fake = full_precision(logits_real), full_precision(logits_fake)
    if kind == "hinge":
        return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
    if kind == "vanilla":
        return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
    raise ValueError(f"The discriminator loss must be one of {', '.join(KINDS)}; got {kind!r}.")


def generator_loss(logits_fake: Tensor) -> Tensor:
    """What the autoencoder minimises in the game, for both kinds: loss = -mean D(fake) (LDM, EQ-VAE)."""
    return -full_precision(logits_fake).mean()


def lecam_penalty(logits_real: Tensor, logits_fake: Tensor, anchors: Tensor) -> Tensor:
    """mean max(0, D(real) - a_fake)^2 + mean max(0, a_real - D(fake))^2, in float32.

    It holds the logits of either kind of image against a moving average of the other's, so that a discriminator that
    begins to know its training images by heart is held back (LeCam; Tseng et al., arXiv 2104.03310, as the authors'
    code google/lecam-gan computes it).

    Args:
        logits_real, logits_fake: any shapes.
        anchors: (2,): the averages a_real and a_fake.
    """
    real, fake = full_precision(logits_real), full_precision(logits_fake)
    return F.relu(real - anchors[1]).square().mean() + F.relu(anchors[0] - fake).square().mean()


def r1_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """mean over images of |d D / d x|^2, where D is the mean of an image's logits; in float32, differentiable.

    R1 (Mescheder et al., arXiv 1801.04406) is gamma / 2 times it, of real images. That D is the mean over patches is
    an own choice: then the penalty of an image does not grow with its size.

    Args:
        logits: (B, ...), computed from `images`, which require gradients.
        images: (B, C, H, W).
    """
    (gradient,) = torch.autograd.grad(logits.flatten(1).mean(1).sum(), images, create_graph=True)
    return full_precision(gradient).square().sum((1, 2, 3)).mean()


def adaptive_weight(
    reference_grads: Tensor | Sequence[Tensor],
    grads: Tensor | Sequence[Tensor],
    *,
    eps: float = 1e-4,
    max_weight: float = MAX_WEIGHT,
) -> Tensor:
    """clamp(|grad reference| / (|grad term| + eps), 0, max_weight): VQGAN eq. 7, gradients at one layer's weight.

    With it a term pulls on that layer as hard as the reference (reconstruction) does. The norms are L2 in float32
    over all tensors given. Under data parallelism average the gradients over ranks first, so that every rank
    multiplies by the same weight.

    Args:
        reference_grads: gradient of the reconstruction loss at the layer, one tensor or several.
        grads: gradient of the term to be weighted, at the same layer.
        eps: guards a vanishing gradient.
        max_weight: upper limit of the weight.

    Returns:
        A detached scalar on the gradients' device; nothing is read back to the host.
    """
    ratio = _norm(reference_grads) / (_norm(grads) + eps)
    return ratio.clamp(0.0, max_weight).detach()


def _norm(grads: Tensor | Sequence[Tensor]) -> Tensor:
    tensors = [grads] if isinstance(grads, Tensor) else list(grads)
    return torch.stack([torch.linalg.vector_norm(full_precision(grad)) for grad in tensors]).norm()
