"""Discrete diffusion (DDPM) as DiT trains and samples it: slow, plain float64 numpy, written from the papers.

Papers: DDPM = arXiv 2006.11239, iDDPM = Improved DDPM, arXiv 2102.09672, DDIM = arXiv 2010.02502, DiT = 2212.09748.
Step indices start at 0: index t here is step t + 1 in the papers, and the chain before index 0 has alpha_bar = 1.
Batches are [B, C, ...]; a model output is [B, 2 C, ...] = (epsilon | v) along axis 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

NLL_FLOOR = 1e-12  # Smallest probability inside a logarithm.
HALF_BIN = 1.0 / 255.0  # 256 levels on [-1, 1]: bins are 2/255 wide.
EDGE = 0.999  # Beyond +-EDGE the outermost bins are open-ended.


@dataclass(frozen=True)
class Schedule:
    """All per-step numbers of one chain, each of length N.

    betas: beta_t. alpha_bar: prod_{s<=t} (1 - beta_s), DDPM below eq. 4. alpha_bar_prev: the same one step earlier, 1
    at t = 0. posterior_variance: beta_t (1 - alpha_bar_prev) / (1 - alpha_bar), DDPM eq. 7 (0 at t = 0).
    posterior_log_variance_clipped: its logarithm, where entry 0 (log 0) is replaced by entry 1.
    coef_x0, coef_xt: q(x_{t-1} | x_t, x_0) has mean coef_x0 x_0 + coef_xt x_t, DDPM eq. 7.
    model_timesteps: the integer that the network is given at each index (the index of the original chain).
    """

    betas: Array
    alpha_bar: Array
    alpha_bar_prev: Array
    posterior_variance: Array
    posterior_log_variance_clipped: Array
    coef_x0: Array
    coef_xt: Array
    model_timesteps: list[int]

    def __len__(self) -> int:
        return len(self.betas)


@dataclass(frozen=True)
class TrainingTerms:
    """Losses per sample, shape [B]: total = mse + vb; vb is in bits per dimension, mse is a plain mean square."""

    mse: Array
    vb: Array
    total: Array


@dataclass(frozen=True)
class ReverseStep:
    """p(x_{t-1} | x_t) = N(mean, exp(log_variance)), and the x_0 it was built from. All of x_t's shape."""

    mean: Array
    log_variance: Array
    clean: Array


def linear_betas(steps: int = 1000) -> Array:
    """beta_t from 1e-4 to 0.02 in equal increments (DDPM section 4), both ends times 1000 / steps (1 for DiT)."""
    scale = 1000.0 / steps
    low, high = 1e-4 * scale, 0.02 * scale
    return np.array([low + (high - low) * i / (steps - 1) for i in range(steps)])


def schedule_from_betas(betas: Array, model_timesteps: Sequence[int] | None = None) -> Schedule:
    """Fill in a Schedule from betas (DDPM eq. 4 and 7). At least two steps: the clipping reads index 1."""
    count = len(betas)
    if count < 2:
        raise ValueError("a chain needs at least two steps")
    alpha_bar, alpha_bar_prev, variance, coef_x0, coef_xt = (np.zeros(count) for _ in range(5))
    running = 1.0
    for t in range(count):
        alpha_bar_prev[t] = running
        running *= 1.0 - betas[t]
        alpha_bar[t] = running
        rest = 1.0 - alpha_bar[t]
        variance[t] = betas[t] * (1.0 - alpha_bar_prev[t]) / rest
        coef_x0[t] = betas[t] * math.sqrt(alpha_bar_prev[t]) / rest
        coef_xt[t] = (1.0 - alpha_bar_prev[t]) * math.sqrt(1.0 - betas[t]) / rest
    clipped = np.array([math.log(variance[max(t, 1)]) for t in range(count)])
    timesteps = list(range(count)) if model_timesteps is None else [int(step) for step in model_timesteps]
    return Schedule(np.array(betas, float), alpha_bar, alpha_bar_prev, variance, clipped, coef_x0, coef_xt, timesteps)


def respaced_timesteps(total: int, counts: str | int | Sequence[int]) -> list[int]:
    """Which of `total` steps a shorter chain keeps, ascending (iDDPM section 4; the rounding is ADM's code).

    counts: N or "N" (one section), "a,b,..." (that many in each of equal sections, the first ones one longer when it
    does not divide), or "ddimN" (stride s = the smallest with exactly N steps in 0, s, 2 s, ...).
    In a section of length L with n steps: start + round(i (L - 1) / (n - 1)), halves to even, the position being
    summed up i times rather than multiplied; n = 1 keeps the first step of the section
    (so N = 1 is [0], not [total - 1]).
    """
    if isinstance(counts, str) and counts.startswith("ddim"):
        wanted = int(counts[4:])
        for stride in range(1, total):
            kept = [step for step in range(total) if step % stride == 0]
            if len(kept) == wanted:
                return kept
        raise ValueError(f"no integer stride gives {wanted} of {total} steps")
    if isinstance(counts, str):
        counts = [int(part) for part in counts.split(",")]
    elif isinstance(counts, int):
        counts = [counts]
    kept_steps: set[int] = set()
    start = 0
    for section, wanted in enumerate(counts):
        length = total // len(counts) + (1 if section < total % len(counts) else 0)
        if wanted > length:
            raise ValueError(f"{wanted} steps do not fit into a section of {length}")
        stride_float = (length - 1) / (wanted - 1) if wanted > 1 else 1.0
        position = 0.0
        for _ in range(wanted):
            kept_steps.add(start + round(position))
            position += stride_float
        start += length
    return sorted(kept_steps)


def respaced_schedule(base: Schedule, timesteps: Sequence[int]) -> Schedule:
    """The chain over a subset S of steps: beta'_i = 1 - alpha_bar[S_i] / alpha_bar[S_{i-1}], iDDPM eq. 19.

    alpha_bar[S_{-1}] = 1. Everything else, the clipped entry 0 too, is derived anew from the new betas.
    """
    betas = []
    before = 1.0
    for step in timesteps:
        betas.append(1.0 - base.alpha_bar[step] / before)
        before = base.alpha_bar[step]
    return schedule_from_betas(np.array(betas), [base.model_timesteps[step] for step in timesteps])


def dit_schedule(steps: int | str | None = None) -> Schedule:
    """DiT's chain: 1000 linear steps for training (None), respaced for sampling (250 in the paper)."""
    base = schedule_from_betas(linear_betas(1000))
    return base if steps is None else respaced_schedule(base, respaced_timesteps(1000, steps))


def add_noise(schedule: Schedule, clean: Array, noise: Array, t: Sequence[int]) -> Array:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) epsilon, DDPM eq. 4, iDDPM eq. 9; one index t a sample."""
    noisy = np.zeros_like(clean, dtype=float)
    for b, step in enumerate(t):
        bar = schedule.alpha_bar[step]
        noisy[b] = math.sqrt(bar) * clean[b] + math.sqrt(1.0 - bar) * noise[b]
    return noisy


def reverse_step(schedule: Schedule, noisy: Array, output: Array, t: int) -> ReverseStep:
    """p(x_{t-1} | x_t) of one sample ([C, ...], output [2 C, ...]) with learned-range variance, no clipping.

    x_0 = x_t / sqrt(alpha_bar) - sqrt(1 / alpha_bar - 1) epsilon (DDPM eq. 4 solved for x_0), mean = coef_x0 x_0 +
    coef_xt x_t (DDPM eq. 7), log variance = f log beta_t + (1 - f) log posterior_variance_clipped with f = (v + 1) / 2
    (iDDPM eq. 15, whose v is f; the network's v means -1 = posterior, +1 = beta, and is not limited to that range).
    """
    epsilon, v = np.split(output, 2, axis=0)
    bar = schedule.alpha_bar[t]
    clean = noisy / math.sqrt(bar) - math.sqrt(1.0 / bar - 1.0) * epsilon
    mean = schedule.coef_x0[t] * clean + schedule.coef_xt[t] * noisy
    fraction = (v + 1.0) / 2.0
    low, high = schedule.posterior_log_variance_clipped[t], math.log(schedule.betas[t])
    return ReverseStep(mean, fraction * high + (1.0 - fraction) * low, clean)


def gaussian_kl(mean_q: Array, log_var_q: float, mean_p: Array, log_var_p: Array) -> Array:
    """KL(q || p) of scalar Gaussians, per element, in nats.

    (log_var_p - log_var_q + exp(log_var_q - log_var_p) + (mean_q - mean_p)^2 exp(-log_var_p) - 1) / 2.
    """
    spread = np.exp(log_var_q - log_var_p)
    shift = (mean_q - mean_p) ** 2 * np.exp(-log_var_p)
    return 0.5 * (log_var_p - log_var_q + spread + shift - 1.0)


def approximate_normal_cdf(x: float) -> float:
    """Normal CDF by tanh: (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2. The references use this, not erf."""
    return 0.5 * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_nll(clean: Array, mean: Array, log_variance: Array) -> Array:
    """-log of the mass that N(mean, exp(log_variance)) puts on the bin of x_0, per element, in nats. DDPM eq. 13.

    Bin [x_0 - 1/255, x_0 + 1/255]; for x_0 < -0.999 its lower end is -inf, for x_0 > 0.999 its upper end is +inf.
    Masses below 1e-12 count as 1e-12. The references' float32 loses the far tails (beyond about 5 sigma) earlier.
    DiT applies this 8-bit pixel likelihood to scaled latents unchanged, though they are neither 8-bit nor in [-1, 1]:
    about a third of unit-variance latents have |x_0| > 0.999 and get an open bin.
    """
    result = np.zeros_like(clean, dtype=float)
    for index in np.ndindex(clean.shape):
        x, mu = float(clean[index]), float(mean[index])
        inverse_std = math.exp(-0.5 * log_variance[index])
        upper = approximate_normal_cdf((x - mu + HALF_BIN) * inverse_std)
        lower = approximate_normal_cdf((x - mu - HALF_BIN) * inverse_std)
        if x < -EDGE:
            mass = upper
        elif x > EDGE:
            mass = 1.0 - lower
        else:
            mass = upper - lower
        result[index] = -math.log(max(mass, NLL_FLOOR))
    return result


def vb_elements(schedule: Schedule, clean: Array, noisy: Array, output: Array, t: int) -> Array:
    """One term of the variational bound for one sample, per element, in bits.

    t > 0: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), DDPM eq. 5; t = 0: -log p(x_0 | x_1), DDPM eq. 13.
    Nothing multiplies it: neither the number of steps nor 1/1000.
    """
    model = reverse_step(schedule, noisy, output, t)
    if t == 0:
        return discretized_nll(clean, model.mean, model.log_variance) / math.log(2.0)
    true_mean = schedule.coef_x0[t] * clean + schedule.coef_xt[t] * noisy
    true_log_variance = float(schedule.posterior_log_variance_clipped[t])
    return gaussian_kl(true_mean, true_log_variance, model.mean, model.log_variance) / math.log(2.0)


def training_terms(schedule: Schedule, clean: Array, noise: Array, t: Sequence[int], output: Array) -> TrainingTerms:
    """DiT's loss: mean (epsilon - prediction)^2 + vb, both means over all C H W elements, iDDPM eq. 14 and 16.

    vb gets the epsilon prediction as a constant (detached), so it trains v only: see `output_gradient`.
    iDDPM eq. 16 weighs L_vlb, a sum over T = 1000 terms, by 0.001; one drawn term is an estimate of L_vlb / T, so its
    weight is 0.001 T = 1. DiT (loss type MSE) adds vb as it is; ADM's RESCALED_MSE multiplies by T / 1000: the same
    number when T = 1000.
    """
    noisy = add_noise(schedule, clean, noise, t)
    mse, vb = np.zeros(len(clean)), np.zeros(len(clean))
    for b, step in enumerate(t):
        epsilon = output[b, : clean.shape[1]]
        mse[b] = np.mean((noise[b] - epsilon) ** 2)
        vb[b] = np.mean(vb_elements(schedule, clean[b], noisy[b], output[b], step))
    return TrainingTerms(mse, vb, mse + vb)


def output_gradient(
    schedule: Schedule, clean: Array, noise: Array, t: Sequence[int], output: Array, delta: float = 1e-5
) -> Array:
    """d total_b / d output_b, [B, 2 C, ...], with the mean detached inside vb.

    Epsilon half: 2 (prediction - epsilon) / D, from mse alone (D = C H W). v half: central difference of vb, whose
    elements depend on their own v only. For the mean loss over a batch divide by B.
    """
    channels = clean.shape[1]
    noisy = add_noise(schedule, clean, noise, t)
    gradient = np.zeros_like(output, dtype=float)
    for b, step in enumerate(t):
        size = clean[b].size
        gradient[b, :channels] = 2.0 * (output[b, :channels] - noise[b]) / size
        above, below = output[b].astype(float), output[b].astype(float)
        above[channels:] += delta
        below[channels:] -= delta
        rise = vb_elements(schedule, clean[b], noisy[b], above, step)
        rise -= vb_elements(schedule, clean[b], noisy[b], below, step)
        gradient[b, channels:] = rise / (2.0 * delta * size)
    return gradient


def ancestral_step(schedule: Schedule, noisy: Array, output: Array, t: int, unit_noise: Array) -> Array:
    """x_{t-1} = mean + exp(log_variance / 2) z (DDPM algorithm 2, learned variance), z dropped at t = 0. Batch, one t.

    Nothing is clipped. t indexes this chain; the network saw schedule.model_timesteps[t].
    """
    result = np.zeros_like(noisy, dtype=float)
    for b in range(len(noisy)):
        step = reverse_step(schedule, noisy[b], output[b], t)
        result[b] = step.mean
        if t > 0:
            result[b] += np.exp(0.5 * step.log_variance) * unit_noise[b]
    return result


def ddim_step(schedule: Schedule, noisy: Array, output: Array, t: int) -> Array:
    """x_{t-1} = sqrt(alpha_bar_prev) x_0 + sqrt(1 - alpha_bar_prev) epsilon: DDIM eq. 12 with sigma = 0. v is unused.

    At t = 0 alpha_bar_prev = 1, so the result is the predicted x_0.
    """
    epsilon = output[:, : noisy.shape[1]]
    bar, bar_prev = schedule.alpha_bar[t], schedule.alpha_bar_prev[t]
    clean = (noisy - math.sqrt(1.0 - bar) * epsilon) / math.sqrt(bar)
    return math.sqrt(bar_prev) * clean + math.sqrt(1.0 - bar_prev) * epsilon


def run_chain(
    schedule: Schedule, model: Callable[[Array, int], Array], start: Array, unit_noise: Sequence[Array] | None
) -> Array:
    """Walk the chain from its last index to 0. model(x, timestep) -> [B, 2 C, ...]; unit_noise[t] is used at index t.

    unit_noise None: DDIM; otherwise ancestral.
    """
    x = start
    for t in reversed(range(len(schedule))):
        output = model(x, schedule.model_timesteps[t])
        if unit_noise is None:
            x = ddim_step(schedule, x, output, t)
        else:
            x = ancestral_step(schedule, x, output, t, unit_noise[t])
    return x
