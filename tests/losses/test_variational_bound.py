"""The chain of DDPM and its bound, in float64, against an independent transcription."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffusers_eqvae.diffusion import DiffusionChain
from diffusers_eqvae.losses.diffusion import flow_matching_loss, variational_bound

from ..golden import ddpm_reference as reference

CHAIN = DiffusionChain(dtype=torch.float64)
STEPS = [0, 0, 1, 500, 999]


def arrays(seed: int = 0):
    """Clean values beyond +-1 and at the edges of its bins; an output near the truth, so that no mass is floored."""
    rng = np.random.default_rng(seed)
    clean = 0.8 * rng.normal(size=(5, 4, 3, 3))
    clean[0, 0, 0] = [-1.0, 1.0, 0.9995]
    noise = rng.normal(size=clean.shape)
    output = np.concatenate([noise + 0.05 * rng.normal(size=clean.shape), rng.uniform(-1.2, 1.2, clean.shape)], axis=1)
    return clean, noise, output


def test_the_chain_is_the_transcription():
    schedule, steps = reference.dit_schedule(), torch.arange(1000)
    clean, noisy = torch.randn(2, 1000, 3, dtype=torch.float64)
    mean, log_variance = CHAIN.posterior(clean, noisy, steps)
    coefficients = (torch.from_numpy(each)[:, None] for each in (schedule.coef_x0, schedule.coef_xt))
    torch.testing.assert_close(
        mean, sum(a * x for a, x in zip(coefficients, (clean, noisy), strict=True)), rtol=1e-10, atol=1e-12
    )
    torch.testing.assert_close(log_variance[:, 0], torch.from_numpy(schedule.posterior_log_variance_clipped))
    expected = reference.add_noise(schedule, clean.numpy(), noisy.numpy(), range(1000))
    torch.testing.assert_close(CHAIN.interpolate(clean, noisy, steps), torch.from_numpy(expected))
    torch.testing.assert_close(
        CHAIN.clean_from_noise(noisy, torch.from_numpy(expected), steps), clean, rtol=0, atol=1e-9
    )
    ends = CHAIN.learned_log_variance(torch.ones(1000, 1, dtype=torch.float64), steps)
    torch.testing.assert_close(ends[:, 0], torch.from_numpy(np.log(schedule.betas)))


def test_loss_and_gradient_are_the_transcriptions():
    clean, noise, output = arrays()
    schedule = reference.dit_schedule()
    expected = reference.training_terms(schedule, clean, noise, STEPS, output)
    given = torch.from_numpy(output).requires_grad_()
    x0, eps, steps = torch.from_numpy(clean), torch.from_numpy(noise), torch.tensor(STEPS)
    noisy = CHAIN.interpolate(x0, eps, steps)
    bound = variational_bound(CHAIN, given[:, :4], given[:, 4:], clean=x0, noisy=noisy, steps=steps)
    torch.testing.assert_close(bound, torch.from_numpy(expected.vb), rtol=1e-9, atol=1e-12)
    (flow_matching_loss(given[:, :4], eps) + bound).sum().backward()
    gradient = reference.output_gradient(schedule, clean, noise, STEPS, output)
    torch.testing.assert_close(given.grad, torch.from_numpy(gradient), rtol=1e-5, atol=1e-9)


def test_the_bound_of_the_posterior_itself_is_zero_and_otherwise_not():
    clean, noise = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    steps = torch.tensor([1, 10, 100])
    noisy = CHAIN.interpolate(clean, noise, steps)
    low = -torch.ones_like(noise)
    exact = variational_bound(CHAIN, noise, low, clean=clean, noisy=noisy, steps=steps)
    torch.testing.assert_close(exact, torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    for other in ((noise + 0.1, low), (noise, low + 0.5)):
        assert (variational_bound(CHAIN, *other, clean=clean, noisy=noisy, steps=steps) > 1e-9).all()


def test_half_precision_outputs_are_judged_in_float32():
    chain = DiffusionChain()
    clean, noise = torch.randn(2, 2, 4, 2, 2)
    steps = torch.tensor([0, 700])
    noisy = chain.interpolate(clean, noise, steps)
    bound = variational_bound(chain, noise.bfloat16(), noise.bfloat16(), clean=clean, noisy=noisy, steps=steps)
    assert bound.dtype == torch.float32 and bound.isfinite().all()


def test_a_model_without_a_variance_is_refused():
    x = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ValueError, match="The predicted noise and the learned variance must have equal shapes"):
        variational_bound(DiffusionChain(), x, x[:, :0], clean=x, noisy=x, steps=torch.tensor([3]))


@pytest.mark.parametrize("spread", [0.3, 0.8])
def test_the_bound_of_gaussian_data_is_the_analytic_one(spread):
    """Of x_0 ~ N(mean, spread^2) and the exact noise E[noise | x_t], the mean over data and noise is

        (log(s / b) - 1 + (b + c^2 Var(x_0 | x_t)) / s) / 2,    b the posterior's variance, s the predicted one,

    with c the posterior mean's factor of x_0; it is least at s = b + c^2 Var(x_0 | x_t), the true variance of a step.
    """
    steps, mean = [1, 2, 20, 300, 999], 0.2
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)  # exact: the terms are squares of Gaussians
    weights = torch.from_numpy(np.outer(weights, weights).ravel() / weights.sum() ** 2)
    first, second = (torch.from_numpy(each.ravel()) for each in np.meshgrid(nodes, nodes))
    schedule = reference.dit_schedule()
    for step in steps:
        t = torch.full((len(first),), step)
        clean, noise = mean + spread * first[:, None], second[:, None]
        noisy = CHAIN.interpolate(clean, noise, t)
        product = float(np.prod(1 - schedule.betas[: step + 1]))
        variance = product * spread**2 + 1 - product
        exact = math.sqrt(1 - product) * (noisy - math.sqrt(product) * mean) / variance
        left = spread**2 * (1 - product) / variance  # Var(x_0 | x_t)
        low, high = float(np.exp(schedule.posterior_log_variance_clipped[step])), float(schedule.betas[step])
        true = low + schedule.coef_x0[step] ** 2 * left
        given = torch.tensor([-0.5, 0.7, 2 * math.log(true / low) / math.log(high / low) - 1], dtype=torch.float64)
        given.requires_grad_()
        slope = 0.5 * math.log(high / low)  # of log s in the output
        for output, predicted in zip(given, (low**0.75 * high**0.25, low**0.15 * high**0.85, true), strict=True):
            bound = variational_bound(CHAIN, exact, output.expand_as(exact), clean=clean, noisy=noisy, steps=t)
            found = (weights * bound).sum() * math.log(2)
            analytic = 0.5 * (math.log(predicted / low) - 1 + true / predicted)
            assert found.item() == pytest.approx(analytic, rel=1e-6, abs=1e-12)
            (gradient,) = torch.autograd.grad(found, given)
            expected = 0.5 * slope * (1 - true / predicted)
            assert gradient.sum().item() == pytest.approx(expected, rel=1e-6, abs=1e-9 * slope)
