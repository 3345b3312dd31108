"""Interpolants between data and noise, and the conversions between what a network may predict.

    x_sigma = alpha(sigma) * clean + beta(sigma) * noise          SiT, arXiv 2401.08740, section 2
    velocity = d x_sigma / d sigma = alpha' * clean + beta' * noise
    score = grad log p(x_sigma) = -noise / beta  (in expectation)

    path      alpha               beta
    linear    1 - sigma           sigma
    cosine    cos(pi sigma / 2)   sin(pi sigma / 2)               SiT's GVP

`sigma` in [0, 1] is the noise level, 1 = pure noise, diffusers' axis. SiT's time is t = 1 - sigma, so this velocity is
minus SiT's. Every function takes sigma as a float, a scalar tensor or one value per sample (B,); a float stays on the
host, so nothing here waits for a device.
"""

from __future__ import annotations

import math
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

FlowPath = Literal["linear", "cosine"]
SigmaDistribution = Literal["uniform", "logit_normal"]
DiffusionForm = Literal["constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing"]

PATHS: tuple[str, ...] = get_args(FlowPath)
SIGMA_DISTRIBUTIONS: tuple[str, ...] = get_args(SigmaDistribution)
DIFFUSION_FORMS: tuple[str, ...] = get_args(DiffusionForm)

Sigma = TypeVar("Sigma", float, Tensor, float | Tensor)


def alpha_beta(sigma: Sigma, path: FlowPath = "linear") -> tuple[Sigma, Sigma]:
    """(alpha, beta) of the path at noise level sigma in [0, 1]; the type of `sigma` is kept.

    Raises:
        ValueError: an unknown path.
    """
    _check_choice("path", path, PATHS)
    if path == "linear":
        return 1.0 - sigma, 1.0 * sigma
    return _cos(0.5 * math.pi * sigma), _sin(0.5 * math.pi * sigma)


def derivatives(sigma: Sigma, path: FlowPath = "linear") -> tuple[Sigma, Sigma]:
    """(d alpha / d sigma, d beta / d sigma) at noise level sigma in [0, 1]; the type of `sigma` is kept."""
    _check_choice("path", path, PATHS)
    if path == "linear":
        return 0.0 * sigma - 1.0, 0.0 * sigma + 1.0
    half_pi = 0.5 * math.pi
    return -half_pi * _sin(half_pi * sigma), half_pi * _cos(half_pi * sigma)


def interpolate(clean: Tensor, noise: Tensor, sigma: float | Tensor, path: FlowPath = "linear") -> Tensor:
    """x_sigma = alpha * clean + beta * noise, (B, ...)."""
    alpha, beta = alpha_beta(_broadcast(sigma, clean), path)
    return alpha * clean + beta * noise


def velocity_target(clean: Tensor, noise: Tensor, sigma: float | Tensor, path: FlowPath = "linear") -> Tensor:
    """d x_sigma / d sigma, (B, ...): noise - clean on the linear path. What flow matching regresses on."""
    d_alpha, d_beta = derivatives(_broadcast(sigma, clean), path)
    return d_alpha * clean + d_beta * noise


def velocity_to_clean(velocity: Tensor, x: Tensor, sigma: float | Tensor, path: FlowPath = "linear") -> Tensor:
    """clean = (beta' x - beta v) / (alpha beta' - beta alpha'); defined for all sigma in [0, 1]."""
    alpha, beta, d_alpha, d_beta = _coefficients(sigma, x, path)
    return (d_beta * x - beta * velocity) / (alpha * d_beta - beta * d_alpha)


def velocity_to_noise(velocity: Tensor, x: Tensor, sigma: float | Tensor, path: FlowPath = "linear") -> Tensor:
    """noise = (alpha v - alpha' x) / (alpha beta' - beta alpha'); defined for all sigma in [0, 1]."""
    alpha, beta, d_alpha, d_beta = _coefficients(sigma, x, path)
    return (alpha * velocity - d_alpha * x) / (alpha * d_beta - beta * d_alpha)


def velocity_to_score(velocity: Tensor, x: Tensor, sigma: float | Tensor, path: FlowPath = "linear") -> Tensor:
    """score = -noise / beta, for sigma in (0, 1]; infinite at sigma = 0."""
    _, beta = alpha_beta(_broadcast(sigma, x), path)
    return -velocity_to_noise(velocity, x, sigma, path) / beta


def clean_to_velocity(clean: Tensor, x: Tensor, sigma: float | Tensor, path: FlowPath = "linear") -> Tensor:
    """v from a prediction of the clean data, for sigma in (0, 1]: noise = (x - alpha clean) / beta."""
    alpha, beta, d_alpha, d_beta = _coefficients(sigma, x, path)
    return d_alpha * clean + d_beta * (x - alpha * clean) / beta


def noise_to_velocity(noise: Tensor, x: Tensor, sigma: float | Tensor, path: FlowPath = "linear") -> Tensor:
    """v from a prediction of the noise, for sigma in [0, 1): clean = (x - beta noise) / alpha."""
    alpha, beta, d_alpha, d_beta = _coefficients(sigma, x, path)
    return d_alpha * (x - beta * noise) / alpha + d_beta * noise


def score_to_velocity(score: Tensor, x: Tensor, sigma: float | Tensor, path: FlowPath = "linear") -> Tensor:
    """v from a prediction of the score, for sigma in [0, 1): noise = -beta score."""
    _, beta = alpha_beta(_broadcast(sigma, x), path)
    return noise_to_velocity(-beta * score, x, sigma, path)


def sample_sigmas(
    uniform: Tensor, distribution: SigmaDistribution = "uniform", *, mean: float = 0.0, std: float = 1.0
) -> Tensor:
    """Training noise levels (B,) in [0, 1] by inverse CDF of the caller's uniform numbers.

    - "uniform": sigma = u;
    - "logit_normal": sigma = sigmoid(mean + std * Phi^-1(u)) (Stable Diffusion 3, arXiv 2403.03206, section 3.1),
      where `mean` > 0 favours noise.

    Args:
        uniform: (B,) in (0, 1).

    Raises:
        ValueError: an unknown distribution, or std <= 0.
    """
    _check_choice("distribution", distribution, SIGMA_DISTRIBUTIONS)
    if not std > 0.0:
        raise ValueError(f"std of the logit-normal distribution must be positive; got {std}.")
    if distribution == "uniform":
        return uniform
    return torch.sigmoid(mean + std * torch.special.ndtri(uniform))


def diffusion_coefficient(
    sigma: Sigma, form: DiffusionForm = "sigma", *, norm: float = 1.0, path: FlowPath = "linear"
) -> Sigma:
    """w(sigma) >= 0 of the reverse SDE dx = (v_SiT + w score) dt + sqrt(2 w) dW (SiT, section 2).

    Every w leaves the marginals of the flow in place. With t = 1 - sigma:
    constant: norm;  sigma: norm * beta;  linear: norm * sigma;  decreasing: (norm * cos(pi t) + 1)^2 / 4;
    increasing-decreasing: norm * sin(pi t)^2;  SBDM: norm * (beta beta' - beta^2 alpha' / alpha), infinite at 1.

    Raises:
        ValueError: an unknown form or path, or norm < 0.
    """
    _check_choice("diffusion form", form, DIFFUSION_FORMS)
    if norm < 0.0:
        raise ValueError(f"The norm of the diffusion must be >= 0; got {norm}.")
    alpha, beta = alpha_beta(sigma, path)
    if form == "constant":
        return 0.0 * sigma + norm
    if form == "sigma":
        return norm * beta
    if form == "linear":
        return norm * sigma
    if form == "decreasing":
        return 0.25 * (norm * _cos(math.pi * (1.0 - sigma)) + 1.0) ** 2
    if form == "increasing-decreasing":
        return norm * _sin(math.pi * (1.0 - sigma)) ** 2
    d_alpha, d_beta = derivatives(sigma, path)
    return norm * (beta * d_beta - beta**2 * d_alpha / alpha)


def _coefficients(sigma: float | Tensor, x: Tensor, path: FlowPath) -> tuple:
    sigma = _broadcast(sigma, x)
    return *alpha_beta(sigma, path), *derivatives(sigma, path)


def _broadcast(sigma: float | Tensor, x: Tensor) -> float | Tensor:
    """One value per sample becomes (B, 1, ..., 1); floats and scalar tensors stay."""
    if not isinstance(sigma, Tensor) or sigma.ndim == 0:
        return sigma
    if sigma.shape != x.shape[:1]:
        raise ValueError(
            f"sigma must be a number or one value per sample, ({x.shape[0]},); got shape {tuple(sigma.shape)}."
        )
    return sigma.view(-1, *[1] * (x.ndim - 1))


def _cos(angle: Sigma) -> Sigma:
    return torch.cos(angle) if isinstance(angle, Tensor) else math.cos(angle)


def _sin(angle: Sigma) -> Sigma:
    return torch.sin(angle) if isinstance(angle, Tensor) else math.sin(angle)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")
