"""Figures of a set of images: the mean of the images', whatever the batches; what is relative is relative."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import VQModel

from diffusers_eqvae.autoencoders import decode, encode
from diffusers_eqvae.metrics.autoencoder import OFFERS, measure_autoencoder, reconstruct
from diffusers_eqvae.metrics.base import METRICS, build_metrics
from diffusers_eqvae.metrics.equivariance import measure_equivariance
from diffusers_eqvae.metrics.latent_statistics import intrinsic_dimension
from diffusers_eqvae.metrics.reconstruction import psnr


def images(count: int = 12) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_figures_do_not_depend_on_the_batches(tiny_autoencoder_kl):
    pixels = images()
    together = measure_autoencoder(tiny_autoencoder_kl, [pixels])
    apart = measure_autoencoder(tiny_autoencoder_kl.train(), pixels.split(5))
    assert tiny_autoencoder_kl.training
    assert apart.values() == pytest.approx(together.values(), rel=1e-4, abs=1e-5, nan_ok=True)
    reference = measure_equivariance(tiny_autoencoder_kl, [pixels])
    values = together.values()
    for name in ("psnr", "equivariance_rotation", "equivariance_scale_centred", "psnr_halved_latent"):
        assert values[name] == pytest.approx(reference[name], rel=1e-5), name
    assert values["gap_halved"] == pytest.approx(reference["psnr_halved_pixels"] - reference["psnr_halved_latent"])
    assert together.figures["psnr"].n == together.details["intrinsic_dimension_points"] == 12
    power = together.details["spectrum"]["power"]
    assert sum(power) / len(power) == pytest.approx(1.0)
    assert together.details["spectrum"]["frequency"] == [0.125, 0.25, 0.375, 0.5]


def test_a_figure_carries_its_standard_error(tiny_autoencoder_kl):
    """Over images: the gap's is that of the differences, which is less than that of two sets apart."""
    figures = measure_autoencoder(tiny_autoencoder_kl, [images()]).figures
    batch = reconstruct(tiny_autoencoder_kl, images())
    each = psnr(batch["reconstructions"], batch["images"]).double()
    assert figures["psnr"].error == pytest.approx(each.std().item() / math.sqrt(12), rel=1e-6)
    rows = METRICS["equivariance"]().rows(batch)
    gaps = (rows["psnr_rotated_pixels"] - rows["psnr_rotated_latent"]).double()
    assert figures["gap_rotated"].error == pytest.approx(gaps.std().item() / math.sqrt(12), rel=1e-5)
    dimension = figures["intrinsic_dimension"]
    assert dimension.error == pytest.approx(dimension.value / math.sqrt(12))


def test_noise_reconstructs_a_sample(tiny_autoencoder_kl):
    pixels = images(3)
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    sampled = reconstruct(tiny_autoencoder_kl, pixels, noise=noise)
    plain = reconstruct(tiny_autoencoder_kl, pixels)
    with torch.no_grad():
        expected = decode(tiny_autoencoder_kl, encode(tiny_autoencoder_kl, pixels).sample(noise)).clamp(-1, 1)
    assert torch.allclose(sampled["reconstructions"], expected, atol=1e-5)
    assert not torch.allclose(sampled["reconstructions"], plain["reconstructions"], atol=1e-3)
    assert torch.equal(sampled["posteriors"].mode(), plain["posteriors"].mode())


def test_a_vq_autoencoder_is_measured_before_its_quantiser():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = VQModel(block_out_channels=(8, 8), latent_channels=4, num_vq_embeddings=8, norm_num_groups=4, **blocks)
    measured = measure_autoencoder(vae, [images(2)])
    assert measured.values()["equivariance_rotation"] > 0 and len(measured.details["channels"]["mean"]) == 4
    assert math.isnan(measured.values()["intrinsic_dimension"])


def test_no_images_are_refused(tiny_autoencoder_tiny):
    with pytest.raises(ValueError, match="at least one image"):
        measure_autoencoder(tiny_autoencoder_tiny, []).figures  # noqa: B018


def test_what_is_not_finite_is_a_caveat_and_not_a_number(tiny_autoencoder_kl):
    """16 px give 4x4 latents; scaled to a quarter one position is left, which cannot deviate from its mean."""
    measured = measure_autoencoder(tiny_autoencoder_kl, [images(2)[..., :16, :16]])
    parts = measured.card_parts()
    few = "undefined: 1 of 1 clusters left out, which have fewer than 6 latents or directions without variance"
    assert parts["caveats"] == {
        "intrinsic_dimension": "undefined for fewer than 10 different latents",
        "equivariance_scale_centred": "nan for these images",
        "linear_loss": "undefined: fewer than 6 latents, or directions without variance",
        **dict.fromkeys(("viv", "viv_per_dimension"), few),
    }
    assert set(parts["metrics"]) | set(parts["caveats"]) == set(measured.figures)
    assert all(math.isfinite(value) for value in parts["metrics"].values())
    assert set(parts["errors"]) == set(parts["metrics"])


def test_an_encoder_that_collapsed_is_measured(tiny_autoencoder_kl):
    """All latents are one point, which has no dimension; every other figure is there."""
    torch.nn.init.zeros_(tiny_autoencoder_kl.encoder.conv_out.weight)
    measured = measure_autoencoder(tiny_autoencoder_kl, [images(12)])
    assert "different latents" in measured.figures["intrinsic_dimension"].caveat
    assert measured.card_parts()["metrics"]["psnr"] == measured.values()["psnr"]


def test_the_intrinsic_dimension_is_taken_of_the_first_latents(tiny_autoencoder_kl):
    arguments = METRICS["intrinsic_dimension"].Arguments(intrinsic_dimension_max_points=11)
    metrics = build_metrics(["intrinsic_dimension"], {"intrinsic_dimension": arguments}, offers=OFFERS)
    measured = measure_autoencoder(tiny_autoencoder_kl, [images(14)], metrics=metrics)
    latents = reconstruct(tiny_autoencoder_kl, images(14))["posteriors"].mode()
    assert measured.protocol == {"intrinsic_dimension_points": 11}
    value = measured.values()["intrinsic_dimension"]
    assert value == pytest.approx(intrinsic_dimension(latents[:11].flatten(1)), rel=1e-6)
    assert value != pytest.approx(intrinsic_dimension(latents.flatten(1)), rel=1e-6)
    with pytest.raises(ValueError, match="max_points must be positive; got 0"):
        METRICS["intrinsic_dimension"].Arguments(intrinsic_dimension_max_points=0)
