"""What autoencoder training builds from its arguments."""

from __future__ import annotations

from diffusers_eqvae.models.discriminator import PatchDiscriminator
from diffusers_eqvae.training_utils.autoencoder_arguments import AutoencoderLossArguments
from diffusers_eqvae.training_utils.autoencoder_parts import build_discriminator


def test_a_saved_discriminator_continues_in_training_mode(tmp_path):
    PatchDiscriminator(base_channels=4, num_layers=2).save_pretrained(tmp_path)
    discriminator = build_discriminator(AutoencoderLossArguments(disc_pretrained=str(tmp_path)), smallest_px=32)
    assert all(module.training for module in discriminator.modules())
