"""What a generator of latents minimises. Targets come from `flow` and `diffusion`; this file only compares."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..diffusion import DiffusionChain
from ._checks import full_precision, require_equal_shapes

BIN = 1 / 255  # half the width of a grey level in [-1, 1]


def flow_matching_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean square of prediction - target per sample, (B,), in float32 (SiT, arXiv 2401.08740, eq. 6).

    Kept per sample so that the caller may weight or bin it by noise level; its mean over the batch is the objective.

    Args:
        prediction: (B, C, h, w), the transformer's output without a learned variance.
        target: the same shape, for example `flow.velocity_target`.

    Raises:
        ValueError: on unequal shapes.
    """
    require_equal_shapes(prediction, target, ("The prediction (without learned variance)", "its target"))
    return (full_precision(prediction) - full_precision(target)).square().flatten(1).mean(1)


def variational_bound(
    chain: DiffusionChain, noise: Tensor, variance: Tensor, *, clean: Tensor, noisy: Tensor, steps: Tensor
) -> Tensor:
    """One term of the variational bound per sample, (B,), in bits per dimension (DDPM, eq. 5; Improved DDPM, eq. 15).

        t > 0:  KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))
        t = 0:  -log p(x_0 | x_1), the Gaussian's mass in a bin of 1/255 to each side of x_0

    It trains the variance alone: `noise` is detached here, as Improved DDPM does for its hybrid loss (section 3).

    Args:
        chain: whose posteriors are compared.
        noise: predicted noise (B, C, h, w).
        variance: the output (B, C, h, w) that `DiffusionChain.learned_log_variance` takes.
        clean, noisy: x_0 and x_t.
        steps: t, (B,) integers.

    Differs from the reference: nothing; it applies the likelihood of 8-bit images to latents too, and so does DiT.

    Example:
        >>> bound = variational_bound(chain, noise, variance, clean=latents, noisy=noisy, steps=steps).mean()
    """
    require_equal_shapes(noise, variance, ("The predicted noise", "the learned variance"))
    noise, variance = full_precision(noise).detach(), full_precision(variance)
    mean, log_variance = chain.posterior(clean, noisy, steps)
    predicted, _ = chain.posterior(chain.clean_from_noise(noise, noisy, steps), noisy, steps)
    predicted_log_variance = chain.learned_log_variance(variance, steps)
    divergence = 0.5 * (
        predicted_log_variance
        - log_variance
        - 1
        + (log_variance - predicted_log_variance).exp()
        + (mean - predicted).square() * (-predicted_log_variance).exp()
    )
    likelihood = _binned_log_likelihood(clean, predicted, 0.5 * predicted_log_variance)
    first = (steps == 0).view(-1, *[1] * (clean.ndim - 1))
    return torch.where(first, -likelihood, divergence).flatten(1).mean(1) / math.log(2)


def _binned_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log of the mass that N(mean, std) has in [x - 1/255, x + 1/255]; open to one side beyond +-.999."""
    scale = (-log_std).exp()
    above, below = _normal_cdf(scale * (x - mean + BIN)), _normal_cdf(scale * (x - mean - BIN))
    inside = (above - below).clamp(min=1e-12).log()
    leftmost, rightmost = above.clamp(min=1e-12).log(), (1 - below).clamp(min=1e-12).log()
    return torch.where(x < -0.999, leftmost, torch.where(x > 0.999, rightmost, inside))


def _normal_cdf(x: Tensor) -> Tensor:
    """By the tanh approximation (Page 1977) that ADM and DiT train with; exact to 2e-4."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
