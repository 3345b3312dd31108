"""Classes with a normalisation, a range or axes of their own, against what diffusers' pipelines compute of them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import Flux2Pipeline

from diffusers_eqvae.autoencoders import decode, encode, last_encoder_layer, load_autoencoder
from diffusers_eqvae.inspection.health import inspect_autoencoder
from diffusers_eqvae.latents import LatentNormalization, LatentStatistics
from diffusers_eqvae.objectives.autoencoder import AutoencoderObjective
from diffusers_eqvae.pipelines.pipeline_class_conditional import ClassConditionalPipeline
from diffusers_eqvae.provenance import autoencoder_identity, require_same_autoencoder
from diffusers_eqvae.regularizers.equivariance import EquivarianceRegularizer
from diffusers_eqvae.schedulers.scheduling_flow_match_ode import FlowMatchODEScheduler
from diffusers_eqvae.stated_normalization import scale_complaint
from diffusers_eqvae.training_utils.autoencoder.build import smallest_image_px
from diffusers_eqvae.training_utils.autoencoder.trainable import freeze_all_but, keeps_latents

from .faults.test_autoencoder_classes import FRAMES, tiny

pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def flux2s_latents(vae) -> torch.Tensor:
    """What the pipeline of FLUX.2 makes of images: packed and normalised."""
    pipeline = SimpleNamespace(vae=vae, _patchify_latents=Flux2Pipeline._patchify_latents)
    return Flux2Pipeline._encode_vae_image(pipeline, pixels, generator=None)


@torch.no_grad()
def test_flux2s_batch_statistics_normalise_as_in_its_pipeline():
    vae = tiny("AutoencoderKLFlux2")
    normalization = LatentNormalization.from_vae(vae)
    assert normalization.tile == (2, 2)
    latents = normalization.normalize(encode(vae, pixels).mode())
    torch.testing.assert_close(Flux2Pipeline._patchify_latents(latents), flux2s_latents(vae))
    raw = normalization.denormalize(latents)
    torch.testing.assert_close(decode(vae, raw), vae(pixels).sample, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("scalar", [False, True], ids=["per channel", "scalar"])
def test_what_is_measured_is_what_flux2s_pipeline_applies(scalar, tmp_path):
    vae, statistics = tiny("AutoencoderKLFlux2"), LatentStatistics()
    vae.bn.running_var.mul_(100)
    statistics.update(encode(vae, pixels).mode())
    before = LatentNormalization.from_vae(vae)
    assert "standard deviation of" in (scale_complaint(before, statistics) or ""), "random statistics do not fit"
    LatentNormalization.from_statistics(statistics, scalar=scalar).apply_to(vae)
    vae.save_pretrained(tmp_path)
    stock = diffusers.AutoencoderKLFlux2.from_pretrained(tmp_path)
    latents = Flux2Pipeline._unpatchify_latents(flux2s_latents(stock))
    over = (0, 1, 2, 3) if scalar else (0, 2, 3)
    assert latents.mean(over).abs().max() < 1e-3
    assert (latents.std(over, correction=0) - 1).abs().max() < 1e-3
    normalization = LatentNormalization.from_vae(stock)
    assert normalization.tile == (1, 1) and normalization.unread(stock) is None
    assert scale_complaint(normalization, statistics) is None


@torch.no_grad()
def test_a_pipeline_decodes_as_flux2s_does(tiny_sit):
    vae = tiny("AutoencoderKLFlux2")
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    pipeline = ClassConditionalPipeline(tiny_sit, vae, FlowMatchODEScheduler())
    mean, std = (each.view(1, -1, 1, 1) for each in (vae.bn.running_mean, (vae.bn.running_var + 1e-4).sqrt()))
    raw = Flux2Pipeline._unpatchify_latents(Flux2Pipeline._patchify_latents(latents) * std + mean)
    torch.testing.assert_close(pipeline.decode_latents(latents), vae.decode(raw).sample, rtol=1e-4, atol=1e-5)


def test_a_std_below_what_its_batch_norm_can_say_is_refused():
    with pytest.raises(ValueError, match=r"sqrt\(variance \+ 0.0001\), so .* at least 0.01; got 0.005"):
        LatentNormalization(mean=(0.0,), std=(0.005,)).apply_to(tiny("AutoencoderKLFlux2"))


def test_values_by_position_are_kept_in_mean_std_json_and_compared(tmp_path):
    vae = tiny("AutoencoderKLFlux2")
    normalization = LatentNormalization.from_vae(vae)
    vae.save_pretrained(tmp_path)
    normalization.save_json(tmp_path / "mean_std.json", num_samples=3)
    assert LatentNormalization.from_json(tmp_path / "mean_std.json") == normalization
    assert LatentNormalization.from_vae(load_autoencoder(str(tmp_path))) == normalization
    content = json.loads((tmp_path / "mean_std.json").read_text())
    content["latents_mean"][3] += 1.0
    (tmp_path / "mean_std.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="contradict each other"):
        load_autoencoder(str(tmp_path))


def test_values_by_position_need_whole_tiles_and_a_place_to_be_written():
    normalization = LatentNormalization.from_vae(tiny("AutoencoderKLFlux2"))
    with pytest.raises(ValueError, match=r"repeats every 2 x 2 positions, which must divide .*; got 3 x 4"):
        normalization.normalize(torch.zeros(1, 4, 3, 4))
    with pytest.raises(ValueError, match="for latents of 4 channels; got 5"):
        normalization.normalize(torch.zeros(1, 5, 4, 4))
    with pytest.raises(ValueError, match="is read, and not written; measure one per channel"):
        normalization.apply_to(tiny("AutoencoderKL"))
    with pytest.raises(ValueError, match=r"4 values per channel.*got 6 in all"):
        LatentNormalization(mean=(0.0,) * 6, std=(1.0,) * 6, tile=(2, 2))


@pytest.mark.parametrize("name", ["AutoencoderKLFlux2", "AutoencoderRAE"])
def test_statistics_in_weights_are_part_of_the_identity_in_any_precision(name):
    vae = tiny(name)
    identity = json.loads(json.dumps(autoencoder_identity(vae)))
    for dtype in (torch.bfloat16, torch.float16):
        require_same_autoencoder(identity, tiny(name).to(dtype))
        require_same_autoencoder(identity, json.loads(json.dumps(autoencoder_identity(tiny(name).to(dtype)))))
    buffer = vae.bn.running_var if name == "AutoencoderKLFlux2" else vae._latents_std
    buffer.view(-1)[5] *= 1.1
    with pytest.raises(ValueError, match=r"its latent normalisation .* differ; use"):
        require_same_autoencoder(identity, vae)


@torch.no_grad()
def test_raes_own_normalisation_and_range_are_applied():
    vae = tiny("AutoencoderRAE")
    normalization = LatentNormalization.from_vae(vae)
    assert normalization.tile == (4, 4)
    raw = encode(vae, pixels).mode()
    expected = vae.encode((pixels + 1) / 2).latent
    torch.testing.assert_close(normalization.normalize(raw), expected, rtol=1e-4, atol=1e-5)
    tokens = vae._encoder_forward_fn(vae.encoder, vae._resize_and_normalize((pixels + 1) / 2))
    torch.testing.assert_close(raw, tokens.transpose(1, 2).view_as(raw), rtol=1e-4, atol=1e-5)


def test_rae_takes_one_size_and_nothing_is_scaled():
    vae = tiny("AutoencoderRAE")
    with pytest.raises(ValueError, match=r"The width of images must be 16: AutoencoderRAE takes .*; got 32"):
        encode(vae, torch.zeros(1, 3, 16, 32))
    with pytest.raises(ValueError, match=r"decodes latents of 4 x 4 positions alone.*; got 2 x 2: leave scaling out"):
        decode(vae, torch.zeros(1, 64, 2, 2))
    objective = AutoencoderObjective(vae, {"equivariance": EquivarianceRegularizer(4)})
    with pytest.raises(ValueError, match=r"--resolution must be 16: .* and this encodes smaller ones too; got 16"):
        smallest_image_px(objective, 16)


def test_raes_encoder_is_frozen_and_named(caplog):
    vae = tiny("AutoencoderRAE")
    freeze_all_but(vae, ["full"])
    assert keeps_latents(vae) and "Frozen, since AutoencoderRAE keeps what it came with: encoder." in caplog.text
    assert all(weight.requires_grad for weight in vae.decoder.parameters())
    with pytest.raises(ValueError, match="--trainable encoder leaves nothing to train of this AutoencoderRAE"):
        freeze_all_but(vae, ["encoder"])
    with pytest.raises(ValueError, match=r"does not end in a convolution.*use a fixed weight"):
        last_encoder_layer(vae)


def test_noise_that_no_seed_decides_is_refused():
    vae = tiny("AutoencoderRAE")
    vae.noise_tau = 0.8
    encode(vae, pixels)
    with pytest.raises(ValueError, match=r"noise_tau=0\.8 .* set noise_tau to 0 in its config"):
        encode(vae.train(), pixels)


@pytest.mark.parametrize("name", ["AutoencoderKLFlux2", "AutoencoderKLQwenImage", "AutoencoderKLHunyuanImage"])
def test_it_is_inspected(name):
    inspection = inspect_autoencoder(tiny(name), pixels, name="tiny")
    assert [finding.name for finding in inspection.findings][:2] == ["reconstruction", "equivariance"]


def test_what_cannot_be_inspected_is_refused_before_it_is_measured():
    with pytest.raises(
        ValueError, match=r"AutoencoderRAE takes images of one size .* and this encodes smaller ones too"
    ):
        inspect_autoencoder(tiny("AutoencoderRAE"), pixels, name="tiny")


@pytest.mark.parametrize("name", ["AutoencoderKLQwenImage", "AutoencoderKLQwenImage21", "AutoencoderKLWan"])
def test_what_only_videos_need_is_frozen_and_named(name, caplog):
    vae = tiny(name)
    freeze_all_but(vae, ["full"])
    assert "neither encoding nor decoding an image reads them: " in caplog.text and "time_conv" in caplog.text
    idle = {name for name, weight in vae.named_parameters() if not weight.requires_grad}
    assert idle and all("time_conv" in name for name in idle)


@pytest.mark.parametrize("patch_size", [None, 2])
@pytest.mark.parametrize("is_residual", [False, True])
@pytest.mark.parametrize("name", ["AutoencoderKLQwenImage21", "AutoencoderKLWan"])
def test_a_frame_is_decoded_with_a_gradient_as_without_one(name, is_residual, patch_size):
    channels = 3 * (patch_size or 1) ** 2
    sizes = {"patch_size": patch_size, "in_channels": channels, "out_channels": channels, "is_residual": is_residual}
    vae = getattr(diffusers, name)(**FRAMES, decoder_base_dim=8, **sizes).eval()
    raw = 0.1 * torch.randn(2, 4, 4, 6)
    with torch.no_grad():
        clamped = decode(vae, raw)
    assert clamped.abs().max() > 0 and torch.equal(decode(vae, raw).clamp(-1, 1), clamped)


def test_a_pixel_beyond_the_range_gets_a_gradient_though_diffusers_clamps_it():
    vae = tiny("AutoencoderKLQwenImage")
    with torch.no_grad():
        vae.decoder.conv_out.bias.fill_(3.0)
        assert decode(vae, torch.zeros(1, 4, 4, 4)).max() == 1.0
    decoded = decode(vae, torch.zeros(1, 4, 4, 4))
    assert decoded.min() > 1.0
    decoded.sum().backward()
    assert vae.decoder.conv_out.bias.grad.abs().sum() > 0
