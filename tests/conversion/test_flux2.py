"""FLUX.2's autoencoder as one file: names of latent diffusion, each 1x1 convolution inside its half, a batch norm."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLFlux2
from safetensors.torch import load_file

import eqvae_command
from diffusers_eqvae.conversion import from_published, read_published
from diffusers_eqvae.latents import LatentNormalization

from ..faults.test_autoencoder_classes import TINY, tiny


def run(*words):
    return eqvae_command.main(["convert", *map(str, words)])


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(params=[None, (8, 16, 16)], ids=["as wide", "narrower decoder"])
def directory(request, tmp_path):
    vae = tiny("AutoencoderKLFlux2")
    if request.param:
        vae = AutoencoderKLFlux2(**TINY["AutoencoderKLFlux2"], decoder_block_out_channels=request.param)
    for value in vae.state_dict().values():
        value.copy_(1 + torch.rand(value.shape) * 5)
    vae.save_pretrained(tmp_path / "vae")
    return tmp_path


def test_there_and_back_are_the_same_bits_and_the_same_normalisation(directory):
    assert run(directory / "vae", directory / "one.safetensors", "--to", "flux2") == 0
    tensors = load_file(directory / "one.safetensors")
    assert tensors.keys() >= {
        "encoder.quant_conv.weight",
        "decoder.post_quant_conv.bias",
        "bn.running_mean",
        "bn.running_var",
        "encoder.mid.attn_1.q.weight",
        "decoder.up.2.block.0.conv1.weight",
    }
    assert run(directory / "one.safetensors", directory / "back", "--config", "norm_num_groups=4") == 0
    first, second = (AutoencoderKLFlux2.from_pretrained(directory / name).eval() for name in ("vae", "back"))
    assert same(first.state_dict(), second.state_dict())
    assert LatentNormalization.from_vae(first) == LatentNormalization.from_vae(second)
    images = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(first(images).sample, second(images).sample)


def test_a_file_without_the_count_of_batches_is_whole_and_one_without_the_mean_is_not(directory):
    assert run(directory / "vae", directory / "one.safetensors", "--to", "flux2") == 0
    tensors = read_published(directory / "one.safetensors")
    count = tensors.pop("bn.num_batches_tracked")
    assert count > 0 and from_published(tensors, norm_num_groups=4).bn.num_batches_tracked == 0
    with pytest.raises(ValueError, match=r"lacks bn\.running_var"):
        from_published({name: each for name, each in tensors.items() if name != "bn.running_var"}, norm_num_groups=4)
    wrong = tensors | {"encoder.quant_conv.weight": torch.ones(8, 8, 3, 3)}
    with pytest.raises(
        ValueError, match=r"encoder\.quant_conv\.weight has shape \(8, 8, 3, 3\), .* needs \(8, 8, 1, 1\)"
    ):
        from_published(wrong, norm_num_groups=4)
