"""Laws of the interpolants: derivatives, inverses, and agreement with SiT's formulas on SiT's axis."""

from __future__ import annotations

import math

import pytest
import torch

from diffusers_eqvae import flow
from diffusers_eqvae.flow import DIFFUSION_FORMS, FLOW_PREDICTIONS, LOSS_WEIGHTINGS, PATHS

from ..golden import flow_reference as reference

SIGMAS = (0.02, 0.3, 0.5, 0.77, 0.98)


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(len(SIGMAS), 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.fixture
def sigmas() -> torch.Tensor:
    return torch.tensor(SIGMAS, dtype=torch.float64)


@pytest.mark.parametrize("path", PATHS)
def test_sigma_0_is_data_and_1_is_noise(path, pair):
    clean, noise = pair
    assert torch.allclose(flow.interpolate(clean, noise, 0.0, path), clean, atol=1e-15)
    # The vp path ends at exp(-5.025) of the data.
    left = 0.0066 if path == "vp" else 0.0
    assert torch.allclose(flow.interpolate(clean, noise, 1.0, path), noise, atol=1e-15 + 4 * left)


def test_linear_path_is_diffusers_convention(pair, sigmas):
    clean, noise = pair
    sigma = sigmas.view(-1, 1, 1, 1)
    assert torch.allclose(flow.interpolate(clean, noise, sigmas), (1 - sigma) * clean + sigma * noise)
    assert torch.equal(flow.velocity_target(clean, noise, sigmas), noise - clean)


@pytest.mark.parametrize("path", PATHS)
def test_velocity_is_the_derivative_by_sigma(path, pair, sigmas):
    clean, noise = pair
    h = 1e-6
    later, earlier = (flow.interpolate(clean, noise, sigmas + step, path) for step in (h, -h))
    assert torch.allclose(flow.velocity_target(clean, noise, sigmas, path), (later - earlier) / (2 * h), atol=1e-8)
    for sigma in SIGMAS:
        slopes = [
            (a - b) / (2 * h)
            for a, b in zip(flow.alpha_beta(sigma + h, path), flow.alpha_beta(sigma - h, path), strict=True)
        ]
        assert flow.derivatives(sigma, path) == pytest.approx(tuple(slopes), abs=1e-8)


@pytest.mark.parametrize("path", PATHS)
def test_conversions_recover_what_made_x(path, pair, sigmas):
    clean, noise = pair
    x, velocity = flow.interpolate(clean, noise, sigmas, path), flow.velocity_target(clean, noise, sigmas, path)
    _, beta = flow.alpha_beta(sigmas.view(-1, 1, 1, 1), path)
    assert torch.allclose(flow.velocity_to_clean(velocity, x, sigmas, path), clean, atol=1e-12)
    assert torch.allclose(flow.velocity_to_noise(velocity, x, sigmas, path), noise, atol=1e-12)
    assert torch.allclose(flow.velocity_to_score(velocity, x, sigmas, path), -noise / beta, atol=1e-10)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["clean", "noise", "score"])
def test_conversions_are_inverses_for_any_prediction(path, name, pair, sigmas):
    velocity, x = pair
    there, back = getattr(flow, f"velocity_to_{name}"), getattr(flow, f"{name}_to_velocity")
    assert torch.allclose(back(there(velocity, x, sigmas, path), x, sigmas, path), velocity, atol=1e-9)
    prediction = velocity
    assert torch.allclose(there(back(prediction, x, sigmas, path), x, sigmas, path), prediction, atol=1e-9)


@pytest.mark.parametrize("path", PATHS)
def test_score_of_gaussian_data_is_the_gradient_of_its_log_density(path):
    """Data N(m, s^2): x_sigma is N(alpha m, alpha^2 s^2 + beta^2), and E[v | x] is linear in x."""
    m, s, sigma = 0.7, 0.4, 0.35
    alpha, beta = flow.alpha_beta(sigma, path)
    d_alpha, d_beta = flow.derivatives(sigma, path)
    variance = (alpha * s) ** 2 + beta**2
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    velocity = d_alpha * m + (d_alpha * alpha * s**2 + d_beta * beta) / variance * (x - alpha * m)
    x_grad = x.clone().requires_grad_()
    log_density = -0.5 * (x_grad - alpha * m) ** 2 / variance
    (score,) = torch.autograd.grad(log_density.sum(), x_grad)
    assert torch.allclose(flow.velocity_to_score(velocity, x, sigma, path), score, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", FLOW_PREDICTIONS)
def test_agreement_with_sit_on_its_own_axis(kind, path, pair, sigmas):
    """An independent transcription, on t = 1 - sigma with v = d x / d t."""
    theirs = {"flow_prediction": "velocity", "epsilon": "noise", "sample": "clean", "score": "score"}[kind]
    sign = -1 if kind == "flow_prediction" else 1
    clean, noise = pair
    x = flow.interpolate(clean, noise, sigmas, path)
    target = flow.prediction_target(clean, noise, sigmas, prediction_type=kind, path=path)
    velocity = flow.to_velocity(noise, x, sigmas, prediction_type=kind, path=path)  # of any prediction
    for index, t in enumerate(1 - sigmas.numpy()):
        one = (path, float(t))
        expected = sign * reference.target(theirs, *one, clean[index].numpy(), noise[index].numpy())
        assert torch.allclose(target[index], torch.from_numpy(expected), rtol=1e-12)
        expected = -reference.convert(theirs, "velocity", *one, x[index].numpy(), sign * noise[index].numpy())
        assert torch.allclose(velocity[index], torch.from_numpy(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["epsilon", "score", "flow_prediction"])
@pytest.mark.parametrize("weighting", LOSS_WEIGHTINGS)
def test_loss_weights_are_sits(kind, weighting, path, sigmas):
    if kind == "flow_prediction" and weighting != "none":
        pytest.skip("refused, see below")
    theirs = {"flow_prediction": "velocity", "epsilon": "noise", "score": "score"}[kind]
    weights = flow.loss_weight(sigmas, prediction_type=kind, weighting=weighting, path=path)
    for weight, sigma in zip(weights.tolist(), SIGMAS, strict=True):
        expected = reference.loss_weight(path, theirs, weighting, 1 - sigma)
        beta = reference.path_by_level(path, sigma).noise
        assert weight == pytest.approx(expected * (beta**2 if kind == "score" else 1), rel=1e-12)
        alone = flow.loss_weight(sigma, prediction_type=kind, weighting=weighting, path=path)
        assert alone == pytest.approx(weight, rel=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["epsilon", "score", "sample"])
def test_the_velocity_weighting_is_the_velocitys_error(kind, path, pair, sigmas):
    clean, noise = pair
    x = flow.interpolate(clean, noise, sigmas, path)
    options = {"prediction_type": kind, "path": path}
    target = flow.prediction_target(clean, noise, sigmas, **options)
    prediction = target + 0.1
    error = flow.to_velocity(prediction, x, sigmas, **options) - flow.velocity_target(clean, noise, sigmas, path)
    weight = flow.loss_weight(sigmas.view(-1, 1, 1, 1), weighting="velocity", **options)
    assert torch.allclose(weight * (prediction - target) ** 2, error**2, rtol=1e-9)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["flow_prediction", "epsilon", "score"])
def test_intervals_are_sits(kind, path):
    theirs = "velocity" if kind == "flow_prediction" else {"epsilon": "noise", "score": "score"}[kind]
    for training, use in ((True, "train"), (False, "ode")):
        start, end = reference.sit_interval(path, theirs, use)
        low, high = flow.sigma_interval(path, kind, training=training)
        # SiT starts at t = .001 for every such prediction; on the vp path nothing is infinite there, and it does not.
        assert (low, high) == pytest.approx((1 - end, 1 - start), abs=1e-12)


def test_the_shift_multiplies_the_odds(sigmas):
    for shift in (0.3, 1.0, 2.0):
        moved = flow.shift_sigma(sigmas, shift)
        assert torch.allclose(moved / (1 - moved), shift * sigmas / (1 - sigmas), rtol=1e-12)
        for value, sigma in zip(moved.tolist(), SIGMAS, strict=True):
            assert value == pytest.approx(reference.shift_level(sigma, shift)) == flow.shift_sigma(sigma, shift)
    assert [flow.default_shift(*shape) for shape in ((4, 32, 32), (4, 64, 64), (16, 32, 32), (16, 16, 16))] == [
        1.0,
        1.0,
        2.0,
        1.0,
    ]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("end", [0, 1])
def test_clean_and_noise_are_finite_at_both_ends(path, end, pair):
    velocity, x = pair
    sigma = flow.sigma_interval(path)[end]
    assert flow.velocity_to_clean(velocity, x, sigma, path).isfinite().all()
    assert flow.velocity_to_noise(velocity, x, sigma, path).isfinite().all()


def test_a_float_a_scalar_tensor_and_one_value_per_sample_mean_the_same(pair):
    clean, noise = pair
    expected = flow.interpolate(clean, noise, 0.3, "cosine")
    assert torch.allclose(flow.interpolate(clean, noise, torch.tensor(0.3, dtype=torch.float64), "cosine"), expected)
    each = torch.full((len(clean),), 0.3, dtype=torch.float64)
    assert torch.allclose(flow.interpolate(clean, noise, each, "cosine"), expected)
    assert all(isinstance(value, float) for value in (*flow.alpha_beta(0.3, "cosine"), *flow.derivatives(0.3)))


def test_uniform_sigmas_are_the_uniform_numbers():
    uniform = torch.rand(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(flow.sample_sigmas(uniform), uniform)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.8, 0.5)])
def test_logit_normal_sigmas_have_a_normal_logit(mean, std):
    uniform = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    sigma = flow.sample_sigmas(uniform, "logit_normal", mean=mean, std=std)
    assert ((sigma > 0) & (sigma < 1)).all()
    logit = torch.logit(sigma)
    assert logit.mean().item() == pytest.approx(mean, abs=1e-6)
    assert logit.std().item() == pytest.approx(std, abs=1e-3)
    assert flow.sample_sigmas(torch.tensor([0.5]), "logit_normal", mean=mean).item() == pytest.approx(
        1 / (1 + math.exp(-mean))
    )


@pytest.mark.parametrize("path", PATHS)
def test_diffusion_forms_in_closed_form(path):
    sigma, norm = 0.3, 1.7
    t = 1 - sigma
    alpha, beta = flow.alpha_beta(sigma, path)
    d_alpha, d_beta = flow.derivatives(sigma, path)
    expected = {
        "constant": norm,
        "SBDM": norm * (beta * d_beta - beta**2 * d_alpha / alpha),
        "sigma": norm * beta,
        "linear": norm * (1 - t),
        "decreasing": 0.25 * (norm * math.cos(math.pi * t) + 1) ** 2,
        "increasing-decreasing": norm * math.sin(math.pi * t) ** 2,
    }
    assert set(expected) == set(DIFFUSION_FORMS)
    for form, value in expected.items():
        assert flow.diffusion_coefficient(sigma, form, norm=norm, path=path) == pytest.approx(value, rel=1e-12)
        as_tensor = flow.diffusion_coefficient(torch.tensor([sigma], dtype=torch.float64), form, norm=norm, path=path)
        assert as_tensor.item() == pytest.approx(value, rel=1e-12)
    assert flow.diffusion_coefficient(sigma, "SBDM") == pytest.approx(sigma / (1 - sigma))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flow.alpha_beta(0.5, "quadratic"), "path must be one of linear, cosine, vp; got 'quadratic'"),
        (lambda: flow.derivatives(0.5, "ve"), "path must be one of"),
        (lambda: flow.to_velocity(None, None, 0.5, prediction_type="v"), "prediction_type must be one of"),
        (lambda: flow.loss_weight(0.5, weighting="velocity"), "no velocity weighting of a flow_prediction"),
        (lambda: flow.loss_weight(0.5, prediction_type="sample", weighting="likelihood"), "no likelihood weighting"),
        (lambda: flow.sample_sigmas(torch.rand(2), "beta"), "distribution must be one of"),
        (lambda: flow.sample_sigmas(torch.rand(2), "logit_normal", std=0.0), "std of the logit-normal"),
        (lambda: flow.diffusion_coefficient(0.5, "quadratic"), "diffusion form must be one of"),
        (lambda: flow.diffusion_coefficient(0.5, norm=-1.0), "norm of the diffusion must be >= 0"),
        (lambda: flow.interpolate(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3)), "one value per sample"),
    ],
)
def test_bad_arguments_are_one_readable_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
