"""Discriminators of taming-transformers and latent-diffusion load by their tensors, and others are refused by name."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from diffusers_eqvae.conversion._discriminator import read_taming_discriminator
from diffusers_eqvae.training_utils.autoencoder.arguments import AutoencoderLossArguments
from diffusers_eqvae.training_utils.autoencoder.build import build_discriminator


def taming(in_channels: int = 3, width: int = 8, layers: int = 3) -> nn.Sequential:
    """Its architecture: conv, then conv without bias and batch norm, the last of stride 1, then conv; slope .2."""
    modules: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
    widths = [width * min(2**depth, 8) for depth in range(layers + 1)]
    for depth in range(1, layers + 1):
        stride = 2 if depth < layers else 1
        modules += [nn.Conv2d(widths[depth - 1], widths[depth], 4, stride, 1, bias=False)]
        modules += [nn.BatchNorm2d(widths[depth]), nn.LeakyReLU(0.2)]
    return nn.Sequential(*modules, nn.Conv2d(widths[-1], 1, 4, 1, 1))


def checkpoint(path, network, **changes):
    state = {f"loss.discriminator.main.{name}": each for name, each in network.state_dict().items()}
    state |= {"encoder.conv_in.weight": torch.zeros(2, 3, 3, 3), "loss.logvar": torch.zeros(())} | changes
    torch.save({"state_dict": state, "global_step": 7}, path)
    return path


@pytest.mark.parametrize("sizes", [{}, {"layers": 1, "width": 4}, {"layers": 4, "in_channels": 1}])
def test_gives_the_same_logits_as_in_training(tmp_path, sizes):
    torch.manual_seed(0)
    network = taming(**sizes)
    with torch.no_grad():
        network(torch.randn(4, sizes.get("in_channels", 3), 64, 64))  # running statistics that are not the first ones
    discriminator = read_taming_discriminator(checkpoint(tmp_path / "last.ckpt", network))
    images = torch.randn(2, sizes.get("in_channels", 3), 64, 64)
    assert torch.equal(discriminator(images), network.train()(images))


def test_is_taken_by_the_training_script(tmp_path):
    path = checkpoint(tmp_path / "last.ckpt", taming())
    built = build_discriminator(AutoencoderLossArguments(disc_pretrained=str(path)), smallest_px=64)
    assert built.training and built.config.base_channels == 8 and built.config.num_layers == 3


NAME = "loss.discriminator.main."
REFUSED = {
    "another shape": (
        {f"{NAME}5.weight": torch.zeros(32, 16, 3, 3)},
        "5.weight should be (32, 16, 4, 4) and is (32, 16,",
    ),
    "actnorm": ({f"{NAME}3.loc": torch.zeros(1, 16, 1, 1)}, "main.3.loc should be nothing and is (1, 16, 1, 1)"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_another_architecture_is_refused_by_tensor_and_shape(tmp_path, kind):
    changes, said = REFUSED[kind]
    with pytest.raises(ValueError, match=re.escape(said)):
        read_taming_discriminator(checkpoint(tmp_path / "last.ckpt", taming(), **changes))


def test_a_file_without_one_is_refused(tmp_path):
    torch.save({"state_dict": {"encoder.conv_in.weight": torch.zeros(2, 3, 3, 3)}}, tmp_path / "vae.ckpt")
    with pytest.raises(ValueError, match=r"holds no discriminator: there are no tensors loss\.discriminator\.main\."):
        read_taming_discriminator(tmp_path / "vae.ckpt")


def test_r1_of_a_compiled_discriminator_is_refused():
    with pytest.raises(ValueError, match="--disc_r1_weight differentiates the discriminator twice"):
        build_discriminator(AutoencoderLossArguments(disc_r1_weight=1.0), smallest_px=64, compiled=True)
