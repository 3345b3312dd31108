"""Figures of a set of images: the mean of the images', whatever the batches; what is relative is relative."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import VQModel

from diffusers_eqvae.autoencoders import decode, encode
from diffusers_eqvae.metrics.autoencoder import image_figures, measure_autoencoder, split_summary, summarize
from diffusers_eqvae.metrics.equivariance import measure_equivariance
from diffusers_eqvae.metrics.latent_statistics import intrinsic_dimension
from diffusers_eqvae.metrics.reconstruction import psnr


def images(count: int = 12) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_a_summary_does_not_depend_on_the_batches(tiny_autoencoder_kl):
    pixels = images()
    together = measure_autoencoder(tiny_autoencoder_kl, [pixels])
    apart = measure_autoencoder(tiny_autoencoder_kl.train(), pixels.split(5))
    assert tiny_autoencoder_kl.training
    for name, value in together.items():
        if isinstance(value, float):
            assert apart[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    reference = measure_equivariance(tiny_autoencoder_kl, [pixels])
    for name in ("psnr", "equivariance_rotation", "equivariance_scale_centred", "psnr_halved_latent"):
        assert together[name] == pytest.approx(reference[name], rel=1e-5), name
    assert together["gap_halved"] == pytest.approx(reference["psnr_halved_pixels"] - reference["psnr_halved_latent"])
    assert together["num_images"] == together["intrinsic_dimension_points"] == 12
    power = together["spectrum"]["power"]
    assert sum(power) / len(power) == pytest.approx(1.0)
    assert together["spectrum"]["frequency"] == [0.125, 0.25, 0.375, 0.5]


def test_noise_reconstructs_a_sample(tiny_autoencoder_kl):
    pixels = images(3)
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    sampled = image_figures(tiny_autoencoder_kl, pixels, noise=noise)
    plain = image_figures(tiny_autoencoder_kl, pixels)
    with torch.no_grad():
        expected = psnr(decode(tiny_autoencoder_kl, encode(tiny_autoencoder_kl, pixels).sample(noise)), pixels)
    assert torch.allclose(sampled["psnr"], expected, atol=1e-5)
    assert not torch.allclose(sampled["psnr"], plain["psnr"], atol=1e-3)
    assert torch.equal(sampled["equivariance_rotation"], plain["equivariance_rotation"])


def test_a_vq_autoencoder_is_measured_before_its_quantiser():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = VQModel(block_out_channels=(8, 8), latent_channels=4, num_vq_embeddings=8, norm_num_groups=4, **blocks)
    summary = measure_autoencoder(vae, [images(2)])
    assert summary["equivariance_rotation"] > 0 and len(summary["channels"]["mean"]) == 4
    assert summary["intrinsic_dimension"] is None


def test_nothing_is_refused(tiny_autoencoder_tiny):
    with pytest.raises(ValueError, match="at least one image"):
        measure_autoencoder(tiny_autoencoder_tiny, [])
    row = image_figures(tiny_autoencoder_tiny, images(1))
    with pytest.raises(ValueError, match="at least one image"):
        summarize({name: values[:0] for name, values in row.items()})


def test_what_is_not_finite_is_a_mark_and_no_number(tiny_autoencoder_kl):
    """16 px give 4x4 cells; scaled to a quarter these are one, which cannot deviate from its mean."""
    summary = measure_autoencoder(tiny_autoencoder_kl, [images(2)[..., :16, :16]])
    numbers, marks, details = split_summary(summary)
    assert marks.pop("intrinsic_dimension") == "undefined for fewer than 10 different latents"
    assert marks == {"equivariance_scale_centred": "nan for these images"}
    assert set(numbers) | set(marks) | set(details) | {"intrinsic_dimension"} == set(summary)
    assert all(math.isfinite(value) for value in numbers.values())


def test_an_encoder_that_collapsed_is_measured(tiny_autoencoder_kl):
    """All latents are one point, which has no dimension; every other figure is there."""
    torch.nn.init.zeros_(tiny_autoencoder_kl.encoder.conv_out.weight)
    summary = measure_autoencoder(tiny_autoencoder_kl, [images(12)])
    numbers, marks, _ = split_summary(summary)
    assert summary["intrinsic_dimension"] is None and "different latents" in marks["intrinsic_dimension"]
    assert numbers["psnr"] == summary["psnr"]


def test_the_intrinsic_dimension_is_taken_of_the_first_latents(tiny_autoencoder_kl):
    row = image_figures(tiny_autoencoder_kl, images(14))
    summary = summarize(row, max_points=11)
    assert summary["num_images"] == 14 and summary["intrinsic_dimension_points"] == 11
    assert summary["intrinsic_dimension"] == intrinsic_dimension(row["latents"][:11].flatten(1))
    assert summary["intrinsic_dimension"] != summarize(row)["intrinsic_dimension"]
