"""Measurements with known answers: an equivariant autoencoder has error 0, a wrong one the value it must have."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusers_eqvae.metrics import measure_equivariance, psnr


class AveragingAutoencoder(nn.Module):
    """Encodes a cell as the mean of its 4x4 pixels and decodes by repeating it; `shift` rolls the latents."""

    def __init__(self, *, offset: float = 0.0, shift: int = 0) -> None:
        super().__init__()
        self.offset, self.shift = offset, shift
        self.config = SimpleNamespace(block_out_channels=(1, 1, 1), encoder_block_out_channels=None)

    def encode(self, pixels):
        latents = F.avg_pool2d(pixels, 4) + self.offset
        return SimpleNamespace(latents=latents.roll(self.shift, -1))

    def decode(self, latents):
        return SimpleNamespace(sample=F.interpolate(latents - self.offset, scale_factor=4, mode="nearest"))


def pictures(count: int = 3, side: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_equivariant_map_has_no_rotation_error():
    figures = measure_equivariance(AveragingAutoencoder(), [pictures()])
    assert figures["equivariance_rotation"] == pytest.approx(0, abs=1e-10)
    assert figures["equivariance_scale"] > 0.01  # averaging then resizing is not resizing then averaging
    assert figures["psnr_rotated_latent"] == pytest.approx(figures["psnr"], abs=1e-4)


def test_rolled_latents_have_the_error_of_uncorrelated_ones():
    """Rolling by half a picture makes tau(E(x)) and E(tau(x)) independent cells of one variance: ratio 2."""
    pixels = pictures(8, 128)
    figures = measure_equivariance(AveragingAutoencoder(shift=13), [pixels])
    # A half turn maps a roll to its opposite; with independent cells every rotation gives |a - b|^2 / |b|^2 = 2.
    assert figures["equivariance_rotation"] == pytest.approx(2.0, rel=0.1)


def test_an_offset_flatters_the_plain_error_only():
    plain, shifted = (
        measure_equivariance(AveragingAutoencoder(shift=13, offset=offset), [pictures(8, 64)]) for offset in (0.0, 5.0)
    )
    assert shifted["equivariance_rotation"] < 0.01 * plain["equivariance_rotation"]
    assert shifted["equivariance_rotation_centred"] == pytest.approx(plain["equivariance_rotation_centred"], rel=1e-3)


def test_figures_do_not_depend_on_the_batches():
    pixels = pictures(6)
    together = measure_equivariance(AveragingAutoencoder(shift=1), [pixels])
    apart = measure_equivariance(AveragingAutoencoder(shift=1), pixels.split(4))
    assert together == pytest.approx(apart, rel=1e-6)


def test_mode_is_restored_and_nothing_is_refused():
    vae = AveragingAutoencoder().train()
    measure_equivariance(vae, [pictures(1)])
    assert vae.training
    with pytest.raises(ValueError, match="at least one picture"):
        measure_equivariance(vae, [])


def test_psnr_of_a_known_error():
    target = torch.zeros(2, 3, 8, 8)
    reconstruction = torch.stack([target[0] + 0.2, target[0] + 3.0])  # the second is clamped to an error of 1
    expected = [10 * math.log10(4 / 0.04), 10 * math.log10(4 / 1.0)]
    assert psnr(reconstruction, target).tolist() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="one shape"):
        psnr(target, target[:1])
