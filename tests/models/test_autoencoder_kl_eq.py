"""AutoencoderKLEQ and AutoencoderKLAligned: normalisation at the surface, padding, and the stock artefact."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from diffusers_eqvae.autoencoders import encode, load_autoencoder
from diffusers_eqvae.latents import LatentNormalization
from diffusers_eqvae.models.alignment_network import AlignmentNetwork
from diffusers_eqvae.models.autoencoder_kl_aligned import AutoencoderKLAligned
from diffusers_eqvae.models.autoencoder_kl_eq import PADDING_MODES, AutoencoderKLEQ

OPTIONS = {
    "block_out_channels": (8, 8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "mid_block_add_attention": False,
}


def build(cls=AutoencoderKLEQ, **options):
    torch.manual_seed(0)
    return cls(**OPTIONS, **options).eval()


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 32, 24) * 2 - 1


@pytest.mark.parametrize(
    "normalization",
    [
        {"scaling_factor": 0.18215},
        {"scaling_factor": 1.5, "shift_factor": 0.06},
        {"scaling_factor": 1.0, "latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 0.5, 3.0]},
    ],
    ids=["scale", "scale_shift", "mean_std"],
)
@torch.no_grad()
def test_latents_are_normalised_once_each_way(pixels, normalization):
    vae = build(**normalization)
    raw = vae.encode(pixels).latent_dist.mean
    shape = (1, 4, 1, 1)
    if "latents_mean" in normalization:
        mean, std = (torch.tensor(normalization[key]).view(shape) for key in ("latents_mean", "latents_std"))
        expected = (raw - mean) / std
    else:
        expected = (raw - normalization.get("shift_factor", 0.0)) * normalization["scaling_factor"]
    latents = vae.encode_latents(pixels, sample_posterior=False)
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(vae.decode_latents(latents), vae.decode(raw).sample, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_posterior_samples_follow_their_generator(pixels):
    vae = build(scaling_factor=2.0)
    draw = [vae.encode_latents(pixels, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    noise = torch.randn(draw[0].shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(draw[0], 2.0 * encode(vae, pixels).sample(noise))


def test_gradients_pass_both_ways(pixels):
    vae = build()
    vae.decode_latents(vae.encode_latents(pixels)).square().mean().backward()
    missing = [name for name, parameter in vae.named_parameters() if parameter.grad is None]
    assert missing == []


@torch.no_grad()
def test_is_autoencoder_kl_bit_for_bit_where_padding_is_zeros(pixels):
    stock, own = build(AutoencoderKL), build()
    assert torch.equal(stock(pixels).sample, own(pixels).sample)
    assert stock.state_dict().keys() == own.state_dict().keys()


@pytest.mark.parametrize("mode", [mode for mode in PADDING_MODES if mode != "zeros"])
@torch.no_grad()
def test_padding_changes_borders_only(mode):
    """Layer by layer, since the group norms of a whole network carry a border's change everywhere."""
    zeros, other = build(), build(padding_mode=mode)
    compared = 0
    for (name, first), second in zip(zeros.named_modules(), other.modules(), strict=True):
        if not isinstance(first, nn.Conv2d):
            continue
        features = torch.randn(1, first.in_channels, 12, 12)
        difference = (first(features) - second(features)).abs().amax((0, 1))
        if any(first.padding):
            assert difference[1:-1, 1:-1].max() == 0 and difference[0].any() and difference[:, -1].any(), name
            compared += 1
        else:
            assert difference.max() == 0, name
    assert compared > 20
    pixels = torch.rand(1, 3, 32, 32)
    assert not torch.equal(zeros(pixels).sample, other(pixels).sample)


@torch.no_grad()
def test_circular_padding_makes_the_decoder_commute_with_shifts():
    vae = build(padding_mode="circular")
    latents = torch.randn(1, 4, 8, 8)
    shifted = vae.decode_latents(latents.roll((3, 2), (-2, -1)))
    expected = vae.decode_latents(latents).roll((12, 8), (-2, -1))
    torch.testing.assert_close(shifted, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_downsamplers_keep_their_zeros_at_bottom_and_right():
    downsampler = build(padding_mode="reflect").encoder.down_blocks[0].downsamplers[0]
    features = torch.randn(1, 8, 8, 8)
    padded = nn.functional.pad(features, (0, 1, 0, 1))
    conv = downsampler.conv
    torch.testing.assert_close(
        downsampler(features), nn.functional.conv2d(padded, conv.weight, conv.bias, stride=2), rtol=0, atol=0
    )


def test_unknown_padding_is_refused():
    with pytest.raises(ValueError, match="zeros, reflect, replicate, circular; got 'mirror'"):
        build(padding_mode="mirror")


def test_the_saved_directory_is_a_stock_autoencoder(tmp_path, pixels):
    vae = build(latents_mean=[0.1] * 4, latents_std=[2.0] * 4, scaling_factor=1.0)
    vae.save_pretrained(tmp_path)
    stock = AutoencoderKL.from_pretrained(tmp_path).eval()
    assert type(stock) is AutoencoderKL and list(stock.config.latents_std) == [2.0] * 4
    with torch.no_grad():
        assert torch.equal(stock(pixels).sample, vae(pixels).sample)


def test_the_normalisation_is_saved_as_a_file_too_where_there_is_one(tmp_path):
    build().save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "mean_std.json").exists()
    vae = build(latents_mean=(0.1, 0.2, 0.3, 0.4), latents_std=(1.0, 2.0, 3.0, 4.0), scaling_factor=1.0)
    vae.save_pretrained(tmp_path / "normalised")
    saved = LatentNormalization.from_json(tmp_path / "normalised" / "mean_std.json")
    assert saved == LatentNormalization.from_vae(vae)


def test_any_stock_directory_loads_and_may_change_its_padding(tmp_path, pixels):
    stock = build(AutoencoderKL)
    stock.save_pretrained(tmp_path)
    own = AutoencoderKLEQ.from_pretrained(tmp_path).eval()
    reflected = AutoencoderKLEQ.from_pretrained(tmp_path, padding_mode="reflect").eval()
    assert own.config.padding_mode == "zeros" and reflected.config.padding_mode == "reflect"
    with torch.no_grad():
        assert torch.equal(own(pixels).sample, stock(pixels).sample)
        assert not torch.equal(reflected(pixels).sample, stock(pixels).sample)


def in_a_fresh_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_padding_survives_a_fresh_process(tmp_path, pixels):
    vae = build(padding_mode="replicate", scaling_factor=0.7)
    vae.save_pretrained(tmp_path / "vae")
    torch.save(pixels, tmp_path / "pixels.pt")
    assert json.loads((tmp_path / "vae" / "config.json").read_text())["padding_mode"] == "replicate"
    in_a_fresh_process(
        "import torch; torch.set_num_threads(1)\n"
        "from diffusers_eqvae.models.autoencoder_kl_eq import AutoencoderKLEQ\n"
        f"vae = AutoencoderKLEQ.from_pretrained({str(tmp_path / 'vae')!r}).eval()\n"
        f"pixels = torch.load({str(tmp_path / 'pixels.pt')!r})\n"
        "latents = vae.encode_latents(pixels, sample_posterior=False).detach()\n"
        f"torch.save(latents, {str(tmp_path / 'latents.pt')!r})"
    )
    with torch.no_grad():
        expected = vae.encode_latents(pixels, sample_posterior=False)
    assert torch.equal(torch.load(tmp_path / "latents.pt"), expected)


@pytest.fixture
def aligned() -> AutoencoderKLAligned:
    vae = build(AutoencoderKLAligned, scaling_factor=0.5)
    vae.set_alignment_network(AlignmentNetwork(latent_channels=4, hidden_size=16, feature_size=6))
    return vae


def test_alignment_network_is_saved_as_a_component_of_its_own(aligned, tmp_path, pixels):
    aligned.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "alignment_network",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    stock = AutoencoderKL.from_pretrained(tmp_path).eval()
    assert stock.state_dict().keys() == aligned.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(stock(pixels).sample, aligned(pixels).sample)

    loaded = AutoencoderKLAligned.from_pretrained(tmp_path)
    network = loaded.alignment_network
    latents = torch.randn(2, 4, 5, 6)
    assert torch.equal(loaded.predict_features(latents).patch, aligned.predict_features(latents).patch)
    assert torch.equal(loaded.predict_features(latents).cls, aligned.predict_features(latents).cls)
    assert torch.equal(
        AlignmentNetwork.from_pretrained(tmp_path, subfolder="alignment_network")(latents).patch,
        network(latents).patch,
    )


def test_alignment_network_stays_with_its_autoencoder_from_pipeline_to_pipeline(aligned, tmp_path):
    aligned.save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    load_autoencoder(str(tmp_path)).save_pretrained(tmp_path / "again")
    again, info = AutoencoderKLAligned.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"]
    latents = torch.randn(1, 4, 2, 2)
    assert torch.equal(again.predict_features(latents).patch, aligned.predict_features(latents).patch)


@torch.no_grad()
def test_features_are_predicted_from_raw_latents(aligned, pixels):
    raw = aligned.encode(pixels).latent_dist.mean
    features = aligned.predict_features(aligned.encode_latents(pixels, sample_posterior=False))
    torch.testing.assert_close(features.patch, aligned.alignment_network(raw).patch)


def test_a_damaged_alignment_network_is_no_missing_one(aligned, tmp_path):
    aligned.save_pretrained(tmp_path)
    weights = tmp_path / "alignment_network" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    with pytest.raises(OSError, match="alignment_network"):
        AutoencoderKLAligned.from_pretrained(tmp_path)


def test_alignment_network_moves_with_its_autoencoder(aligned):
    aligned.to(torch.bfloat16)
    assert aligned.alignment_network.dtype == torch.bfloat16
    assert aligned.predict_features(torch.zeros(1, 4, 2, 2)).patch.dtype == torch.bfloat16
    assert not any("alignment" in name for name, _ in aligned.named_parameters())


def test_a_missing_or_foreign_alignment_network_is_a_readable_error(tmp_path):
    vae = build(AutoencoderKLAligned)
    with pytest.raises(ValueError, match="load_alignment_network"):
        vae.predict_features(torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match="name where to load from"):
        vae.load_alignment_network()
    with pytest.raises(ValueError, match="16 latent channels"):
        vae.set_alignment_network(AlignmentNetwork(latent_channels=16, hidden_size=8, feature_size=6))
    vae.save_pretrained(tmp_path)
    loaded = AutoencoderKLAligned.from_pretrained(tmp_path)
    assert loaded.alignment_network is None
    with pytest.raises(FileNotFoundError, match="without an alignment network"):
        loaded.load_alignment_network()
