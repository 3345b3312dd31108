"""TAESD's two files, against its published architecture."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from torch import nn

import eqvae_command
from diffusers_eqvae.conversion import from_published, read_published, save_published


def run(*words):
    return eqvae_command.main(["convert", *map(str, words)])


def conv(inputs, outputs, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Sequential(conv(width, width), nn.ReLU(), conv(width, width), nn.ReLU(), conv(width, width))

    def forward(self, x):
        return torch.relu(self.conv(x) + x)


class Clamp(nn.Module):
    def forward(self, x):
        return 3 * torch.tanh(x / 3)


def published(channels=4, width=4):
    """(encoder, decoder), with images in [0, 1]: a block at the image's size, three at each other."""
    torch.manual_seed(0)
    encoder, decoder = [conv(3, width), Block(width)], [Clamp(), conv(channels, width), nn.ReLU()]
    for _ in range(3):
        encoder += [conv(width, width, stride=2, bias=False), Block(width), Block(width), Block(width)]
        decoder += [Block(width), Block(width), Block(width), nn.Upsample(scale_factor=2)]
        decoder += [conv(width, width, bias=False)]
    encoder, decoder = [*encoder, conv(width, channels)], [*decoder, Block(width), conv(width, 3)]
    halves = nn.Sequential(*encoder), nn.Sequential(*decoder)
    for half in halves:
        for weight in half.parameters():
            weight.data.normal_(std=0.2)
    return halves


def write(folder, suffix=".safetensors", **sizes):
    halves = published(**sizes)
    for half, name in zip(halves, ("encoder", "decoder"), strict=True):
        file = folder / f"taesd_{name}{suffix}"
        state = half.state_dict()
        save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    return halves


@torch.no_grad()
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("channels", [4, 16])
def test_two_files_become_the_same_function_and_are_written_back_bit_for_bit(tmp_path, suffix, channels):
    encoder, decoder = write(tmp_path, suffix, channels=channels)
    assert run(tmp_path / f"taesd_decoder{suffix}", tmp_path / "out") == 0
    vae = AutoencoderTiny.from_pretrained(tmp_path / "out")
    assert vae.config.num_encoder_blocks == [1, 3, 3, 3] and vae.config.num_decoder_blocks == [3, 3, 3, 1]
    images = torch.rand(2, 3, 16, 24)
    latents = vae.encode(2 * images - 1).latents
    torch.testing.assert_close(latents, encoder(images))
    torch.testing.assert_close(vae.decode(latents).sample, 2 * decoder(latents) - 1, rtol=1e-4, atol=1e-4)
    (tmp_path / "back").mkdir()
    assert run(tmp_path / "out", tmp_path / f"back/mine_encoder{suffix}", "--to", "taesd") == 0
    for half, name in ((encoder, "encoder"), (decoder, "decoder")):
        file = tmp_path / f"back/mine_{name}{suffix}"
        found = load_file(file) if suffix == ".safetensors" else torch.load(file, weights_only=True)
        expected = half.state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_one_file_as_comfyui_makes_it(tmp_path, capsys):
    write(tmp_path)
    assert run(tmp_path / "taesd_encoder.safetensors", tmp_path / "out") == 0
    assert run(tmp_path / "out", tmp_path / "one.safetensors", "--to", "taesd") == 0
    assert "ComfyUI takes two files in models/vae_approx" in capsys.readouterr().out
    tensors = load_file(tmp_path / "one.safetensors")
    assert {"taesd_encoder.0.weight", "taesd_decoder.1.weight"} <= tensors.keys()
    again = from_published({**tensors, "vae_scale": torch.tensor(0.18215), "vae_shift": torch.tensor(0.0)})
    expected = AutoencoderTiny.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())


def test_half_an_autoencoder_is_refused(tmp_path):
    write(tmp_path)
    (tmp_path / "taesd_decoder.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds half of an autoencoder; the other, taesd_decoder\.safetensors, must"):
        read_published(tmp_path / "taesd_encoder.safetensors")


def test_what_does_not_fit_is_named_with_its_shape(tmp_path):
    write(tmp_path)
    tensors = read_published(tmp_path / "taesd_encoder.safetensors")
    with pytest.raises(ValueError, match=r"lacks taesd_encoder\.3\.conv\.2\.weight"):
        from_published({name: each for name, each in tensors.items() if name != "taesd_encoder.3.conv.2.weight"})
    with pytest.raises(ValueError, match=r"holds taesd_decoder\.3\.pool\.weight, which TAESDConverter does not know"):
        from_published(tensors | {"taesd_decoder.3.pool.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"taesd_decoder\.1\.bias has shape \(5,\), .* needs \(4,\)"):
        from_published(tensors | {"taesd_decoder.1.bias": torch.ones(5)})


def test_the_other_half_is_not_written_over(tmp_path):
    write(tmp_path)
    (tmp_path / "new_decoder.safetensors").touch()
    tensors = read_published(tmp_path / "taesd_encoder.safetensors")
    with pytest.raises(ValueError, match=r"new_decoder\.safetensors, where the other half .*, exists already"):
        save_published(tensors, tmp_path / "new_encoder.safetensors")
    assert not (tmp_path / "new_encoder.safetensors").exists()
