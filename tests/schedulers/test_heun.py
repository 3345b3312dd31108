"""Heun's method, of the SDE and of the ODE: orders where the law is known, and what SiT's and REPA's code does."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from diffusers_eqvae.flow import DIFFUSION_FORMS, diffusion_coefficient
from diffusers_eqvae.guidance import IntervalGuidance
from diffusers_eqvae.schedulers import scheduling_flow_match_sde as sde
from diffusers_eqvae.schedulers.scheduling_flow_match_ode import FlowMatchODEScheduler
from diffusers_eqvae.schedulers.scheduling_flow_match_sde import FlowMatchSDEScheduler

from .test_flow_match_schedulers import STD, gaussian_velocity, randn, sample


def responses(solver: str, steps: int, monkeypatch, **options) -> tuple[float, Tensor]:
    """Where the noisy part of the way ends, at sigma = .04, as the affine function of its standard normals that it is.

    Returns:
        What it gives for zeros, and its slopes: in the initial noise, and in the normal of each of the steps.
    """
    scheduler = FlowMatchSDEScheduler(sde_solver=solver, **options)
    scheduler.set_timesteps(steps + 1)
    normals = torch.eye(steps + 2, dtype=torch.float64)[:, : steps + 1]  # the last sample has none
    drawn = iter(normals.T[1:])
    x = normals[:, 0]
    if solver == "heun":  # its first noise is in the beginning
        first = math.sqrt(scheduler.init_noise_sigma**2 - 1)
        x = x + first * next(drawn)
    monkeypatch.setattr(sde, "randn_tensor", lambda shape, **options: next(drawn))
    for timestep, sigma in zip(scheduler.timesteps[:-1], scheduler.sigma_list[:-1], strict=True):
        x = scheduler.step(gaussian_velocity(x, sigma), timestep, x).prev_sample
    assert next(drawn, None) is None
    return x[-1].item(), x[:-1] - x[-1]


def strong_error(solver: str, steps: int, monkeypatch, *, finer: int = 8) -> float:
    """Root mean square distance to a grid `finer` times as fine that is driven by the same Brownian motion."""
    mean, slopes = responses(solver, steps, monkeypatch)
    other_mean, other = responses("euler_maruyama", finer * steps, monkeypatch)
    spread = torch.cat([slopes[:1], slopes[1:].repeat_interleave(finer) / math.sqrt(finer)])
    return math.sqrt((mean - other_mean) ** 2 + (spread - other).square().sum().item())


def decay(form: str) -> float:
    """d x_.04 / d x_1 in expectation: exp of the integral over sigma of d (w score - v) / d x."""

    def rate(sigma: float) -> float:
        variance = (1 - sigma) ** 2 * STD**2 + sigma**2
        return -(diffusion_coefficient(sigma, form) + sigma - (1 - sigma) * STD**2) / variance

    return math.exp(quad(rate, 0.04, 1.0, epsabs=1e-13, epsrel=1e-13)[0])


@pytest.mark.parametrize("form", ["sigma", "constant", "decreasing"])
@pytest.mark.parametrize(("solver", "of_mean"), [("euler_maruyama", 1), ("heun", 2)])
def test_weak_orders(solver, of_mean, form, monkeypatch):
    """Of the mean from a given start and of the variance, (1 - sigma)^2 std^2 + sigma^2 for every form."""
    exact, errors = (decay(form), 0.96**2 * STD**2 + 0.04**2), []
    for steps in (256, 512):
        _, slopes = responses(solver, steps, monkeypatch, diffusion_form=form)
        found = slopes[0].item(), slopes.square().sum().item()
        errors.append([abs(one - other) for one, other in zip(found, exact, strict=True)])
    assert [math.log2(a / b) for a, b in zip(*errors, strict=True)] == pytest.approx([of_mean, 1], abs=0.1)


@pytest.mark.parametrize("solver", ["euler_maruyama", "heun"])
def test_strong_order_is_one_since_the_noise_is_additive(solver, monkeypatch):
    errors = [strong_error(solver, steps, monkeypatch) for steps in (32, 64)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("form", DIFFUSION_FORMS)
def test_its_steps_are_sits(form):
    """Written out in SiT's axes, t = 1 - sigma: noise first, then Heun's step of the drift v + w score from there."""
    x, options = randn(2, 4, 3, 3), {"diffusion_form": form, "diffusion_norm": 0.7, "last_step": "Mean"}
    scheduler = FlowMatchSDEScheduler(sde_solver="heun", **options)
    scheduler.set_timesteps(5)
    assert scheduler.order == 2 and len(scheduler.timesteps) == 9  # one call for the last step
    grid = [0.24 * k for k in range(5)]
    assert scheduler.sigma_list == pytest.approx([1 - t for k in range(4) for t in grid[k : k + 2]] + [0.04])

    def drift(x: Tensor, t: float, instead: float) -> Tensor:
        velocity = -gaussian_velocity(x, 1 - t)
        w = diffusion_coefficient(1 - (instead if form == "SBDM" and t == 0 else t), form, norm=0.7)
        return velocity + w * (t * velocity - x) / (1 - t)

    generator, dt = torch.Generator().manual_seed(3), 0.24
    expected = scheduler.init_noise_sigma * x
    for step, t in enumerate(grid[:-1]):
        w = diffusion_coefficient(1 - (grid[1] if form == "SBDM" and t == 0 else t), form, norm=0.7)
        if step == 0:
            assert scheduler.init_noise_sigma == pytest.approx(math.sqrt(1 + 2 * w * dt))
        else:
            normal = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            expected = expected + math.sqrt(2 * w * dt) * normal
        slope = drift(expected, t, grid[1])
        expected = expected + dt / 2 * (slope + drift(expected + dt * slope, t + dt, t + dt))
    expected = expected + 0.04 * drift(expected, 0.96, 1.0)
    drawn = sample(scheduler, 5, x, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawn, expected, rtol=1e-10, atol=1e-10)


def test_a_sample_does_not_depend_on_its_batch():
    noise = randn(3, 2, 3, 3)

    def run(indices: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(100 + i) for i in indices]
        return sample(FlowMatchSDEScheduler(sde_solver="heun"), 6, noise[indices], generator=generators)

    torch.testing.assert_close(run([2, 0]), run([0, 1, 2])[[2, 0]], rtol=0, atol=1e-12)


def repas_heun(guided, x: Tensor, steps: int, interval) -> tuple[list[Tensor], int]:
    """REPA's loop, from its code: the first call's level decides on guidance for both, and the last step is Euler's.

    Returns:
        The state after each step, and the number of calls.
    """
    grid, states, calls = [1 - k / steps for k in range(steps + 1)], [], 0
    for index, (now, after) in enumerate(pairwise(grid)):
        inside = interval[0] <= now <= interval[1]
        slope = guided(x, now, inside)
        end, calls = x + (after - now) * slope, calls + 1
        if index < steps - 1:
            end, calls = x + (after - now) * 0.5 * (slope + guided(end, after, inside)), calls + 1
        states.append(end)
        x = end
    return states, calls


@pytest.mark.parametrize(("interval", "differs"), [((0.0, 1.0), 9), ((0.0, 0.75), 2), ((0.15, 1.0), 8)])
def test_where_the_ode_parts_from_repas_heun(interval, differs):
    """Ten steps of both. With guidance everywhere only the last one differs: REPA's is Euler's, of one call instead of
    two. With an interval the first that differs is the one that crosses its bound."""
    noise, labels = randn(5, 1, 1, 1), torch.zeros(5, dtype=torch.long)

    def velocity(x: Tensor, sigma: float, label: float) -> Tensor:
        return gaussian_velocity(x, sigma) + 0.3 * label

    def guided(x: Tensor, sigma: float, inside: bool) -> Tensor:
        return velocity(x, sigma, 1.0 + 1.5 * inside)  # null 0, label 1, scale 2.5

    theirs, their_calls = repas_heun(guided, noise, 10, interval)
    guidance = IntervalGuidance(
        lambda x, timestep, labels: velocity(x, timestep[0].item() / 1000, 1.0 - labels.view(-1, 1, 1, 1).double()),
        guidance_scale=2.5,
        guidance_interval=interval,
        null_class=1,
        batched=False,
    )
    scheduler = FlowMatchODEScheduler(solver="heun")
    scheduler.set_timesteps(10)
    x, ours = noise, []
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigma_list, strict=True):
        x = scheduler.step(guidance(x, sigma, labels), timestep, x).prev_sample
        ours.append(x)
    equal = [torch.allclose(a, b, atol=1e-6) for a, b in zip(ours[1::2], theirs, strict=True)]
    assert equal.index(False) == differs and (len(ours), their_calls) == (20, 19)
    if differs == 9:
        last = ours[17] - 0.1 * guided(ours[17], 0.1, True)
        torch.testing.assert_close(last, theirs[9], atol=1e-6, rtol=0)


def test_sits_fixed_grid_of_n_has_one_step_less():
    """Its n points from noise to data are n - 1 steps, which here are asked for as n - 1."""
    x, points = randn(4), torch.linspace(0, 1, 8, dtype=torch.float64).tolist()
    expected = x
    for now, after in pairwise(points):
        expected = expected - (after - now) * gaussian_velocity(expected, 1 - now)
    torch.testing.assert_close(sample(FlowMatchODEScheduler(), 7, x), expected, atol=1e-12, rtol=0)
