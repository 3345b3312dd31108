"""Continuous paths between noise and data (SiT): slow, plain float64 numpy, written from the papers.

Papers: SiT = arXiv 2401.08740, SD3 = 2403.03206, contrastive flow matching = 2506.05350, Song et al. = 2011.13456.

Two time axes, and every function says which one it takes:
- SiT's code: t in [0, 1], t = 0 is noise and t = 1 is data, x_t = alpha(t) x_data + sigma(t) noise, v = dx / dt.
- noise level (diffusers): level = 1 - t, 1 is noise. The coefficients are the same numbers, here called alpha(level)
  and beta(level); derivatives change sign: d/dlevel = -d/dt, so the velocity of diffusers is -v.
(The text of the SiT paper lets time run the second way, its released code the first.)
Only for the linear path is `level` also the standard deviation of the noise: beta(level) = level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

PATHS = ("linear", "cosine", "vp")  # "Linear", "GVP", "VP" in SiT.
KINDS = ("velocity", "noise", "score", "clean")
VP_BETA_MIN, VP_BETA_MAX = 0.1, 20.0


@dataclass(frozen=True)
class Coefficients:
    """x = data x_data + noise eps at one time, with the derivatives of both factors along the axis asked for."""

    data: float
    noise: float
    d_data: float
    d_noise: float


@dataclass(frozen=True)
class ContrastiveTerms:
    """Per sample: mean squares of v minus the own (flow) and the partner's (contrast) target; flow - w contrast."""

    flow: Array
    contrast: Array
    total: Array


def path_by_time(path: str, t: float) -> Coefficients:
    """Coefficients and d/dt on SiT's axis (SiT section 2).

    linear: alpha = t, sigma = 1 - t.
    cosine (GVP): alpha = sin(pi t / 2), sigma = cos(pi t / 2).
    vp: log alpha = -(1 - t)^2 (b1 - b0) / 4 - (1 - t) b0 / 2, sigma = sqrt(1 - alpha^2), b0 = 0.1, b1 = 20 (Song et
        al. eq. 33 with their time being 1 - t). alpha(0) = exp(-5.025) = 0.0066: the noise end keeps a trace of data.
        d alpha = alpha b / 2, d sigma = -alpha^2 b / (2 sigma), b = b0 + (1 - t)(b1 - b0); at t = 1 d sigma = -inf.
    """
    if path == "linear":
        return Coefficients(t, 1.0 - t, 1.0, -1.0)
    if path == "cosine":
        angle, rate = math.pi * t / 2.0, math.pi / 2.0
        return Coefficients(math.sin(angle), math.cos(angle), rate * math.cos(angle), -rate * math.sin(angle))
    if path == "vp":
        log_alpha = -0.25 * (1.0 - t) ** 2 * (VP_BETA_MAX - VP_BETA_MIN) - 0.5 * (1.0 - t) * VP_BETA_MIN
        alpha, sigma = math.exp(log_alpha), math.sqrt(-math.expm1(2.0 * log_alpha))
        rate = vp_beta(1.0 - t)
        d_sigma = -(alpha**2) * rate / (2.0 * sigma) if sigma > 0.0 else -math.inf
        return Coefficients(alpha, sigma, 0.5 * alpha * rate, d_sigma)
    raise ValueError(f"unknown path {path!r}")


def path_by_level(path: str, level: float) -> Coefficients:
    """Coefficients alpha(level), beta(level) and d/dlevel on the noise-level axis, from their own formulas.

    linear: 1 - level, level. cosine: cos(pi level / 2), sin(pi level / 2).
    vp: alpha = exp(-h / 2), beta = sqrt(1 - exp(-h)), h(level) = b0 level + (b1 - b0) level^2 / 2 (the integral of b),
        d alpha = -h' alpha / 2, d beta = h' alpha^2 / (2 beta), h' = b0 + (b1 - b0) level; d beta = inf at level 0.
    """
    if path == "linear":
        return Coefficients(1.0 - level, level, -1.0, 1.0)
    if path == "cosine":
        half_pi = math.pi / 2.0
        cos, sin = math.cos(half_pi * level), math.sin(half_pi * level)
        return Coefficients(cos, sin, -half_pi * sin, half_pi * cos)
    if path == "vp":
        integral = VP_BETA_MIN * level + 0.5 * (VP_BETA_MAX - VP_BETA_MIN) * level**2
        alpha, beta = math.exp(-0.5 * integral), math.sqrt(-math.expm1(-integral))
        rate = vp_beta(level)
        d_beta = 0.5 * rate * alpha**2 / beta if beta > 0.0 else math.inf
        return Coefficients(alpha, beta, -0.5 * rate * alpha, d_beta)
    raise ValueError(f"unknown path {path!r}")


def vp_beta(level: float) -> float:
    """Rate b(level) = 0.1 + 19.9 level of the VP diffusion (Song et al. eq. 32)."""
    return VP_BETA_MIN + (VP_BETA_MAX - VP_BETA_MIN) * level


def interpolate(path: str, t: Sequence[float] | Array, clean: Array, noise: Array) -> Array:
    """x_t = alpha(t) x_data + sigma(t) eps for a batch, SiT eq. 1; t on SiT's axis."""
    result = np.zeros_like(clean, dtype=float)
    for b, time in enumerate(t):
        c = path_by_time(path, time)
        result[b] = c.data * clean[b] + c.noise * noise[b]
    return result


def target(kind: str, path: str, t: float, clean: Array, noise: Array) -> Array:
    """What a network of this kind should say for one sample, t on SiT's axis.

    velocity = alpha' x_data + sigma' eps (diffusers' velocity is minus that); noise = eps; clean = x_data;
    score = grad log p(x_t | x_data) = -eps / sigma.
    """
    c = path_by_time(path, t)
    if kind == "velocity":
        return c.d_data * clean + c.d_noise * noise
    if kind == "noise":
        return noise
    if kind == "clean":
        return clean
    if kind == "score":
        return -noise / _nonzero(c.noise, "sigma")
    raise ValueError(f"unknown kind {kind!r}")


def clean_and_noise(kind: str, path: str, t: float, x: Array, prediction: Array) -> tuple[Array, Array]:
    """The pair (x_data, eps) that a prediction implies at x = x_t, t on SiT's axis.

    Two linear equations: alpha x_data + sigma eps = x, and the definition of the kind in `target`. For velocity with
    D = alpha sigma' - alpha' sigma: x_data = (sigma' x - sigma v) / D, eps = (alpha v - alpha' x) / D
    (D = -1 linear, -pi/2 cosine, -b / (2 sigma) vp).
    """
    c = path_by_time(path, t)
    if kind == "velocity":
        determinant = c.data * c.d_noise - c.d_data * c.noise
        if not math.isfinite(determinant):
            raise ValueError(f"the velocity of {path} is not finite at t = {t}")
        clean = (c.d_noise * x - c.noise * prediction) / determinant
        return clean, (c.data * prediction - c.d_data * x) / determinant
    if kind == "clean":
        return prediction, (x - c.data * prediction) / _nonzero(c.noise, "sigma")
    if kind not in ("noise", "score"):
        raise ValueError(f"unknown kind {kind!r}")
    noise = prediction if kind == "noise" else -c.noise * prediction
    return (x - c.noise * noise) / _nonzero(c.data, "alpha"), noise


def convert(source: str, wanted: str, path: str, t: float, x: Array, prediction: Array) -> Array:
    """Turn a prediction of one kind into another (one sample, SiT's axis). Raises where it is 0 / 0.

    E.g. linear: score = (t v - x) / (1 - t), noise = x - t v, x_data = x + (1 - t) v.
    """
    clean, noise = clean_and_noise(source, path, t, x, prediction)
    return target(wanted, path, t, clean, noise)


def _nonzero(value: float, name: str) -> float:
    if value == 0.0:
        raise ValueError(f"{name} is 0 at this time: the conversion is undefined")
    return value


def drift_scale(path: str, t: float) -> float:
    """lambda(t) = sigma^2 alpha'/alpha - sigma sigma', SiT's axis: v = (alpha'/alpha) x + lambda score.

    linear: (1 - t) / t. cosine: (pi/2) cot(pi t / 2). vp: b(1 - t) / 2. Also the "SBDM" diffusion of the SDE sampler.
    Linear and cosine diverge at t = 0; vp is bounded.
    """
    if path == "linear":
        return (1.0 - t) / t
    if path == "cosine":
        return 0.5 * math.pi / math.tan(0.5 * math.pi * t)
    if path == "vp":
        return 0.5 * vp_beta(1.0 - t)
    raise ValueError(f"unknown path {path!r}")


def loss_weight(path: str, prediction: str, weighting: str, t: float) -> float:
    """The factor w(t) on the squared error of eps, SiT's axis; `sit_loss` says which error.

    velocity prediction: always 1 (SiT's code never looks at the option then).
    noise and score prediction: none 1; velocity (lambda / sigma)^2; likelihood lambda / sigma^2.
    Closed forms: velocity: linear 1 / t^2, cosine (pi/2)^2 / sin^2(pi t / 2), vp (b / (2 sigma))^2;
    likelihood: linear 1 / (t (1 - t)), cosine pi / sin(pi t), vp b / (2 sigma^2).
    """
    if prediction not in ("velocity", "noise", "score"):
        raise ValueError(f"SiT has no {prediction!r} prediction")
    if prediction == "velocity" or weighting == "none":
        return 1.0
    sigma = path_by_time(path, t).noise
    if weighting == "velocity":
        return (drift_scale(path, t) / sigma) ** 2
    if weighting == "likelihood":
        return drift_scale(path, t) / sigma**2
    raise ValueError(f"unknown weighting {weighting!r}")


def sit_loss(
    path: str, prediction: str, weighting: str, t: Sequence[float] | Array, clean: Array, noise: Array, output: Array
) -> Array:
    """SiT's loss per sample (mean over elements), t on its axis.

    velocity: |output - v|^2. noise: w |output - eps|^2. score: w |sigma output + eps|^2, which is
    w sigma^2 |score error|^2.
    """
    losses = np.zeros(len(clean))
    for b, time in enumerate(t):
        if prediction == "velocity":
            error = output[b] - target("velocity", path, time, clean[b], noise[b])
        elif prediction == "score":
            error = path_by_time(path, time).noise * output[b] + noise[b]
        else:
            error = output[b] - noise[b]
        losses[b] = loss_weight(path, prediction, weighting, time) * np.mean(error**2)
    return losses


def shift_level(level: float, shift: float) -> float:
    """level' = s level / (1 + (s - 1) level), SD3 eq. 23; level 1 is noise, s > 1 moves towards noise.

    The odds level / (1 - level) are multiplied by s, so shifts compose by multiplication.
    """
    return shift * level / (1.0 + (shift - 1.0) * level)


def unshift_level(level: float, shift: float) -> float:
    """Inverse of `shift_level`: level / (s - (s - 1) level), which is the shift by 1 / s."""
    return level / (shift - (shift - 1.0) * level)


def shift_time(t: float, shift: float) -> float:
    """The same shift for SiT's t = 1 - level: t' = t / (s - (s - 1) t). Not `shift_level(t, s)`: that goes to data."""
    return 1.0 - shift_level(1.0 - t, shift)


def default_shift(dimension: int, base: int = 4096) -> float:
    """s = sqrt(dimension / base) (SD3 section 5.3.2, base as in RAE): 4x32x32 gives 1, 16x32x32 gives 2."""
    return math.sqrt(dimension / base)


def contrastive_terms(
    path: str,
    t: Sequence[float] | Array,
    clean: Array,
    noise: Array,
    output: Array,
    weight: float = 0.05,
    contrast_time: str = "partner",
) -> ContrastiveTerms:
    """Contrastive flow matching for a velocity network, SiT's axis: |v - u_i|^2 - weight |v - u_j|^2, j = i xor 1.

    u_j = alpha' x_j + sigma' eps_j: data and noise both of sample j. The derivatives are taken at j's own time
    (contrast_time="partner", what the authors' code does) or at i's ("own", what the paper's formula says); on the
    linear path both agree. Both axes give the same numbers, since all velocities change sign together.
    Neighbours 2 k and 2 k + 1 are each other's negatives; the authors draw any other sample at random instead.
    Needs an even batch (in an odd one the last sample has no partner).
    """
    size = len(clean)
    if size % 2:
        raise ValueError("the pairing i xor 1 needs an even batch")
    flow, contrast = np.zeros(size), np.zeros(size)
    for i in range(size):
        j = i ^ 1
        time = t[j] if contrast_time == "partner" else t[i]
        flow[i] = np.mean((output[i] - target("velocity", path, t[i], clean[i], noise[i])) ** 2)
        contrast[i] = np.mean((output[i] - target("velocity", path, time, clean[j], noise[j])) ** 2)
    return ContrastiveTerms(flow, contrast, flow - weight * contrast)


def sit_epsilons(
    path: str, prediction: str, train_eps: float | None = None, sample_eps: float | None = None
) -> tuple[float, float | None]:
    """(train_eps, sample_eps) as SiT's create_transport settles them.

    vp: 1e-5, 1e-3. linear, cosine: velocity 0, 0 whatever was given; noise, score 1e-3, 1e-3.
    Its oddity is kept: whether sample_eps gets its default depends on train_eps being None, so a given sample_eps
    alone is ignored, and train_eps alone leaves sample_eps None.
    """
    if path != "vp" and prediction == "velocity":
        return 0.0, 0.0
    if train_eps is None:
        return (1e-5 if path == "vp" else 1e-3), 1e-3
    return train_eps, sample_eps


def sit_interval(
    path: str,
    prediction: str,
    use: str,
    diffusion_form: str = "sigma",
    last_step_size: float = 0.04,
    train_eps: float | None = None,
    sample_eps: float | None = None,
) -> tuple[float, float]:
    """(t0, t1) on SiT's axis for use = "train" (t uniform between), "ode" or "sde". On noise levels: (1 - t1, 1 - t0).

    With the defaults:
      linear, cosine + velocity:     train 0..1         ode 0..1         sde 0..0.96
      linear, cosine + noise, score: train 1e-3..1-1e-3 ode 1e-3..1-1e-3 sde 1e-3..0.96
      vp + any:                      train 0..1-1e-5    ode 0..1-1e-3    sde 0..0.96
    Why. t = 1: score = -eps / sigma diverges as sigma -> 0, and vp's sigma' too, which makes even its velocity
    infinite. t = 0: turning noise or score into velocity needs alpha'/alpha, infinite for linear and cosine, bounded
    (b / 2) for vp, so vp may start at 0. velocity on linear or cosine is finite everywhere and needs no margin; an SDE
    needs the score whatever is predicted, so it stops at 1 - last_step_size and makes one noiseless last step (with
    last_step_size 0 it stops at 1 - sample_eps). diffusion_form "SBDM" starts at sample_eps, its lambda(0) being
    infinite; but for velocity sample_eps is 0, so SiT's code still starts at 0 there and divides by zero.
    """
    if use not in ("train", "ode", "sde"):
        raise ValueError(f"unknown use {use!r}")
    train, sample = sit_epsilons(path, prediction, train_eps, sample_eps)
    margin = train if use == "train" else sample
    if margin is None:
        raise ValueError("SiT leaves sample_eps unset when only train_eps is given")
    end = 1.0 - (last_step_size if use == "sde" and last_step_size > 0.0 else margin)
    if path == "vp":
        return 0.0, end
    if prediction == "velocity" and use != "sde":
        return 0.0, 1.0
    starts_late = prediction != "velocity" or diffusion_form == "SBDM"
    return (margin if starts_late else 0.0), end
