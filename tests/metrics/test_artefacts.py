"""Colour, sharpness and grid: 0 or 1 where nothing is wrong, and known values where one thing alone is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from diffusers_eqvae.metrics.artefacts import reconstruction_artefacts


@pytest.fixture
def pixels() -> torch.Tensor:
    return 0.4 * torch.randn(2, 3, 64, 64).clamp(-2, 2)


def measured(reconstruction, pixels) -> dict[str, float]:
    return {name: value.max().item() for name, value in reconstruction_artefacts(reconstruction, pixels, 8).items()}


def test_nothing_is_wrong_with_the_image_itself(pixels):
    assert measured(pixels, pixels) == {"colour_shift": 0.0, "sharpness": 1.0, "grid": 0.0}


def test_a_tint_is_its_size_and_nothing_else(pixels):
    tint = torch.tensor([0.0, -0.1, 0.05]).view(1, 3, 1, 1)
    found = measured(pixels + tint, pixels)
    assert found["colour_shift"] == pytest.approx(0.1, abs=0.01)
    assert found["sharpness"] == pytest.approx(1.0, abs=0.02) and found["grid"] < 0.05


def test_a_blur_loses_sharpness_and_nothing_else(pixels):
    blurred = F.avg_pool2d(pixels, 5, stride=1, padding=2, count_include_pad=False)
    found = measured(blurred, pixels)
    assert found["sharpness"] < 0.3 and found["colour_shift"] < 0.02 and found["grid"] < 0.05


def test_a_pattern_in_every_cell_is_a_grid_and_noise_is_none(pixels):
    pattern = 0.1 * torch.randn(1, 3, 8, 8).repeat(1, 1, 8, 8)
    pixels = pixels.clamp(-0.6, 0.6)
    assert measured(pixels + pattern, pixels)["grid"] == pytest.approx(1.0, abs=1e-3)
    noise = 0.1 * torch.randn_like(pixels)
    assert measured(pixels + noise, pixels)["grid"] < 0.02
    both = reconstruction_artefacts(pixels + pattern + noise, pixels, 8)["grid"].mean()
    share = pattern.var() / (pattern.var() + noise.var())
    assert both == pytest.approx(share.item(), abs=0.05)


def test_one_cell_has_no_pattern():
    assert reconstruction_artefacts(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8), 8)["grid"].item() == 0
