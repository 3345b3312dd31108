"""dopri5: against scipy's on a batch of one, independent of its batch, and as a pipeline's scheduler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from diffusers_eqvae.flow import FLOW_PREDICTIONS, PATHS
from diffusers_eqvae.guidance import IntervalGuidance
from diffusers_eqvae.schedulers import FlowMatchAdaptiveScheduler, choose_scheduler

from .test_flow_match_schedulers import flow_map, gaussian_prediction, randn

WIDTHS = torch.tensor([0.05, 0.4, 1.0, 3.0], dtype=torch.float64).view(-1, 1, 1, 1)


def velocity(x: torch.Tensor, sigma: torch.Tensor, widths: torch.Tensor = WIDTHS) -> torch.Tensor:
    """Of Gaussians of these standard deviations, one per sample: the narrow ones need more steps."""
    sigma = sigma.view(-1, 1, 1, 1)
    return (sigma - (1 - sigma) * widths**2) / ((1 - sigma) ** 2 * widths**2 + sigma**2) * x


def test_each_sample_is_scipys_solution_of_it_alone():
    noise = randn(4, 2, 2, 2)
    scheduler = FlowMatchAdaptiveScheduler(atol=1e-9, rtol=1e-9)
    together = scheduler.integrate(velocity, noise)
    for index, width in enumerate(WIDTHS.flatten().tolist()):

        def slope(way: float, flat: np.ndarray, width: float = width) -> np.ndarray:
            x = torch.from_numpy(flat).view(1, 2, 2, 2)
            return -velocity(x, torch.tensor([1 - way], dtype=torch.float64), torch.tensor(width)).flatten().numpy()

        alone = solve_ivp(slope, (0, 1), noise[index].flatten().numpy(), rtol=1e-9, atol=1e-9, method="RK45").y[:, -1]
        assert np.allclose(together[index].flatten().numpy(), alone, atol=1e-6)
    assert torch.allclose(together, WIDTHS * noise, atol=1e-6)


def test_a_sample_does_not_depend_on_its_batch():
    """At tolerances so loose that its own steps decide the result to three digits only."""
    noise, scheduler = randn(4, 2, 2, 2), FlowMatchAdaptiveScheduler()
    together = scheduler.integrate(velocity, noise)
    for index in range(4):
        alone = scheduler.integrate(
            lambda x, s, at=index: velocity(x, s, WIDTHS[at : at + 1]), noise[index : index + 1]
        )
        assert torch.allclose(together[index], alone[0], atol=1e-6)
    assert not torch.allclose(together, WIDTHS * noise, atol=1e-6)  # the tolerance does decide


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", FLOW_PREDICTIONS)
def test_every_path_and_prediction_ends_at_the_flow_map(kind, path):
    scheduler = FlowMatchAdaptiveScheduler(path=path, prediction_type=kind, rtol=1e-6)
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1, 1, 1)

    def predict(x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        rows = zip(x, sigmas.tolist(), strict=True)
        return torch.stack([gaussian_prediction(row, sigma, scheduler.config) for row, sigma in rows])

    assert torch.allclose(scheduler.integrate(predict, noise), flow_map(noise, scheduler.config), atol=1e-4)


def test_guidance_at_a_level_of_each_sample():
    """Only those inside the interval are guided, and counted twice."""
    calls = []

    def denoiser(latents, timestep, labels):
        calls.append(labels.tolist())
        return latents * (labels + 1).view(-1, 1, 1, 1) + timestep.view(-1, 1, 1, 1)

    options = {"guidance_scale": 2.0, "guidance_interval": (0.0, 0.5), "null_class": 9}
    labels, latents, sigmas = torch.tensor([1, 2, 3]), torch.ones(3, 2, 1, 1), torch.tensor([0.75, 0.5, 0.25])
    guidance = IntervalGuidance(denoiser, **options)
    together = guidance(latents, sigmas, labels)
    assert guidance.nfe == pytest.approx((1 + 2 + 2) / 3) and calls == [[2, 3, 9, 9], [1]]
    one = [
        IntervalGuidance(denoiser, **options)(latents[i : i + 1], sigmas[i].item(), labels[i : i + 1])
        for i in range(3)
    ]
    assert torch.equal(together, torch.cat(one))


def test_what_it_refuses():
    with pytest.raises(ValueError, match="finds its own steps: call integrate"):
        FlowMatchAdaptiveScheduler().step(torch.zeros(1), 1000.0, torch.zeros(1))
    with pytest.raises(ValueError, match="atol and rtol are tolerances and must be positive; got 0"):
        FlowMatchAdaptiveScheduler(atol=0.0)
    with pytest.raises(ValueError, match="dopri5 did not come to an end: the velocity is not finite"):
        FlowMatchAdaptiveScheduler().integrate(lambda x, s: x * float("nan"), randn(2, 1, 1, 1))
    with pytest.raises(ValueError, match="has no shift; it has atol, rtol"):
        choose_scheduler("dopri5", FlowMatchAdaptiveScheduler(), shift=2.0)
