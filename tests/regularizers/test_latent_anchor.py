"""The distance to a frozen autoencoder's latents: 0 at itself, known where shifted; who may be the anchor."""

from __future__ import annotations

import copy

import pytest
import torch

from diffusers_eqvae.autoencoders import encode
from diffusers_eqvae.regularizers.base import AutoencoderState
from diffusers_eqvae.regularizers.latent_anchor import LatentAnchorArguments, LatentAnchorRegularizer


def penalty(regularizer, vae, pixels):
    posterior = encode(vae, pixels)
    return regularizer.penalty(AutoencoderState(posterior, posterior.mode(), pixels, None, None), {}, ())


def test_it_is_zero_at_itself_and_the_square_of_a_shift(tiny_autoencoder_kl):
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    regularizer = LatentAnchorRegularizer(copy.deepcopy(tiny_autoencoder_kl))
    assert penalty(regularizer, tiny_autoencoder_kl, pixels).item() == 0
    with torch.no_grad():
        tiny_autoencoder_kl.quant_conv.bias[:4] += torch.tensor([1.0, 2.0, 0.0, 0.0])
    assert penalty(regularizer, tiny_autoencoder_kl, pixels).item() == pytest.approx((1 + 4) / 4, rel=1e-4)
    loss = penalty(regularizer, tiny_autoencoder_kl, pixels)
    loss.backward()
    assert (tiny_autoencoder_kl.quant_conv.bias.grad[:2] > 0).all()
    (anchor,) = regularizer.frozen_modules()
    assert anchor.decoder is None and all(weight.grad is None for weight in anchor.parameters())


def test_an_anchor_of_another_shape_or_none_is_refused(tmp_path, tiny_autoencoder_kl, tiny_autoencoder_tiny):
    with pytest.raises(ValueError, match="needs the autoencoder to stay near: set latent_anchor_autoencoder"):
        LatentAnchorRegularizer.from_arguments(LatentAnchorArguments(), tiny_autoencoder_kl)
    tiny_autoencoder_tiny.save_pretrained(tmp_path / "other")
    arguments = LatentAnchorArguments(latent_anchor_autoencoder=str(tmp_path / "other"))
    LatentAnchorRegularizer.from_arguments(arguments, tiny_autoencoder_kl)  # f4 and 4 channels, as it is
    tiny_autoencoder_kl.register_to_config(latent_channels=16)
    with pytest.raises(ValueError, match=r"the autoencoder has 16 channels at stride 4, .*other has 4 at 4"):
        LatentAnchorRegularizer.from_arguments(arguments, tiny_autoencoder_kl)
