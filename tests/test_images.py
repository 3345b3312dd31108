"""Images of latents have the sizes, colours and places they claim."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from diffusers_eqvae.images import (
    CAPTIONS,
    MODES,
    comparison_rows,
    evenly_spaced,
    grid,
    image_grid,
    latent_pca,
    require_channels,
    to_channels,
    to_image,
    to_pixels,
    to_uint8,
)


def test_to_image_inverts_the_training_scaling():
    levels = torch.arange(256, dtype=torch.float32).view(1, 16, 16).expand(3, 16, 16)
    assert np.array_equal(np.asarray(to_image(levels / 127.5 - 1))[..., 0], levels[0].numpy().astype(np.uint8))


def test_evenly_spaced_indices_are_different_and_reach_both_ends():
    assert evenly_spaced(10, 4) == [0, 3, 6, 9] and evenly_spaced(3, 8) == [0, 1, 2] and evenly_spaced(5, 1) == [0]
    for length in range(1, 40):
        for count in range(1, length + 1):
            indices = evenly_spaced(length, count)
            assert len(set(indices)) == count and indices == sorted(indices)
            assert count == 1 or (indices[0], indices[-1]) == (0, length - 1)


def test_uint8_is_truncated_and_clamped():
    """UINT8_RULE: clamp(127.5 x + 128), truncated."""
    pixels = torch.tensor([-2.0, -1.0, -1 / 255, 0.0, 0.999, 1.0, 3.0])
    assert to_uint8(pixels).tolist() == [0, 0, 127, 128, 255, 255, 255]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(every / 127.5 - 1), every)


def test_pca_finds_the_strongest_channels_and_keeps_their_basis():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 16, 16, generator=generator) * torch.tensor([1.0, 9.0, 3.0, 0.1]).view(1, 4, 1, 1)
    colours, basis = latent_pca(latents)
    assert colours.shape == (2, 3, 16, 16)
    assert colours.abs().max() <= 1
    assert basis.argmax(0).tolist() == [1, 2, 0]
    assert torch.equal(latent_pca(latents, basis)[0], colours)


def test_comparison_has_one_row_per_image(tiny_autoencoder_kl):
    rows = comparison_rows(tiny_autoencoder_kl, torch.zeros(2, 3, 16, 16))
    assert [len(row) for row in rows] == [len(CAPTIONS)] * 2
    assert {tuple(pixels.shape) for row in rows for pixels in row} == {(3, 16, 16)}
    drawn = grid(rows, CAPTIONS)
    assert drawn.size == (5 * 20 - 4, 16 + 2 * 20 - 4)


def test_image_grid_fills_rows_and_leaves_the_rest_white():
    images = [Image.new("RGB", (4, 4), colour) for colour in ("black", "red", "blue")]
    drawn = image_grid(images, columns=2, gap_px=0)
    assert drawn.size == (8, 8)
    assert drawn.getpixel((5, 1)) == (255, 0, 0)
    assert drawn.getpixel((1, 5)) == (0, 0, 255)
    assert drawn.getpixel((5, 5)) == (255, 255, 255)
    square = np.asarray(
        image_grid(list(np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)), gap_px=0)
    )
    assert square.shape == (4, 6, 3)
    assert square[0, ::2, 0].tolist() == [0, 1, 2] and square[2, ::2, 0].tolist() == [3, 4, 255]


def test_images_are_read_in_one_channel_three_or_four(tmp_path):
    colours = np.array([[[255, 0, 0, 255], [10, 20, 30, 128]]], dtype=np.uint8)
    seen, opaque = Image.fromarray(colours), Image.fromarray(colours[..., :3])
    luma = [0.299 * 255, 0.299 * 10 + 0.587 * 20 + 0.114 * 30]  # ITU-R BT.601
    assert np.abs(np.asarray(to_channels(opaque, 1)).astype(float) - luma).max() <= 1
    assert np.array_equal(np.asarray(to_channels(seen, 4)), colours)
    assert np.array_equal(np.asarray(to_channels(opaque, 4))[..., 3], [[255, 255]])
    assert np.array_equal(np.asarray(to_channels(opaque, 3)), colours[..., :3])
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert np.array_equal(np.asarray(to_channels(grey, 1)), np.asarray(grey)), "grey values stay what they are"
    for channels in MODES:
        pixels = to_pixels(to_channels(seen, channels), channels)
        assert pixels.shape == (channels, 1, 2)
        assert np.array_equal(to_uint8(pixels)[0], np.asarray(to_channels(seen, channels)).reshape(1, 2, -1)[..., 0])
        shown = np.asarray(to_image(pixels))
        assert np.array_equal(shown, np.asarray(to_channels(seen, channels).convert("RGB")))


def test_an_autoencoder_of_other_channels_is_refused_where_images_have_these():
    def vae(channels):
        sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "in_channels": channels, "out_channels": channels}
        kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        return AutoencoderKL(**sizes, **kinds)

    assert [require_channels(vae(channels)) for channels in (1, 2, 5)] == [1, 2, 5]
    with pytest.raises(
        ValueError, match=r"Images have 3 \(RGB\) channels here, and this AutoencoderKL takes 1; use an"
    ):
        require_channels(vae(1), 3)
    with pytest.raises(ValueError, match=r"Images have 5 channels here, and this AutoencoderKL takes 3"):
        require_channels(vae(3), 5)
