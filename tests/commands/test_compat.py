"""eqvae compat: what is the same is a drop-in, what an affine map undoes is undone, and strangers need adaptation."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image

import eqvae_command
from diffusers_eqvae.autoencoders import decode, encode, load_autoencoder
from diffusers_eqvae.inspection.compatibility import (
    AFFINE_RESIDUAL,
    Affine,
    Compatibility,
    compatibility,
    fit_one_by_one,
    fit_per_channel,
    stated_by,
)
from diffusers_eqvae.inspection.run import load_images
from diffusers_eqvae.latents import LatentNormalization
from diffusers_eqvae.metrics.reconstruction import psnr
from diffusers_eqvae.metrics.result_card import ResultCard


@pytest.fixture
def images():
    return torch.rand(6, 3, 32, 32) * 2 - 1


def perturbed(module: torch.nn.Module, scale: float = 0.3) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))


def test_itself_is_a_drop_in_at_distance_0(tiny_autoencoder_kl, images):
    found = compatibility(tiny_autoencoder_kl, copy.deepcopy(tiny_autoencoder_kl), images)
    assert (found.distance, found.same_encoder, found.verdict) == (0.0, True, "drop-in")
    assert found.explained(found.one_by_one) is None
    assert len(set(found.psnr.values())) == 1


def test_another_decoder_alone_is_a_drop_in(tiny_autoencoder_kl, images):
    new = copy.deepcopy(tiny_autoencoder_kl)
    perturbed(new.decoder)
    perturbed(new.post_quant_conv)
    found = compatibility(new, tiny_autoencoder_kl, images)
    assert (found.distance, found.same_encoder, found.verdict) == (0.0, True, "drop-in")
    assert found.psnr["new_decodes_base"] == found.psnr["own_new"] != found.psnr["own_base"]


def test_a_copy_in_16_bits_is_a_drop_in_though_not_the_same(tiny_autoencoder_kl, images):
    new = copy.deepcopy(tiny_autoencoder_kl).bfloat16().float()
    found = compatibility(new, tiny_autoencoder_kl, images)
    assert 0 < found.distance < 1e-4 and not found.same_encoder and found.verdict == "drop-in"


def test_a_rescaled_encoder_is_undone_per_channel_and_by_the_config_that_is_printed(tiny_autoencoder_kl, images):
    new, slopes, shifts = copy.deepcopy(tiny_autoencoder_kl), torch.tensor([0.5, 2.0, 3.0, 0.1]), torch.arange(4.0)
    with torch.no_grad():
        new.quant_conv.weight[:4] *= slopes[:, None, None, None]
        new.quant_conv.bias[:4] = new.quant_conv.bias[:4] * slopes + shifts
    found = compatibility(new, tiny_autoencoder_kl, images)
    assert found.verdict == "affine fit suffices" and found.distance > 1
    assert found.explained(found.per_channel) == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(found.affine.matrix, torch.diag(1 / slopes.double()), rtol=1e-4, atol=0)
    stated_by(found.affine, LatentNormalization.from_vae(new)).apply_to(new)
    after = compatibility(new, tiny_autoencoder_kl, images)
    assert after.distance < 1e-9 and after.verdict == "drop-in"


def test_latents_are_normalised_by_their_own_config_and_read_by_the_decoders_own(tiny_autoencoder_kl, images):
    new, base = copy.deepcopy(tiny_autoencoder_kl), tiny_autoencoder_kl  # of scaling_factor .5
    new.register_to_config(scaling_factor=0.25)
    found = compatibility(new, base, images)
    assert not found.same_encoder and found.distance > 0.2
    with torch.no_grad():
        raw = encode(base, images).mode()
        for name, factor in (("own_new", 1), ("own_base", 1), ("base_decodes_new", 0.5), ("new_decodes_base", 2)):
            expected = psnr(decode(base, factor * raw), images).mean().item()
            assert found.psnr[name] == pytest.approx(expected, rel=1e-5), name


def test_mixed_channels_are_undone_by_the_1x1_map_alone(tiny_autoencoder_kl, images):
    new, mixing = copy.deepcopy(tiny_autoencoder_kl), torch.randn(4, 4) + 2 * torch.eye(4)
    with torch.no_grad():
        new.quant_conv.weight[:4] = torch.einsum("ij,jkhw->ikhw", mixing, new.quant_conv.weight[:4])
    found = compatibility(new, tiny_autoencoder_kl, images)
    assert found.verdict == "affine fit suffices" and found.affine is found.one_by_one
    assert found.per_channel.residual > AFFINE_RESIDUAL
    torch.testing.assert_close(found.affine.matrix, mixing.double().inverse(), rtol=1e-3, atol=1e-4)
    assert stated_by(found.affine, LatentNormalization.from_vae(new)) is None, "no config holds a matrix"


def test_the_last_convolution_of_a_deterministic_encoder_rescaled(tiny_autoencoder_tiny, images):
    new = copy.deepcopy(tiny_autoencoder_tiny)
    with torch.no_grad():
        list(new.encoder.modules())[-1].weight.mul_(torch.tensor([2.0, 3.0, 4.0, 5.0])[:, None, None, None])
    found = compatibility(new, tiny_autoencoder_tiny, images)
    assert found.explained(found.per_channel) == pytest.approx(1, abs=1e-9)


def test_a_stranger_needs_adaptation(tiny_autoencoder_kl, images):
    new = copy.deepcopy(tiny_autoencoder_kl)
    perturbed(new)
    found = compatibility(new, tiny_autoencoder_kl, images)
    assert found.verdict == "needs adaptation" and found.affine is None


def test_unrelated_latents_of_one_size_have_distance_2_of_which_half_is_explained():
    x, y = torch.randn(2, 100_000, 4, dtype=torch.float64)
    variance = (y - y.mean(0)).square().sum().item()
    distance = (x - y).square().sum().item() / variance
    assert distance == pytest.approx(2, abs=0.02)
    for fit in (fit_per_channel(x, y, variance), fit_one_by_one(x, y, variance)):
        assert Compatibility(distance, fit, fit, {}, False).explained(fit) == pytest.approx(0.5, abs=0.01)


def test_fits_are_least_squares_of_their_kind():
    """Against the normal equations with a column of ones, channel by channel and together."""
    x = torch.randn(500, 3, dtype=torch.float64) * 2 + 5
    y = x @ torch.randn(3, 3, dtype=torch.float64) + torch.randn(500, 3, dtype=torch.float64)
    ones = torch.ones(500, 1, dtype=torch.float64)
    variance = (y - y.mean(0)).square().sum().item()
    design = torch.cat([x, ones], 1)
    whole = torch.linalg.solve(design.T @ design, design.T @ y)
    fit = fit_one_by_one(x, y, variance)
    torch.testing.assert_close(torch.cat([fit.matrix.T, fit.bias[None]]), whole)
    assert fit.residual == pytest.approx((design @ whole - y).square().sum().item() / variance)
    fit = fit_per_channel(x, y, variance)
    for channel in range(3):
        own = torch.cat([x[:, channel : channel + 1], ones], 1)
        slope, bias = torch.linalg.solve(own.T @ own, own.T @ y[:, channel])
        torch.testing.assert_close(fit.matrix[channel, channel], slope)
        torch.testing.assert_close(fit.bias[channel], bias)


@pytest.mark.parametrize(
    ("own_base", "swapped", "verdict"),
    [
        (25.0, 24.6, "decoder-only swap"),
        (25.0, 27.0, "decoder-only swap"),
        (25.0, 24.4, "needs adaptation"),
        (10.0, 10.0, "needs adaptation"),  # a decoder that shows nothing says nothing about latents
    ],
)
def test_a_decoder_is_swapped_where_it_loses_at_most_half_a_decibel(own_base, swapped, verdict):
    fit = Affine(torch.eye(4), torch.zeros(4), 0.3)
    quality = {"own_base": own_base, "new_decodes_base": swapped}
    assert Compatibility(0.3, fit, fit, quality, False).verdict == verdict


def test_other_channels_and_codebooks_are_refused_in_a_sentence(
    tiny_autoencoder_kl, tiny_autoencoder_tiny, tiny_vq_model, images
):
    wide = type(tiny_autoencoder_tiny).from_config({**tiny_autoencoder_tiny.config, "latent_channels": 8})
    with pytest.raises(
        ValueError, match=r"NEW has 8 latent channels of stride 4 and BASE 4 of stride 4.*from scratch"
    ):
        compatibility(wide, tiny_autoencoder_tiny, images)
    with pytest.raises(ValueError, match="eqvae compat is for autoencoders without a codebook"):
        compatibility(tiny_vq_model, tiny_autoencoder_kl, images)
    with torch.no_grad():
        for parameter in tiny_autoencoder_kl.quant_conv.parameters():
            parameter.zero_()
    with pytest.raises(ValueError, match=r"same latents everywhere.*look at BASE"):
        compatibility(tiny_autoencoder_kl, tiny_autoencoder_kl, images)


def test_the_command_prints_the_verdict_and_writes_a_card(tmp_path, tiny_autoencoder_kl, capsys):
    new = copy.deepcopy(tiny_autoencoder_kl)
    perturbed(new)
    for name, vae in (("new", new), ("base", tiny_autoencoder_kl)):
        vae.save_pretrained(tmp_path / name)
    (tmp_path / "images").mkdir()
    for index in range(3):
        array = np.random.default_rng(index).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / "images" / f"{index}.png")
    command = ["compat", str(tmp_path / "new"), str(tmp_path / "base"), "--data_dir", str(tmp_path / "images")]
    command += ["--resolution", "32", "--num_images", "3", "--output", str(tmp_path / "card.json")]
    assert eqvae_command.main(command) == 0
    said = capsys.readouterr().out
    assert "verdict: needs adaptation" in said and "eqvae train-transformer" in said and "docs/my_unet.md" in said
    card = ResultCard.load(tmp_path / "card.json")
    pixels = load_images(tmp_path / "images", resolution=32, num_images=3)
    normalized = [LatentNormalization.from_vae(vae).normalize(encode(vae, pixels).mode()).double() for vae in (
        load_autoencoder(str(tmp_path / "new")), load_autoencoder(str(tmp_path / "base")))]  # fmt: skip
    centred = normalized[1] - normalized[1].mean((0, 2, 3), keepdim=True)
    expected = (normalized[0] - normalized[1]).square().sum() / centred.square().sum()
    assert card.metrics["relative_distance"] == pytest.approx(expected.item(), rel=1e-5)
    assert card.details["verdict"] == "needs adaptation" and card.details["base"]["class"] == "AutoencoderKL"
    assert eqvae_command.main(command) == 0, "its own card may be replaced"
    capsys.readouterr()
    command[-1] = str(tmp_path / "again.json")
    assert eqvae_command.main(command) == 0
    assert eqvae_command.main(["compare", str(tmp_path / "card.json"), command[-1]]) == 0, capsys.readouterr().out
    command[-1] = str(tmp_path / "card.json")
    command[2] = str(tmp_path / "new")
    assert eqvae_command.main(command) == 2
    assert "exists, and is not what this command wrote before" in capsys.readouterr().err


def test_published_autoencoders_of_one_shape_are_strangers(shared_data):
    """TAESD and TAESDXL: 4 channels of stride 8 both, trained for different latent spaces."""
    new, base = (load_autoencoder(str(shared_data / "weights" / name)) for name in ("taesdxl", "taesd"))
    found = compatibility(new, base, load_images(shared_data / "kodak", resolution=128, num_images=4))
    assert found.verdict == "needs adaptation" and found.swap_loss > 3
