"""AutoencoderKLEQ: normalisation at the surface, padding, and the stock artefact."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from diffusers_eqvae.autoencoders import encode
from diffusers_eqvae.latents import LatentNormalization
from diffusers_eqvae.models.autoencoder_kl_eq import PADDING_MODES, AutoencoderKLEQ
from diffusers_eqvae.pipelines.pipeline_class_conditional import ClassConditionalPipeline
from diffusers_eqvae.schedulers.scheduling_flow_match_ode import FlowMatchODEScheduler

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


def test_a_pipelines_options_of_saving_reach_the_autoencoder(tmp_path, tiny_sit):
    """diffusers passes on what it finds in a component's signature and leaves out the rest in silence."""
    vae = build(latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 0.5, 3.0])
    pipeline = ClassConditionalPipeline(tiny_sit, vae, FlowMatchODEScheduler())
    pipeline.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    files = {path.name for path in (tmp_path / "vae").iterdir()}
    assert {"config.json", "mean_std.json", "diffusion_pytorch_model.safetensors.index.fp16.json"} <= files
    assert len([name for name in files if name.endswith(".safetensors")]) > 1
    pipeline.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert (tmp_path / "pickled" / "vae" / "diffusion_pytorch_model.bin").is_file()
