"""Laws of guidance inside an interval: what it equals, what it costs, and which channels it touches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffusers_eqvae.guidance import (
    IntervalGuidance,
    from_flow_time,
    from_sigma_edm,
    from_step_fractions,
    validate_interval,
)

NULL = 10
GRID = [1.0 - i / 20 for i in range(21)]


class CountingDenoiser:
    """A smooth function of all three inputs that records the batch size and the timesteps of every call."""

    def __init__(self, out_channels: int = 4) -> None:
        self.calls: list[tuple[int, list[float]]] = []
        self.mix = torch.randn(out_channels, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def __call__(self, latents: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        assert latents.shape[:1] == timestep.shape == class_labels.shape
        self.calls.append((len(latents), timestep.tolist()))
        condition = (1 + class_labels + timestep.double() / 1000).view(-1, 1, 1, 1)
        return torch.einsum("oc,bchw->bohw", self.mix, torch.tanh(latents / condition)) + 0.1 * condition


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    latents = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return latents, torch.tensor([0, 4, 9])


def build(denoiser=None, **kwargs) -> IntervalGuidance:
    return IntervalGuidance(denoiser or CountingDenoiser(), null_class=NULL, **kwargs)


def plain(latents: Tensor, sigma: float, labels: Tensor) -> Tensor:
    return CountingDenoiser()(latents, torch.full((len(latents),), 1000 * sigma), labels)


def plain_cfg(latents: Tensor, sigma: float, labels: Tensor, scale: float) -> Tensor:
    unconditional = plain(latents, sigma, torch.full_like(labels, NULL))
    return unconditional + scale * (plain(latents, sigma, labels) - unconditional)


@pytest.mark.parametrize("sigma", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("scale", [1.8, 4.0, 0.5, 0.0, -1.0])
def test_the_whole_interval_is_plain_guidance(sigma, scale, inputs):
    latents, labels = inputs
    guided = build(guidance_scale=scale)(latents, sigma, labels)
    assert torch.allclose(guided, plain_cfg(latents, sigma, labels, scale), atol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 4.0, "guidance_interval": (0.0, 0.0)},
        {"guidance_scale": 4.0, "guidance_interval": (0.5, 0.5)},
        {"guidance_scale": 4.0, "guidance_interval": (1.0, 1.0)},
    ],
)
def test_scale_one_and_the_empty_interval_are_conditional_and_cost_one(settings, inputs):
    latents, labels = inputs
    guidance = build(**settings)
    for sigma in GRID:
        assert torch.equal(guidance(latents, sigma, labels), plain(latents, sigma, labels))
    assert {batch for batch, _ in guidance.denoiser.calls} == {len(labels)}
    assert guidance.nfe == len(GRID)


def test_the_denoiser_sees_b_outside_and_2b_inside(inputs):
    latents, labels = inputs
    guidance = build(guidance_scale=1.8, guidance_interval=(0.0, 0.75))
    for sigma in GRID:
        guidance(latents, sigma, labels)
    expected = [3 if sigma > 0.75 + 1e-6 else 6 for sigma in GRID]
    assert [batch for batch, _ in guidance.denoiser.calls] == expected
    assert expected.count(3) == 5
    assert guidance.nfe == 5 * 1 + 16 * 2


def test_skipping_equals_always_computing_both_with_scale_one_outside(inputs):
    latents, labels = inputs
    guidance = build(guidance_scale=1.8, guidance_interval=(0.2, 0.75))
    for sigma in GRID:
        scale = 1.8 if 0.2 - 1e-6 <= sigma <= 0.75 + 1e-6 else 1.0
        expected = plain_cfg(latents, sigma, labels, scale)
        assert torch.allclose(guidance(latents, sigma, labels), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("sigma", "inside"), [(0.75, True), (0.75 + 1e-7, True), (0.2 - 1e-7, True), (0.7501, False), (0.1999, False)]
)
def test_both_ends_belong_to_the_interval_up_to_rounding(sigma, inside):
    assert build(guidance_scale=2.0, guidance_interval=(0.2, 0.75)).is_guided_at(sigma) is inside


def test_grid_points_computed_in_floating_point_hit_the_bound():
    for steps in (4, 20, 40, 100, 1000):
        guidance = build(guidance_scale=2.0, guidance_interval=(0.0, 0.75))
        guided = sum(guidance.is_guided_at(1.0 - i * (1.0 / steps)) for i in range(steps))
        assert guided == 0.75 * steps


@pytest.mark.parametrize("n", [1, 3, 4])
def test_only_the_first_channels_are_guided(n, inputs):
    latents, labels = inputs
    out = build(guidance_scale=3.0, guided_channels=n)(latents, 0.5, labels)
    assert torch.allclose(out[:, :n], plain_cfg(latents, 0.5, labels, 3.0)[:, :n], atol=1e-12)
    assert torch.allclose(out[:, n:], plain(latents, 0.5, labels)[:, n:], atol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"latent_channels": 4}, {"guided_channels": 3}])
def test_learned_variance_channels_stay_conditional(settings, inputs):
    latents, labels = inputs
    denoiser = CountingDenoiser(out_channels=8)
    out = build(denoiser, guidance_scale=3.0, **settings)(latents, 0.5, labels)
    timestep = torch.full((3,), 500.0)
    conditional = denoiser(latents, timestep, labels)
    unconditional = denoiser(latents, timestep, torch.full_like(labels, NULL))
    n = settings.get("guided_channels", 4)
    assert torch.allclose(out[:, :n], (unconditional + 3 * (conditional - unconditional))[:, :n], atol=1e-12)
    assert torch.allclose(out[:, n:], conditional[:, n:], atol=1e-12)


def test_sequential_equals_batched_with_batches_of_b(inputs):
    latents, labels = inputs
    batched, sequential = build(guidance_scale=4.0), build(guidance_scale=4.0, batched=False)
    assert torch.allclose(batched(latents, 0.5, labels), sequential(latents, 0.5, labels), atol=1e-12)
    assert [batch for batch, _ in batched.denoiser.calls] == [6]
    assert [batch for batch, _ in sequential.denoiser.calls] == [3, 3]
    assert batched.nfe == sequential.nfe == 2.0


def test_the_timestep_is_a_thousand_sigma_and_ddpm_steps_come_back_exactly(inputs):
    latents, labels = inputs
    guidance = build(guidance_scale=2.0)
    guidance(latents, 0.25, labels)
    assert guidance.denoiser.calls[0][1] == [250.0] * 6
    guidance = build()
    for step in range(1000):
        guidance(latents[:1], step / 1000, labels[:1])
    assert [timestep for _, (timestep,) in guidance.denoiser.calls] == list(range(1000))


def test_no_host_transfer_and_dtype_kept():
    """sigma decides on the host; on the meta device any read of a tensor's value would raise."""
    latents, labels = (
        torch.zeros(2, 4, 3, 3, device="meta", dtype=torch.bfloat16),
        torch.zeros(2, device="meta").long(),
    )
    guidance = build(
        lambda x, t, y: x * t.to(x.dtype).view(-1, 1, 1, 1), guidance_scale=2.0, guidance_interval=(0, 0.5)
    )
    for sigma in (0.9, 0.3):
        assert guidance(latents, sigma, labels).dtype == torch.bfloat16


def test_other_axes():
    assert from_step_fractions(0.25, 1.0) == (0.0, 0.75)
    assert from_flow_time((0.25, 1.0)) == (0.0, 0.75)
    low, high = from_sigma_edm((0.28, 5.42))
    assert (low / (1 - low), high / (1 - high)) == pytest.approx((0.28, 5.42))
    assert from_sigma_edm((0.0, float("inf"))) == (0.0, 1.0)
    assert validate_interval([0, 1]) == (0.0, 1.0)


def test_step_fractions_guide_the_same_steps_as_on_a_uniform_grid():
    steps, (start, stop) = 40, (0.25, 0.8)
    guidance = build(guidance_scale=2.0, guidance_interval=from_step_fractions(start, stop))
    guided = [i for i in range(steps) if guidance.is_guided_at(1.0 - i / steps)]
    assert guided == [i for i in range(steps) if start <= i / steps <= stop]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build(guidance_interval=(0.8, 0.2)), "0 <= lo <= hi <= 1; got"),
        (lambda: build(guidance_interval=(0.0, 1.5)), "from_sigma_edm"),
        (lambda: build(guidance_interval=(0.5,)), "guidance_interval must be"),
        (lambda: build(guidance_interval=(float("nan"), 1.0)), "guidance_interval must be"),
        (lambda: build(guidance_scale=float("inf")), "guidance_scale must be a finite number"),
        (lambda: build(guided_channels=0), "guided_channels must lie in 1"),
        (lambda: build(guided_channels=5, latent_channels=4), "guided_channels must lie in 1 .. 4"),
        (lambda: IntervalGuidance(CountingDenoiser(), null_class=-1), "null_class"),
        (lambda: from_sigma_edm((-1.0, 2.0)), "EDM noise levels"),
        (lambda: from_step_fractions(0.5, 0.2), "Step fractions must satisfy"),
        (lambda: from_flow_time((0.5, 2.0)), "0 <= lo <= hi <= 1"),
    ],
)
def test_bad_arguments_are_one_readable_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_more_guided_channels_than_the_latents_have_is_refused(inputs):
    latents, labels = inputs
    with pytest.raises(ValueError, match=r"1 \.\. 4"):
        build(guidance_scale=2.0, guided_channels=5)(latents, 0.5, labels)


def test_a_weaker_model_guides_instead_of_the_null_class():
    """Autoguidance, arXiv 2406.02070: weak + w (strong - weak), both of the same labels, inside the interval only."""
    asked = []

    def weak(latents, timestep, labels):
        asked.append(labels.tolist())
        return 0.5 * latents

    options = {"guidance_scale": 3.0, "guidance_interval": (0.0, 0.5), "null_class": 9, "guide": weak}
    guidance = IntervalGuidance(lambda latents, timestep, labels: 2.0 * latents, **options)
    latents, labels = torch.ones(2, 4, 1, 1), torch.tensor([1, 2])
    assert torch.equal(guidance(latents, 0.9, labels), 2.0 * latents) and not asked
    assert torch.equal(guidance(latents, 0.25, labels), (0.5 + 3 * 1.5) * latents)
    assert asked == [[1, 2]] and guidance.nfe == 3.0
    with_three = IntervalGuidance(lambda latents, timestep, labels: 2.0 * latents, **options, guided_channels=3)
    assert with_three(latents, 0.25, labels)[0].flatten().tolist() == [5.0, 5.0, 5.0, 2.0]
