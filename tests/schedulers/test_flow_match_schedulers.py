"""Laws of the flow-matching schedulers, on Gaussian data whose velocity is known in closed form."""

from __future__ import annotations

import logging
import math
from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from diffusers_eqvae.flow import (
    DIFFUSION_FORMS,
    FLOW_PREDICTIONS,
    PATHS,
    alpha_beta,
    derivatives,
    sigma_interval,
    velocity_to_clean,
    velocity_to_noise,
    velocity_to_score,
)
from diffusers_eqvae.schedulers.scheduling_flow_match_ode import FlowMatchODEScheduler
from diffusers_eqvae.schedulers.scheduling_flow_match_sde import FlowMatchSDEScheduler

MEAN, STD = 0.7, 0.4
SCHEDULERS = [FlowMatchODEScheduler, lambda: FlowMatchODEScheduler(solver="heun"), FlowMatchSDEScheduler]


def gaussian_velocity(x: Tensor, sigma: float, path: str = "linear") -> Tensor:
    """E[v | x] for clean data N(MEAN, STD^2)."""
    alpha, beta = alpha_beta(sigma, path)
    d_alpha, d_beta = derivatives(sigma, path)
    slope = (d_alpha * alpha * STD**2 + d_beta * beta) / (alpha**2 * STD**2 + beta**2)
    return d_alpha * MEAN + slope * (x - alpha * MEAN)


def gaussian_prediction(x: Tensor, sigma: float, config) -> Tensor:
    """The exact predictor of the scheduler's prediction type."""
    velocity = gaussian_velocity(x, sigma, config.path)
    convert = {"sample": velocity_to_clean, "epsilon": velocity_to_noise, "score": velocity_to_score}
    kind = config.prediction_type
    return velocity if kind == "flow_prediction" else convert[kind](velocity, x, sigma, config.path)


def flow_map(noise: Tensor, config) -> Tensor:
    """Where the exact ODE takes `noise` from the highest noise level to the lowest: it keeps (x - mean) / std."""
    low, high = sigma_interval(config.path, config.prediction_type)
    (alpha, beta), (first, second) = alpha_beta(low, config.path), alpha_beta(high, config.path)
    standardised = (noise - first * MEAN) / math.hypot(first * STD, second)
    return alpha * MEAN + math.hypot(alpha * STD, beta) * standardised


def sample(scheduler, steps: int, noise: Tensor, *, generator=None) -> Tensor:
    scheduler.set_timesteps(steps)
    x = noise * scheduler.init_noise_sigma
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigma_list, strict=True):
        prediction = gaussian_prediction(scheduler.scale_model_input(x, timestep), sigma, scheduler.config)
        x = scheduler.step(prediction, timestep, x, generator=generator).prev_sample
    return x


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_ode_converges_with_its_order(solver, order, path, shift):
    """The vp path's velocity rises steeply towards sigma = 0 and takes smaller steps to show it."""
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)
    steps = (2048, 4096, 8192) if path == "vp" else (128, 256, 512)
    scheduler = FlowMatchODEScheduler(solver=solver, path=path, shift=shift)
    exact = flow_map(noise, scheduler.config)
    errors = [(sample(scheduler, n, noise) - exact).abs().max().item() for n in steps]
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert slopes[-1] == pytest.approx(order, abs=0.08)
    assert slopes[-2] == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", FLOW_PREDICTIONS)
def test_every_prediction_gives_the_samples_of_the_velocity(kind, path):
    """The same end to the errors of the grid, which begins .001 lower and ends .001 higher for some."""
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)
    scheduler = FlowMatchODEScheduler(solver="heun", path=path, prediction_type=kind)
    exact = flow_map(noise, scheduler.config)
    assert torch.allclose(sample(scheduler, 500, noise), exact, atol=2e-3)
    assert torch.allclose(exact, MEAN + STD * noise, atol=2e-2)
    sde = FlowMatchSDEScheduler(path=path, prediction_type=kind, last_step="Euler", last_step_size=0.01)
    drawn = sample(sde, 250, randn(10_000), generator=torch.Generator().manual_seed(1))
    assert drawn.mean().item() == pytest.approx(MEAN, abs=4 * STD / 100 + 0.005)
    assert drawn.std().item() == pytest.approx(STD, rel=0.05)


@pytest.mark.parametrize("build", SCHEDULERS)
def test_a_shift_moves_the_grid_towards_noise(build):
    scheduler = type(build()).from_config(build().config, shift=3.0)
    plain = build()
    for each in (scheduler, plain):
        each.set_timesteps(10)
    low = plain.sigma_list[-1] if isinstance(plain, FlowMatchSDEScheduler) else 0.0
    for moved, sigma in zip(scheduler.sigma_list, plain.sigma_list, strict=True):
        fraction = (sigma - low) / (1 - low)
        assert moved == pytest.approx(low + (1 - low) * 3 * fraction / (1 + 2 * fraction))


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_n_steps_mean_n_on_the_uniform_grid(steps):
    grid = [1 - i / steps for i in range(steps + 1)]
    euler, heun = FlowMatchODEScheduler(), FlowMatchODEScheduler(solver="heun")
    euler.set_timesteps(steps)
    heun.set_timesteps(steps)
    assert (euler.order, heun.order) == (1, 2)
    assert euler.sigma_list == pytest.approx(grid[:-1])
    assert heun.sigma_list[::2] == pytest.approx(grid[:-1]) and heun.sigma_list[1::2] == pytest.approx(grid[1:])
    for scheduler in (euler, heun):
        assert len(scheduler.timesteps) == len(scheduler.sigma_list) == steps * scheduler.order
        assert scheduler.timesteps.tolist() == pytest.approx([1000 * s for s in scheduler.sigma_list])
        assert scheduler.sigmas.tolist() == pytest.approx([*scheduler.sigma_list, 0.0])
        assert scheduler.sigmas.device.type == "cpu" and all(isinstance(s, float) for s in scheduler.sigma_list)


def test_euler_equals_diffusers_on_the_same_grid():
    ours, theirs = FlowMatchODEScheduler(), FlowMatchEulerDiscreteScheduler()
    steps, x = 20, randn(2, 4, 3, 3, dtype=torch.float32)
    ours.set_timesteps(steps)
    theirs.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    assert torch.allclose(ours.timesteps, theirs.timesteps, atol=1e-3)
    a = b = x
    for i in range(steps):
        a = ours.step(gaussian_velocity(a, ours.sigma_list[i]), ours.timesteps[i], a).prev_sample
        b = theirs.step(gaussian_velocity(b, ours.sigma_list[i]), theirs.timesteps[i], b).prev_sample
    assert torch.allclose(a, b, atol=1e-6)


def test_sde_takes_n_minus_one_noisy_steps_and_a_last_one():
    scheduler = FlowMatchSDEScheduler()
    scheduler.set_timesteps(250)
    sigmas = scheduler.sigma_list
    assert len(sigmas) == len(scheduler.timesteps) == 250 and scheduler.order == 1
    assert (sigmas[0], sigmas[-1]) == pytest.approx((1.0, 0.04))
    assert {round(a - b, 12) for a, b in pairwise(sigmas)} == {round(0.96 / 249, 12)}
    scheduler = FlowMatchSDEScheduler(last_step=None)
    scheduler.set_timesteps(10)
    assert scheduler.sigma_list == pytest.approx([1 - i / 10 for i in range(10)])


def test_one_sde_step_is_sits_formula():
    """In SiT's axes, t = 1 - sigma: drift = v + w score, noise sqrt(2 w dt), score = (t v - x) / (1 - t)."""
    scheduler, x, v = FlowMatchSDEScheduler(), randn(2, 4, 3, 3), randn(2, 4, 3, 3, seed=1)
    scheduler.set_timesteps(25)
    for index in (5, 24):
        t = 1 - scheduler.sigma_list[index]
        drift = v + (1 - t) * (t * v - x) / (1 - t)
        expected = x + 0.04 * drift
        if index == 5:
            expected = expected + math.sqrt(2 * (1 - t) * 0.04) * randn(2, 4, 3, 3, seed=3)
        scheduler.set_timesteps(25)
        generator = torch.Generator().manual_seed(3)
        out = scheduler.step(-v, scheduler.timesteps[index], x, generator=generator).prev_sample
        assert torch.allclose(out, expected, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", DIFFUSION_FORMS)
def test_the_sde_reproduces_mean_and_variance(form, path):
    scheduler = FlowMatchSDEScheduler(diffusion_form=form, path=path, last_step="Euler", last_step_size=0.01)
    count = 10_000
    x = sample(scheduler, 250, randn(count), generator=torch.Generator().manual_seed(1))
    # four standard errors of the estimates, and the discretisation's own bias.
    assert x.mean().item() == pytest.approx(MEAN, abs=4 * STD / count**0.5 + 0.005)
    assert x.std().item() == pytest.approx(STD, rel=4 / (2 * count) ** 0.5 + 0.02)


@pytest.mark.parametrize("last_step", ["Mean", "Tweedie", "Euler", None])
def test_every_last_step_ends_at_the_data(last_step):
    scheduler = FlowMatchSDEScheduler(last_step=last_step)
    x = sample(scheduler, 250, randn(10_000), generator=torch.Generator().manual_seed(1))
    assert x.mean().item() == pytest.approx(MEAN, abs=4 * STD / 100)
    assert x.std().item() == pytest.approx(STD, rel=0.04)


def test_last_steps_in_closed_form():
    x, v, sigma = randn(2, 3), randn(2, 3, seed=1), 0.04
    noise = x + (1 - sigma) * v
    expected = {"Mean": x - sigma * v - sigma * noise, "Tweedie": x - sigma * v, "Euler": x - sigma * v}
    for last_step, value in expected.items():
        scheduler = FlowMatchSDEScheduler(last_step=last_step)
        scheduler.set_timesteps(3)
        scheduler.set_begin_index(2)
        out = scheduler.step(v, scheduler.timesteps[2], x).prev_sample
        assert torch.allclose(out, value, atol=1e-12)


def test_without_diffusion_the_sde_is_the_ode():
    noise = randn(100)
    sde = FlowMatchSDEScheduler(diffusion_norm=0.0, last_step=None)
    assert torch.allclose(sample(sde, 20, noise), sample(FlowMatchODEScheduler(), 20, noise), atol=1e-12)


def test_per_sample_generators_do_not_depend_on_the_batch():
    noise = randn(4, 2, 3, 3)

    def run(indices: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(100 + i) for i in indices]
        return sample(FlowMatchSDEScheduler(), 10, noise[indices], generator=generators)

    everything = run([0, 1, 2, 3])
    assert torch.allclose(run([2, 0]), everything[[2, 0]], atol=1e-12)
    assert torch.allclose(run([3]), everything[[3]], atol=1e-12)
    assert not torch.allclose(everything[0] - noise[0], everything[1] - noise[1])


@pytest.mark.parametrize("build", SCHEDULERS)
def test_dtype_is_kept_and_arithmetic_is_float32(build):
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        scheduler = build()
        scheduler.set_timesteps(4)
        x = randn(1, 4, 2, 2).to(dtype)
        (out,) = scheduler.step(x.bfloat16(), scheduler.timesteps[0], x, return_dict=False)
        assert out.dtype == dtype


@pytest.mark.parametrize("build", SCHEDULERS)
def test_steps_are_counted_and_may_begin_later(build):
    scheduler, x = build(), torch.zeros(1, 4, 2, 2)
    scheduler.set_timesteps(4)
    assert scheduler.step_index is None
    begin = 2
    scheduler.set_begin_index(begin)
    assert scheduler.begin_index == begin
    for count, timestep in enumerate(scheduler.timesteps[begin:], start=begin + 1):
        x = scheduler.step(x, timestep, x).prev_sample
        assert scheduler.step_index == count
    with pytest.raises(ValueError, match="All 4 steps have been taken"):
        scheduler.step(x, scheduler.timesteps[-1], x)
    scheduler.set_timesteps(4)
    assert scheduler.step_index is None and scheduler.begin_index is None
    assert scheduler.index_for_timestep(scheduler.timesteps[begin]) == begin


@pytest.mark.parametrize("build", SCHEDULERS)
@pytest.mark.parametrize("path", PATHS)
def test_scale_noise_is_the_interpolant(build, path):
    scheduler = type(build()).from_config(build().config, path=path)
    clean, noise = randn(3, 2, 2), randn(3, 2, 2, seed=1)
    timestep = torch.tensor([0.0, 250.0, 1000.0], dtype=torch.float64)
    out = scheduler.scale_noise(clean, timestep, noise)
    mixed = [alpha_beta(float(t) / 1000, path) for t in timestep]
    expected = torch.stack([alpha * x + beta * e for (alpha, beta), x, e in zip(mixed, clean, noise, strict=True)])
    assert torch.allclose(out, expected, atol=1e-12)


@pytest.fixture
def quiet(caplog, monkeypatch):
    """diffusers' logger does not propagate by itself; any line it writes at WARNING fails the test."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        yield
    assert [record.getMessage() for record in caplog.get_records("call")] == []


def public(config) -> dict:
    return {key: value for key, value in config.items() if not key.startswith("_")}


@pytest.mark.usefixtures("quiet")
def test_save_and_load_keep_the_config(tmp_path):
    for index, scheduler in enumerate(
        [
            FlowMatchODEScheduler(solver="heun", path="cosine"),
            FlowMatchSDEScheduler(diffusion_form="constant", diffusion_norm=0.5, last_step=None, last_step_size=0.1),
        ]
    ):
        folder = tmp_path / str(index)
        scheduler.save_pretrained(folder)
        loaded = type(scheduler).from_pretrained(folder)
        assert public(loaded.config) == public(scheduler.config)


@pytest.mark.usefixtures("quiet")
def test_configs_swap_quietly_and_back(monkeypatch):
    import diffusers

    for cls in (FlowMatchODEScheduler, FlowMatchSDEScheduler):
        monkeypatch.setattr(diffusers, cls.__name__, cls, raising=False)
    sde = FlowMatchSDEScheduler(diffusion_form="linear", path="cosine", num_train_timesteps=500)
    ode = FlowMatchODEScheduler.from_config(sde.config, solver="heun")
    assert (ode.config.path, ode.config.num_train_timesteps, ode.config.solver) == ("cosine", 500, "heun")
    back = FlowMatchSDEScheduler.from_config(ode.config)
    assert (back.config.diffusion_form, back.config.path) == ("linear", "cosine")
    assert FlowMatchODEScheduler.from_config(back.config).config.solver == "heun"


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("cls", [FlowMatchODEScheduler, FlowMatchSDEScheduler])
def test_saved_configs_load_as_diffusers_own_and_the_reverse(cls, tmp_path, monkeypatch):
    import diffusers

    monkeypatch.setattr(diffusers, cls.__name__, cls, raising=False)
    cls(num_train_timesteps=500).save_pretrained(tmp_path / "ours")
    stock = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "ours")
    assert stock.config.num_train_timesteps == 500
    assert cls.from_config(stock.config).config.num_train_timesteps == 500
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(tmp_path / "stock")
    assert cls.from_pretrained(tmp_path / "stock").config.path == "linear"


def stepped(scheduler, **kwargs):
    scheduler.set_timesteps(4)
    return scheduler.step(torch.zeros(2, 1), kwargs.pop("timestep", 1000.0), torch.zeros(2, 1), **kwargs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FlowMatchODEScheduler(solver="rk4"), "solver must be one of euler, heun; got 'rk4'"),
        (lambda: FlowMatchODEScheduler(path="quadratic"), "path must be one of linear, cosine, vp"),
        (
            lambda: FlowMatchODEScheduler(prediction_type="v"),
            "prediction_type must be one of flow_prediction, epsilon",
        ),
        (lambda: FlowMatchSDEScheduler(shift=0.0), "shift is a factor and must be positive; got 0.0"),
        (lambda: FlowMatchODEScheduler(num_train_timesteps=0), "num_train_timesteps must be at least 1"),
        (lambda: FlowMatchODEScheduler().set_timesteps(0), "num_inference_steps must be at least 1"),
        (lambda: FlowMatchODEScheduler().step(torch.zeros(1), 1000.0, torch.zeros(1)), "call set_timesteps"),
        (lambda: stepped(FlowMatchODEScheduler(), timestep=999.0), "No step begins at timestep 999.0"),
        (lambda: FlowMatchODEScheduler(solver="heun").set_begin_index(1), "cannot begin at the odd index 1"),
        (lambda: FlowMatchSDEScheduler(diffusion_form="none"), "diffusion_form must be one of"),
        (lambda: FlowMatchSDEScheduler(diffusion_norm=-1.0), "diffusion_norm must be finite and >= 0"),
        (lambda: FlowMatchSDEScheduler(last_step="mean"), "last_step must be one of Mean, Tweedie, Euler, None"),
        (lambda: FlowMatchSDEScheduler(last_step_size=0.0), "last_step_size is a noise level"),
        (lambda: FlowMatchSDEScheduler(num_train_timesteps=0), "num_train_timesteps must be at least 1"),
        (
            lambda: FlowMatchSDEScheduler(sde_solver="euler"),
            "sde_solver must be one of euler_maruyama, heun; got 'euler'",
        ),
        (lambda: FlowMatchSDEScheduler(sde_solver="heun", last_step=None), r"heun' needs a last step \(Mean, Tweedie"),
        (lambda: FlowMatchSDEScheduler(sde_solver="heun").set_begin_index(2), "at index 0; use euler_maruyama"),
        (lambda: FlowMatchSDEScheduler().set_timesteps(1), "at least 2 for last_step='Mean'"),
        (lambda: FlowMatchSDEScheduler().step(torch.zeros(1), 1000.0, torch.zeros(1)), "call set_timesteps"),
        (lambda: stepped(FlowMatchSDEScheduler(), timestep=1.0), "No step begins"),
        (lambda: stepped(FlowMatchSDEScheduler(), generator=[torch.Generator()] * 3), "one per sample, 2; got 3"),
    ],
)
def test_bad_arguments_are_one_readable_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
