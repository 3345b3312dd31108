"""--latent_channels: the wider autoencoder begins as the function that it was, and its new channels learn."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKL, VQModel

from diffusers_eqvae import AutoencoderKLEQ
from diffusers_eqvae.autoencoders import decode, encode
from diffusers_eqvae.training_utils.autoencoder.channels import with_latent_channels

from ...invariants.trajectories import assert_equal, last_checkpoint, run_script
from ...scripts.test_train_autoencoder import SCRIPT, flags, folder

__all__ = ["folder"]
TINY = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latents_mean": [1.0] * 4, "latents_std": [2.0] * 4}
TINY |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


@pytest.mark.parametrize("channels", [5, 8, 16])
@pytest.mark.parametrize("quant_convs", [True, False])
def test_it_begins_as_the_function_that_it_was(channels, quant_convs):
    torch.manual_seed(0)
    options = {"use_quant_conv": quant_convs, "use_post_quant_conv": quant_convs, "padding_mode": "reflect"}
    vae = AutoencoderKLEQ(**TINY, **options)
    wider = with_latent_channels(vae, channels)
    assert type(wider) is AutoencoderKLEQ and wider.config.latent_channels == channels
    assert wider.config.padding_mode == "reflect" and wider.config.latents_mean is None
    vae, wider = vae.double(), wider.double()
    pixels = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    was, now = encode(vae, pixels), encode(wider, pixels)
    assert torch.allclose(now.mean[:, :4], was.mean, rtol=0, atol=1e-12)
    turns = [number % 4 for number in range(channels)]  # a new channel is as noisy as an old one
    assert torch.allclose(now.logvar, was.logvar[:, turns], rtol=0, atol=1e-12)
    assert (now.mean[:, 4:].std((0, 2, 3)) > 0.05 * was.mean.std()).all()
    raw_latents = torch.randn(2, channels, 8, 8, dtype=torch.float64)
    assert torch.allclose(decode(wider, raw_latents), decode(vae, raw_latents[:, :4]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("quant_convs", [True, False])
def test_the_new_channels_learn(quant_convs):
    """Zeros at both ends would never move: the decoder's move first, and by them the encoder's."""
    torch.manual_seed(0)
    wider = with_latent_channels(
        AutoencoderKLEQ(**TINY, use_quant_conv=quant_convs, use_post_quant_conv=quant_convs), 8
    )
    optimizer = torch.optim.SGD(wider.parameters(), lr=1e-2)
    begun = wider.encoder.conv_out.weight[4:8].detach().clone()
    for read in (False, True):
        optimizer.zero_grad()
        pixels = torch.rand(2, 3, 16, 16)
        (decode(wider, encode(wider, pixels).mean) - pixels).square().sum().backward()
        assert wider.encoder.conv_out.weight.grad[4:8].any() == read
        assert wider.decoder.conv_in.weight.grad[:, 4:].flatten(2).any(2).all()
        optimizer.step()
    assert not torch.equal(wider.encoder.conv_out.weight[4:8], begun)


def test_what_cannot_be_widened_is_refused():
    vae = AutoencoderKL(**TINY)
    with pytest.raises(ValueError, match=r"--latent_channels adds to the 4 channels that there are; got 4: give more"):
        with_latent_channels(vae, 4)
    with pytest.raises(ValueError, match="widens an AutoencoderKL, and this is an VQModel; leave it out"):
        with_latent_channels(VQModel(), 8)


def test_the_script_widens_resumes_and_leaves_a_plain_autoencoder(folder, tiny_autoencoder_kl):
    options = {"latent_channels": 8, "max_train_steps": 2, "checkpointing_steps": 1, "validation_steps": 0}
    arguments = flags(folder, tiny_autoencoder_kl, **options, ema_decay=0.5)
    run_script(SCRIPT, arguments)
    whole = last_checkpoint(folder / "run", "objective")
    trained = AutoencoderKL.from_pretrained(folder / "run")
    assert trained.config.latent_channels == len(trained.config.latents_mean) == 8
    assert trained.decoder.conv_in.weight[:, 4:].abs().max() > 0
    training = json.loads((folder / "run" / "run_metadata.json").read_text())["training"]
    assert training["latent_channels"] == 8
    (folder / "run" / "checkpoints" / "step-00000002" / "complete.json").unlink()
    run_script(SCRIPT, [*arguments, "--resume_from_checkpoint", "latest"])
    assert_equal(whole, last_checkpoint(folder / "run", "objective"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainable", "lora"], r"leaves encoder.conv_out and decoder.conv_in frozen; train both halves in full"),
        (["--trainable", "encoder"], r"--trainable encoder leaves decoder.conv_in frozen"),
        (["--normalization", "config"], r"channels before --latent_channels; leave it out, or give channel or scalar"),
    ],
)
def test_new_channels_that_would_not_learn_are_refused(folder, tiny_autoencoder_kl, words, message):
    with pytest.raises(ValueError, match=message):
        run_script(SCRIPT, [*flags(folder, tiny_autoencoder_kl, latent_channels=8), *words])
