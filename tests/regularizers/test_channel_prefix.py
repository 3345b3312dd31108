"""The first k channels: which are kept, how k is drawn, and what a convolution sees of the others."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from diffusers_eqvae.randomness import StepRandomness
from diffusers_eqvae.regularizers.channel_prefix import ChannelPrefixArguments, ChannelPrefixRegularizer


def test_a_convolution_sees_a_latent_of_k_channels():
    raw_latents, pixels = torch.randn(3, 6, 5, 5), torch.rand(3, 3, 40, 40)
    kept, target = ChannelPrefixRegularizer().transform(raw_latents, pixels, torch.tensor([1, 4, 6]))
    assert target is pixels
    layer = torch.nn.Conv2d(6, 2, 3, padding=1)
    for image, k in enumerate((1, 4, 6)):
        alone = torch.nn.functional.conv2d(
            raw_latents[image : image + 1, :k], layer.weight[:, :k], layer.bias, padding=1
        )
        torch.testing.assert_close(layer(kept[image : image + 1]), alone)


def test_every_number_of_channels_is_as_likely():
    regularizer = ChannelPrefixRegularizer(smallest=3)
    counts = Counter(
        k for step in range(250) for k in regularizer.draw((8, 6, 4, 4), StepRandomness(0).at(step, 0)).tolist()
    )
    assert set(counts) == {3, 4, 5, 6}
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 14.0


def test_the_last_channel_has_a_gradient_only_where_it_is_kept():
    raw_latents = torch.randn(2, 4, 3, 3, requires_grad=True)
    kept, _ = ChannelPrefixRegularizer().transform(raw_latents, torch.rand(2, 3, 12, 12), torch.tensor([2, 4]))
    kept.square().sum().backward()
    assert raw_latents.grad[0, :2].all() and not raw_latents.grad[0, 2:].any() and raw_latents.grad[1].all()


def test_some_channel_must_be_left_out(tiny_autoencoder_kl):
    with pytest.raises(ValueError, match=r"channel_prefix_smallest must be below the 4 channels .* got 4"):
        ChannelPrefixRegularizer.from_arguments(ChannelPrefixArguments(4), tiny_autoencoder_kl)
    assert ChannelPrefixRegularizer.from_arguments(ChannelPrefixArguments(3), tiny_autoencoder_kl).smallest == 3
