"""Interpolants between data and noise, and the conversions between what a network may predict.

    x_sigma = alpha(sigma) * clean + beta(sigma) * noise          SiT, arXiv 2401.08740, section 2
    velocity = d x_sigma / d sigma = alpha' * clean + beta' * noise
    score = grad log p(x_sigma) = -noise / beta  (in expectation)

    path      alpha               beta
    linear    1 - sigma           sigma
    cosine    cos(pi sigma / 2)   sin(pi sigma / 2)               SiT's GVP
    vp        exp(-b(sigma) / 2)  sqrt(1 - alpha^2)               b = 9.95 sigma^2 + .1 sigma, of betas .1 .. 20

`sigma` in [0, 1] is the noise level, 1 = pure noise, diffusers' axis. SiT's time is t = 1 - sigma, so this velocity is
minus SiT's. Every function takes sigma as a float, a scalar tensor or one value per sample (B,); a float stays on the
host, so nothing here waits for a device.
"""

from __future__ import annotations

import math
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

FlowPath = Literal["linear", "cosine", "vp"]
FlowPrediction = Literal["flow_prediction", "epsilon", "score", "sample"]
LossWeighting = Literal["none", "velocity", "likelihood"]
SigmaDistribution = Literal["uniform", "logit_normal"]
DiffusionForm = Literal["constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing"]

PATHS: tuple[str, ...] = get_args(FlowPath)
FLOW_PREDICTIONS: tuple[str, ...] = get_args(FlowPrediction)
LOSS_WEIGHTINGS: tuple[str, ...] = get_args(LossWeighting)
SIGMA_DISTRIBUTIONS: tuple[str, ...] = get_args(SigmaDistribution)
DIFFUSION_FORMS: tuple[str, ...] = get_args(DiffusionForm)
VP_BETAS = (0.1, 20.0)

Sigma = TypeVar("Sigma", float, Tensor, float | Tensor)


def alpha_beta(sigma: Sigma, path: FlowPath = "linear") -> tuple[Sigma, Sigma]:
    """(alpha, beta) of the path at noise level sigma in [0, 1]; the type of `sigma` is kept.

    Raises:
        ValueError: an unknown path.
    """
    _check_choice("path", path, PATHS)
    if path == "linear":
        return 1.0 - sigma, 1.0 * sigma
    if path == "vp":
        log_alpha, _ = _vp_log_alpha(sigma)
        return _of(log_alpha, "exp"), _of(-_of(2.0 * log_alpha, "expm1"), "sqrt")
    return _of(0.5 * math.pi * sigma, "cos"), _of(0.5 * math.pi * sigma, "sin")


def derivatives(sigma: Sigma, path: FlowPath = "linear") -> tuple[Sigma, Sigma]:
    """(d alpha / d sigma, d beta / d sigma) at noise level sigma in [0, 1]; the type of `sigma` is kept.

    On the vp path beta' is infinite at sigma = 0: see `sigma_interval`.
    """
    _check_choice("path", path, PATHS)
    if path == "linear":
        return 0.0 * sigma - 1.0, 0.0 * sigma + 1.0
    if path == "vp":
        alpha, beta = alpha_beta(sigma, path)
        _, slope = _vp_log_alpha(sigma)
        return alpha * slope, -(alpha**2) * slope / beta
    half_pi = 0.5 * math.pi
    return -half_pi * _of(half_pi * sigma, "sin"), half_pi * _of(half_pi * sigma, "cos")


def _vp_log_alpha(sigma: Sigma) -> tuple[Sigma, Sigma]:
    """log alpha of the vp path and its derivative."""
    low, high = VP_BETAS
    return -0.25 * (high - low) * sigma**2 - 0.5 * low * sigma, -0.5 * (high - low) * sigma - 0.5 * low


def sigma_interval(
    path: FlowPath = "linear", prediction_type: FlowPrediction = "flow_prediction", *, training: bool = False
) -> tuple[float, float]:
    """The noise levels (lowest, highest) where the path's velocity, and the prediction it is made of, are finite.

    [0, 1] for a velocity on the linear and cosine paths. Of another prediction there, .001 is left out at both ends;
    the vp path starts at .001, in training at .00001 (SiT's choices). A sampler ends at the lowest, which leaves
    noise far below one grey level.
    """
    _check_choice("path", path, PATHS)
    _check_choice("prediction_type", prediction_type, FLOW_PREDICTIONS)
    if path == "vp":
        return (1e-5 if training else 1e-3), 1.0
    return (0.0, 1.0) if prediction_type == "flow_prediction" else (1e-3, 1.0 - 1e-3)


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


def to_velocity(
    prediction: Tensor,
    x: Tensor,
    sigma: float | Tensor,
    *,
    prediction_type: FlowPrediction = "flow_prediction",
    path: FlowPath = "linear",
) -> Tensor:
    """v from whatever a network predicts, at noise levels inside `sigma_interval`.

    Raises:
        ValueError: an unknown prediction type.
    """
    _check_choice("prediction_type", prediction_type, FLOW_PREDICTIONS)
    if prediction_type == "flow_prediction":
        return prediction
    convert = {"epsilon": noise_to_velocity, "score": score_to_velocity, "sample": clean_to_velocity}[prediction_type]
    return convert(prediction, x, sigma, path)


def prediction_target(
    clean: Tensor,
    noise: Tensor,
    sigma: float | Tensor,
    *,
    prediction_type: FlowPrediction = "flow_prediction",
    path: FlowPath = "linear",
) -> Tensor:
    """What a network of that prediction type shall say of x_sigma, (B, ...): velocity, noise, -noise / beta or clean.

    Raises:
        ValueError: an unknown prediction type.
    """
    _check_choice("prediction_type", prediction_type, FLOW_PREDICTIONS)
    if prediction_type == "flow_prediction":
        return velocity_target(clean, noise, sigma, path)
    if prediction_type == "score":
        return -noise / alpha_beta(_broadcast(sigma, noise), path)[1]
    return noise if prediction_type == "epsilon" else clean


def loss_weight(
    sigma: Sigma,
    *,
    prediction_type: FlowPrediction = "flow_prediction",
    weighting: LossWeighting = "none",
    path: FlowPath = "linear",
) -> Sigma:
    """Factor of |prediction - target|^2 at noise level sigma (SiT, section 2; its transport code).

    With c = |d velocity / d prediction|, which is |beta' - beta alpha' / alpha| for the noise: "none" counts noise and
    clean data as they are and the score as the noise it stands for (beta^2); "velocity" weighs all as the velocity's
    error, c^2; "likelihood" as the bound of the likelihood, c / beta for the noise.

    Raises:
        ValueError: an unknown name, or a weighting that the prediction does not have.
    """
    _check_choice("prediction_type", prediction_type, FLOW_PREDICTIONS)
    _check_choice("weighting", weighting, LOSS_WEIGHTINGS)
    if weighting != "none" and (prediction_type, weighting) in _UNWEIGHTED:
        raise ValueError(f"There is no {weighting} weighting of a {prediction_type} prediction; use none.")
    if prediction_type == "flow_prediction":
        return 0.0 * sigma + 1.0
    (alpha, beta), (d_alpha, d_beta) = alpha_beta(sigma, path), derivatives(sigma, path)
    if prediction_type == "sample":
        return 0.0 * sigma + 1.0 if weighting == "none" else (d_alpha - alpha * d_beta / beta) ** 2
    slope = d_beta - beta * d_alpha / alpha
    of_noise = {"none": 0.0 * sigma + 1.0, "velocity": slope**2, "likelihood": slope / beta}[weighting]
    return of_noise if prediction_type == "epsilon" else beta**2 * of_noise


_UNWEIGHTED = {("flow_prediction", "velocity"), ("flow_prediction", "likelihood"), ("sample", "likelihood")}


def shift_sigma(sigma: Sigma, shift: float) -> Sigma:
    """s sigma / (1 + (s - 1) sigma): s > 1 spends more of training or sampling on noise (arXiv 2403.03206, eq. 23).

    LightningDiT's shift .3, of its sampler, acts on t = 1 - sigma and is 1 / .3 here.
    """
    return sigma if shift == 1.0 else shift * sigma / (1.0 + (shift - 1.0) * sigma)


def default_shift(latent_channels: int, height: int, width: int) -> float:
    """sqrt(C h w / 4096), at least 1, from 16 channels on (RAE, arXiv 2510.11690); 1 below.

    4 x 32 x 32 numbers are the latents of the papers; the more a latent has, the more noise hides the image in them.
    """
    return max(1.0, math.sqrt(latent_channels * height * width / 4096)) if latent_channels >= 16 else 1.0


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
        return 0.25 * (norm * _of(math.pi * (1.0 - sigma), "cos") + 1.0) ** 2
    if form == "increasing-decreasing":
        return norm * _of(math.pi * (1.0 - sigma), "sin") ** 2
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


def _of(value: Sigma, function: str) -> Sigma:
    """sin, cos, exp ... of a tensor, or of a float on the host."""
    return getattr(torch, function)(value) if isinstance(value, Tensor) else getattr(math, function)(value)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")
