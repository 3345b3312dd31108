"""What autoencoder training builds from its arguments."""

from __future__ import annotations

import pytest

from diffusers_eqvae.autoencoders import downsampling_factor
from diffusers_eqvae.equivariance import TauDistribution
from diffusers_eqvae.models.discriminator import PatchDiscriminator
from diffusers_eqvae.objectives.autoencoder import AutoencoderObjective
from diffusers_eqvae.regularizers import EquivarianceRegularizer
from diffusers_eqvae.training_utils.autoencoder.arguments import AutoencoderLossArguments
from diffusers_eqvae.training_utils.autoencoder.build import build_discriminator, smallest_image_px


def test_a_saved_discriminator_continues_in_training_mode(tmp_path):
    PatchDiscriminator(base_channels=4, num_layers=2).save_pretrained(tmp_path)
    discriminator = build_discriminator(AutoencoderLossArguments(disc_pretrained=str(tmp_path)), smallest_px=32)
    assert all(module.training for module in discriminator.modules())


def test_tau_needs_two_cells_and_the_smallest_image_is_its_quarter(tiny_autoencoder_kl):
    factor = downsampling_factor(tiny_autoencoder_kl)
    plain = AutoencoderObjective(tiny_autoencoder_kl)
    scaled = AutoencoderObjective(tiny_autoencoder_kl, {"equivariance": EquivarianceRegularizer(factor)})
    assert smallest_image_px(plain, factor) == factor
    assert smallest_image_px(scaled, 8 * factor) == 2 * factor
    with pytest.raises(ValueError, match=f"needs at least 2 positions a side.*--resolution {2 * factor} or more"):
        smallest_image_px(scaled, factor)
    rotations = EquivarianceRegularizer(factor, distribution=TauDistribution(scale="none"))
    assert smallest_image_px(AutoencoderObjective(tiny_autoencoder_kl, {"equivariance": rotations}), factor) == factor


def test_arguments_of_what_is_switched_off_are_named(caplog):
    build_discriminator(AutoencoderLossArguments(disc_weight=0.0, disc_start=5), smallest_px=32)
    assert caplog.messages == [
        "Without effect, since --disc_weight is 0: --disc_start.",
    ]
