"""What autoencoder training builds from its arguments."""

from __future__ import annotations

import pytest

from diffusers_eqvae.autoencoders import downsampling_factor
from diffusers_eqvae.models.discriminator import PatchDiscriminator
from diffusers_eqvae.training_utils.autoencoder.arguments import AutoencoderLossArguments, RegularizerArguments
from diffusers_eqvae.training_utils.autoencoder.build import build_discriminator, build_regularizers, smallest_image_px


def test_a_saved_discriminator_continues_in_training_mode(tmp_path):
    PatchDiscriminator(base_channels=4, num_layers=2).save_pretrained(tmp_path)
    discriminator = build_discriminator(AutoencoderLossArguments(disc_pretrained=str(tmp_path)), smallest_px=32)
    assert all(module.training for module in discriminator.modules())


def test_tau_needs_two_cells_and_the_smallest_image_is_its_quarter(tiny_autoencoder_kl):
    factor = downsampling_factor(tiny_autoencoder_kl)
    plain, scaled = RegularizerArguments(regularizers=[]), RegularizerArguments()
    assert smallest_image_px(plain, tiny_autoencoder_kl, factor) == factor
    assert smallest_image_px(scaled, tiny_autoencoder_kl, 8 * factor) == 2 * factor
    with pytest.raises(ValueError, match=f"--resolution {2 * factor} or more, or --tau_scale none"):
        smallest_image_px(scaled, tiny_autoencoder_kl, factor)


def test_arguments_of_what_is_switched_off_are_named(tiny_autoencoder_kl, caplog):
    build_regularizers(RegularizerArguments(regularizers=["none"], p_equivariance=1.0), tiny_autoencoder_kl)
    build_discriminator(AutoencoderLossArguments(disc_weight=0.0, disc_start=5), smallest_px=32)
    assert caplog.messages == [
        "Without effect, since --regularizers leaves out equivariance: --p_equivariance.",
        "Without effect, since --disc_weight is 0: --disc_start.",
    ]
