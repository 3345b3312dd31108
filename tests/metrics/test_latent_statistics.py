"""Intrinsic dimension, spectrum and channel statistics on data whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffusers_eqvae.metrics.latent_statistics import (
    channel_statistics,
    high_frequency_share,
    intrinsic_dimension,
    radial_power_spectrum,
)


def manifold(dimension: int, count: int = 4000, *, seed: int = 0) -> torch.Tensor:
    """A uniform cube of `dimension` directions, rotated at random inside 50."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(50, dimension, generator=generator, dtype=torch.float64))
    return torch.rand(count, dimension, generator=generator, dtype=torch.float64) @ basis.T


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_a_manifold_has_its_dimension(dimension):
    assert intrinsic_dimension(manifold(dimension)) == pytest.approx(dimension, abs=0.3)


def test_a_curved_manifold_has_its_dimension():
    """A sphere in 4 dimensions, bent further by a nonlinear map, is 3-d."""
    points = torch.randn(4000, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    points = points / points.norm(dim=1, keepdim=True)
    assert intrinsic_dimension(torch.cat([points, points.square(), points.sin()], 1)) == pytest.approx(3, abs=0.2)


def test_the_estimator_is_its_definition():
    """Facco et al. 2017, written out with every distance in numpy."""
    points = manifold(5, 300)
    distances = np.sqrt(((points.numpy()[:, None] - points.numpy()) ** 2).sum(-1))
    nearest = np.sort(distances, axis=1)[:, 1:3]
    mu = np.sort(nearest[:, 1] / nearest[:, 0])
    kept = int(0.9 * 300)
    x, y = np.log(mu[:kept]), -np.log(1 - np.arange(1, kept + 1) / 300)
    assert intrinsic_dimension(points) == pytest.approx((x @ y) / (x @ x), rel=1e-10)


def test_dimension_depends_on_neither_order_scale_offset_nor_blocks(monkeypatch):
    points = manifold(3, 500)
    reference = intrinsic_dimension(points)
    assert intrinsic_dimension(points.flip(0) * 7 + 100) == pytest.approx(reference, rel=1e-6)
    monkeypatch.setattr("diffusers_eqvae.metrics.latent_statistics.BLOCK_POINTS", 33)
    assert intrinsic_dimension(points) == pytest.approx(reference, rel=1e-12)


def test_equal_points_count_once(caplog):
    points = manifold(3, 500)
    reference = intrinsic_dimension(points)
    assert not caplog.records
    assert intrinsic_dimension(torch.cat([points, points[:7]])) == pytest.approx(reference, rel=1e-9)
    assert "7 of 507 points" in caplog.text


@pytest.mark.parametrize(
    "points", [torch.zeros(20, 3), torch.rand(9, 3), torch.rand(20), torch.full((20, 3), math.nan)]
)
def test_too_few_or_broken_points_are_refused(points):
    with pytest.raises(ValueError, match="oints"):
        intrinsic_dimension(points)


def test_white_noise_is_flat():
    noise = 2.0 * torch.randn(64, 4, 32, 32, generator=torch.Generator().manual_seed(0)) + 5.0
    spectrum = radial_power_spectrum(noise).mean(0)
    assert spectrum[0] == 0
    assert spectrum[1:].tolist() == pytest.approx([4.0] * 16, rel=0.06)
    assert high_frequency_share(noise).mean().item() == pytest.approx(1 - math.pi / 16, abs=0.01)


@pytest.mark.parametrize(("cycles", "shape"), [(3, (32, 32)), (12, (32, 32)), (6, (16, 48)), (8, (17, 17))])
def test_a_sine_lies_in_its_bin(cycles, shape):
    wave = torch.sin(2 * math.pi * cycles * torch.arange(shape[0]) / shape[0])
    latents = wave[:, None].expand(shape).repeat(2, 3, 1, 1)
    spectrum = radial_power_spectrum(latents)
    assert spectrum.shape == (2, min(shape) // 2 + 1)
    assert (spectrum.argmax(1) == cycles).all()
    others = torch.cat([spectrum[:, :cycles], spectrum[:, cycles + 1 :]], 1)
    assert others.max() < 1e-8 * spectrum.max()
    high = cycles / shape[0] > 0.25
    assert high_frequency_share(latents).tolist() == pytest.approx([float(high)] * 2, abs=1e-6)


def test_power_adds_up_to_the_variance():
    """Parseval: the shares of all frequencies make the variance, whatever the direction."""
    latents = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rotated = torch.rot90(latents, 1, (-2, -1))
    assert torch.allclose(radial_power_spectrum(latents), radial_power_spectrum(rotated))
    checkerboard = torch.ones(1, 1, 8, 8)
    checkerboard[..., ::2, ::2] = checkerboard[..., 1::2, 1::2] = -1
    assert high_frequency_share(checkerboard).item() == pytest.approx(1.0)
    assert high_frequency_share(torch.ones(1, 2, 8, 8)).item() == 0
    with pytest.raises(ValueError, match="at least 2 positions"):
        radial_power_spectrum(torch.zeros(1, 4, 1, 8))


def test_channel_statistics_of_known_distributions():
    from scipy import stats

    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(8, 64, 64, generator=generator) * 3 + 10
    uniform = torch.rand(8, 64, 64, generator=generator)
    figures = channel_statistics(torch.stack([gaussian, uniform, torch.full_like(uniform, 2.0)], 1))
    assert figures["mean"] == pytest.approx([10, 0.5, 2.0], rel=0.01)
    assert figures["std"] == pytest.approx([3, 12**-0.5, 0.0], rel=0.01)
    assert figures["kurtosis"] == pytest.approx([0.0, -1.2, 0.0], abs=0.06)
    assert figures["kurtosis"][0] == pytest.approx(stats.kurtosis(gaussian.double().flatten().numpy()), abs=1e-9)
