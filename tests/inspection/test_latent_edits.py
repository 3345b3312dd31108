"""Edits of latents: nothing is lost where the autoencoder is equivariant, and the image says what should come out."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import FrozenDict
from torch import nn

from diffusers_eqvae.inspection.latent_edits import EDIT_COLUMNS, LatentEdit, edit_latents


class Blocks(nn.Module):
    """An autoencoder of images that are constant on 2 x 2 blocks: means of the blocks, times a gain per position."""

    works_as = "AutoencoderTiny"

    def __init__(self, gain: torch.Tensor | float = 1.0) -> None:
        super().__init__()
        self.gain = gain
        self.config = FrozenDict(encoder_block_out_channels=(1, 1), latent_channels=3)

    def encode(self, pixels):
        return SimpleNamespace(latents=F.avg_pool2d(pixels, 2) * self.gain)

    def decode(self, raw_latents):
        return SimpleNamespace(sample=F.interpolate(raw_latents / self.gain, scale_factor=2, mode="nearest"))


def blocks(seed: int) -> torch.Tensor:
    values = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(values, scale_factor=2, mode="nearest")


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
@pytest.mark.parametrize("flip", [False, True])
def test_an_equivariant_autoencoder_loses_nothing_and_gives_numpy_s_edit(turns, flip):
    pixels = blocks(0)
    edited = edit_latents(Blocks(), pixels, LatentEdit(quarter_turns=turns, flip=flip))
    expected = np.rot90(pixels.numpy(), turns, axes=(2, 3))
    expected = expected[..., ::-1] if flip else expected
    assert np.allclose(edited.edited_pixels.numpy(), expected)
    assert torch.allclose(edited.decoded, edited.edited_pixels, atol=1e-6)
    assert torch.allclose(edited.lost, torch.zeros(2), atol=0.5) and edited.psnr.min() > 100


def test_what_depends_on_the_place_loses_what_the_formula_says():
    """A gain of two in the right half: turned by half, half of the pixels are halved and half doubled."""
    gain = torch.ones(8, 8)
    gain[:, 4:] = 2.0
    pixels = torch.full((1, 3, 16, 16), 0.4)
    edited = edit_latents(Blocks(gain), pixels, LatentEdit(quarter_turns=2))
    error = (0.4**2 + 0.2**2) / 2  # decoded .8 and .2 where .4 should be
    assert edited.psnr.item() == pytest.approx(10 * np.log10(4 / error), abs=1e-3)
    assert edited.lost.item() == pytest.approx(edited.psnr_bound.item() - edited.psnr.item())
    assert edited.psnr_bound.item() > 100


def test_a_mixture_is_that_of_the_pixels_where_the_autoencoder_is_linear():
    first, other = blocks(0), blocks(1)
    edited = edit_latents(Blocks(), first, LatentEdit(share=0.25), other_pixels=other)
    assert torch.allclose(edited.edited_pixels, 0.75 * first + 0.25 * other, atol=1e-6)
    assert torch.allclose(edited.decoded, 0.75 * first + 0.25 * other, atol=1e-6)


def test_scale_comes_before_the_turn_and_tiles_have_their_captions(tiny_autoencoder_kl):
    pixels = torch.rand(1, 3, 32, 16) * 2 - 1
    edited = edit_latents(tiny_autoencoder_kl, pixels, LatentEdit(quarter_turns=1, scale=0.5))
    assert edited.edited_pixels.shape == edited.decoded.shape == (1, 3, 8, 16)
    tiles = edited.tiles()
    assert len(tiles) == len(EDIT_COLUMNS) and {tile.image.size for tile in tiles} == {(16, 8)}
    assert tiles[1].caption == f"{edited.psnr.item():.1f} dB" and tiles[0].caption == ""


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"share": 0.5}, "A mixture of share 0.5 needs a second image; give one, or a share of 0."),
        ({"quarter_turns": 4}, r"quarter_turns must lie in \[0, 3\]; got 4"),
        ({"scale": 0.1}, r"scale must lie in \[0.25, 1\]; got 0.1"),
    ],
)
def test_what_cannot_be_done_is_said(edit, said, tiny_autoencoder_kl):
    with pytest.raises(ValueError, match=said):
        edit_latents(tiny_autoencoder_kl, blocks(0), LatentEdit(**edit))
