"""Every named sampler on a mixture of two Gaussians whose score is known: mean, covariance and class shares."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from diffusers_eqvae.flow import FLOW_PREDICTIONS, PATHS, alpha_beta, derivatives
from diffusers_eqvae.objectives.denoising import DenoisingObjective
from diffusers_eqvae.schedulers import SAMPLERS, FlowMatchODEScheduler, FlowMatchSDEScheduler, choose_scheduler
from diffusers_eqvae.schedulers.capabilities import noise_levels

from ..golden import ddpm_reference as reference

# Of diffusers' multistep solvers under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
COUNT = 4000
SHARES = torch.tensor([0.3, 0.7], dtype=torch.float64)
MEANS = torch.tensor([[-1.5, 0.5, 0.0, 0.0], [1.0, -0.5, 0.3, 0.0]], dtype=torch.float64)
STDS = torch.tensor([0.3, 0.4], dtype=torch.float64)
FLOW = FlowMatchODEScheduler()
DIFFUSION = DenoisingObjective.chain_scheduler(learned_variance=True)
FLOW_STEPS = {"saved": 100, "euler": 100, "heun": 40, "sde": 250, "sde_heun": 125, "dpmsolver++": 50, "unipc": 50}
DIFFUSION_STEPS = {"saved": 250, "ddpm": 250, "ddim": 250, "dpmsolver++": 50, "unipc": 50}


def expected_noise(x: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """E[noise | x] of x = alpha * clean + beta * noise; x is (B, 4, 1, 1)."""
    flat = x.flatten(1)
    variance = alpha**2 * STDS**2 + beta**2  # (2,)
    difference = flat[:, None] - alpha * MEANS  # (B, 2, 4)
    log = SHARES.log() - 0.5 * difference.square().sum(2) / variance - 2 * variance.log()
    posterior = log.softmax(1)  # (B, 2)
    noise = beta * difference / variance[:, None]
    return (posterior[..., None] * noise).sum(1).view_as(x)


def draw(scheduler, steps: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(COUNT, 4, 1, 1, generator=generator, dtype=torch.float64)
    scheduler.set_timesteps(steps)
    x = x * scheduler.init_noise_sigma
    flow = "path" in scheduler.config or scheduler.config.get("use_flow_sigmas", False)
    for timestep, sigma in zip(scheduler.timesteps, noise_levels(scheduler), strict=True):
        if flow:
            (alpha, beta), (d_alpha, d_beta) = alpha_beta(sigma), derivatives(sigma)
            noise = expected_noise(x, alpha, beta)
            clean = (x - beta * noise) / alpha if alpha else (SHARES @ MEANS).view(1, 4, 1, 1)
            output = d_beta * noise + d_alpha * clean
        else:
            product = float(DDPMScheduler().alphas_cumprod[int(timestep)])
            output = expected_noise(x, math.sqrt(product), math.sqrt(1 - product))
            if scheduler.config.get("variance_type") == "learned_range" and isinstance(scheduler, DDPMScheduler):
                output = torch.cat([output, -torch.ones_like(output)], dim=1)  # the posterior's variance
        noisy = isinstance(scheduler, DDPMScheduler | FlowMatchSDEScheduler)
        x = scheduler.step(output, timestep, x, **({"generator": generator} if noisy else {})).prev_sample
    return x.flatten(1)


@pytest.mark.parametrize(
    ("saved", "name", "steps"),
    [(FLOW, *each) for each in FLOW_STEPS.items()] + [(DIFFUSION, *each) for each in DIFFUSION_STEPS.items()],
    ids=[f"flow-{name}" for name in FLOW_STEPS] + [f"diffusion-{name}" for name in DIFFUSION_STEPS],
)
def test_a_sampler_reproduces_the_mixture(saved, name, steps):
    x = draw(choose_scheduler(name, saved), steps)
    second = (x - MEANS[1]).square().sum(1) / STDS[1] ** 2 < (x - MEANS[0]).square().sum(1) / STDS[0] ** 2
    assert second.double().mean().item() == pytest.approx(0.7, abs=4 * math.sqrt(0.21 / COUNT) + 0.005)
    for component, members in enumerate((x[~second], x[second])):
        error = 4 * STDS[component].item() / math.sqrt(len(members)) + 0.01
        assert members.mean(0).tolist() == pytest.approx(MEANS[component].tolist(), abs=error)
        covariance = members.T.cov() / STDS[component] ** 2
        assert covariance.flatten().tolist() == pytest.approx(torch.eye(4).flatten().tolist(), abs=0.16)


def test_every_name_is_tested():
    assert {*FLOW_STEPS, *DIFFUSION_STEPS, "dopri5"} == set(SAMPLERS)  # of dopri5 see test_flow_match_adaptive


@pytest.mark.parametrize("steps", [1000, 250, 50, 10])
def test_ancestral_sampling_is_adms(steps):
    """Steps, posterior means and learned variances of the respaced chain, against an independent transcription."""
    schedule, scheduler = reference.dit_schedule(steps), choose_scheduler("ddpm", DIFFUSION)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == schedule.model_timesteps[::-1]
    rng = np.random.default_rng(0)
    x, output = rng.normal(size=(2, 4, 3, 3)), rng.normal(size=(2, 8, 3, 3))
    for index in {0, 1, steps // 2, steps - 1}:
        noise = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        expected = reference.ancestral_step(schedule, x, output, index, noise.numpy())
        given = torch.from_numpy(output), int(scheduler.timesteps[steps - 1 - index]), torch.from_numpy(x)
        ours = scheduler.step(*given, generator=torch.Generator().manual_seed(1)).prev_sample
        # diffusers keeps its tables in float32, where 1 - alpha of the first steps has five digits.
        assert np.allclose(ours.numpy(), expected, rtol=2e-3, atol=2e-3)


def test_ddim_is_adms():
    scheduler, counts = choose_scheduler("ddim", DIFFUSION), 250
    assert isinstance(scheduler, DDIMScheduler)
    scheduler.set_timesteps(counts)
    taken = list(range(0, 1000, 4))
    assert scheduler.timesteps.tolist() == taken[::-1]
    schedule = reference.respaced_schedule(reference.dit_schedule(), taken)
    rng = np.random.default_rng(0)
    x, output = rng.normal(size=(2, 4, 3, 3)), rng.normal(size=(2, 8, 3, 3))
    for index in (0, 1, 100, 249):
        expected = reference.ddim_step(schedule, x, output, index)
        ours = scheduler.step(torch.from_numpy(output[:, :4]), taken[index], torch.from_numpy(x)).prev_sample
        assert np.allclose(ours.numpy(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: choose_scheduler("ddpm", FLOW),
            "not sample a flow-matching model; it is sampled by saved, euler",
        ),
        (
            lambda: choose_scheduler("sde", DIFFUSION),
            "not sample a diffusion model; it is sampled by saved, ddpm",
        ),
        (lambda: choose_scheduler("rk4", FLOW), "must be one of saved, euler"),
        (lambda: choose_scheduler("heun", FLOW, last_step="Mean"), "has no last_step; it has shift"),
        (lambda: choose_scheduler("ddpm", DIFFUSION, shift=2.0), "has no shift; it has none"),
        (lambda: choose_scheduler("unipc", FlowMatchODEScheduler(path="cosine")), "on the linear path alone"),
    ],
)
def test_what_does_not_belong_together_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("path", PATHS)
def test_every_path_and_prediction_gives_the_same_samples_of_the_mixture(path):
    """From the same noise and the exact predictor: the same end, but for where a grid begins and ends."""
    ends = {}
    for kind in FLOW_PREDICTIONS:
        scheduler = FlowMatchODEScheduler(solver="heun", path=path, prediction_type=kind)
        scheduler.set_timesteps(300)
        x = torch.randn(1000, 4, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for timestep, sigma in zip(scheduler.timesteps, scheduler.sigma_list, strict=True):
            alpha, beta = alpha_beta(sigma, path)
            noise = expected_noise(x, alpha, beta)
            clean = (x - beta * noise) / alpha if alpha > 1e-12 else (SHARES @ MEANS).view(1, 4, 1, 1).expand_as(x)
            if kind == "flow_prediction":
                d_alpha, d_beta = derivatives(sigma, path)
                said = d_alpha * clean + d_beta * noise
            else:
                said = {"epsilon": noise, "sample": clean, "score": -noise / beta}[kind] if beta else noise
            x = scheduler.step(said, timestep, x).prev_sample
        ends[kind] = x.flatten(1)
    first = ends.pop("flow_prediction")
    second = (first - MEANS[1]).norm(dim=1) < (first - MEANS[0]).norm(dim=1)
    assert second.double().mean().item() == pytest.approx(0.7, abs=0.05)
    for kind, x in ends.items():
        distance = (x - first).norm(dim=1)
        assert distance.quantile(0.99) < 0.02, kind  # who stood between the components may have gone to the other
