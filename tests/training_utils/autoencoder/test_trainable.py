"""Which weights --trainable leaves trainable, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from diffusers import AsymmetricAutoencoderKL
from torch import nn

from diffusers_eqvae.autoencoders import encode
from diffusers_eqvae.training_utils.autoencoder.trainable import (
    freeze_all_but,
    keeps_latents,
    refuse_other_latents,
)

from ...faults.test_autoencoder_classes import TINY, tiny


def trained(vae) -> set[str]:
    return {name for name, weight in vae.named_parameters() if weight.requires_grad}


def beginning(vae, *starts: str) -> set[str]:
    return {name for name, _ in vae.named_parameters() if name.startswith(starts)}


@pytest.mark.parametrize(
    ("words", "starts"),
    [
        (["full"], ("",)),
        (["decoder"], ("decoder.", "post_quant_conv.")),
        (["encoder"], ("encoder.", "quant_conv.")),
        (["decoder.up_blocks.1", "encoder.conv_in"], ("decoder.up_blocks.1.", "encoder.conv_in.")),
    ],
)
def test_the_words_choose_exactly_these_weights(tiny_autoencoder_kl, words, starts):
    freeze_all_but(tiny_autoencoder_kl, words)
    assert trained(tiny_autoencoder_kl) == beginning(tiny_autoencoder_kl, *starts)
    assert keeps_latents(tiny_autoencoder_kl) == (words == ["decoder"])


def test_a_name_is_not_the_beginning_of_another():
    vae = nn.Module()
    vae.decoder = nn.ModuleDict({"conv_1": nn.Conv2d(1, 1, 1), "conv_10": nn.Conv2d(1, 1, 1)})
    from diffusers_eqvae.training_utils.autoencoder.trainable import _prefixes

    (prefix,) = _prefixes(vae, "decoder.conv_1")
    assert not "decoder.conv_10.weight".startswith(prefix) and "decoder.conv_1.weight".startswith(prefix)


def test_a_codebook_belongs_to_the_latents(tiny_vq_model):
    freeze_all_but(tiny_vq_model, ["decoder"])
    assert keeps_latents(tiny_vq_model) and "quantize.embedding.weight" not in trained(tiny_vq_model)
    freeze_all_but(tiny_vq_model, ["decoder", "codebook"])
    assert not keeps_latents(tiny_vq_model) and "quantize.embedding.weight" in trained(tiny_vq_model)


def test_what_is_frozen_is_evaluated_and_its_statistics_stay():
    vae = tiny("AutoencoderTiny")
    vae.encoder.layers.append(nn.BatchNorm2d(4))
    freeze_all_but(vae.train(), ["decoder"])
    before = vae.encoder.layers[-1].running_mean.clone()
    encode(vae, torch.rand(2, 3, 16, 16))
    assert torch.equal(vae.encoder.layers[-1].running_mean, before) and vae.decoder.training


def test_what_no_image_reaches_is_frozen_and_named(caplog):
    vae = AsymmetricAutoencoderKL(**TINY["AsymmetricAutoencoderKL"])
    state = torch.get_rng_state()
    freeze_all_but(vae, ["full"])
    assert torch.equal(state, torch.get_rng_state())
    assert trained(vae) == beginning(vae, "") - beginning(vae, "decoder.condition_encoder.")
    assert "Frozen, since neither encoding nor decoding an image reads them: decoder.condition_encoder" in caplog.text


@pytest.mark.parametrize(
    "name",
    sorted(
        name
        for name in TINY
        if not name.startswith(("Asymmetric", "AutoencoderKLQwen", "AutoencoderKLWan", "AutoencoderRAE"))
    ),
)
def test_other_classes_read_all_their_weights(name, caplog):
    vae = tiny(name)
    freeze_all_but(vae, ["full"])
    assert trained(vae) == beginning(vae, "") and not caplog.text


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("decoder.up_block.1", "the nearest are decoder.up_blocks.1"),
        ("everything", r"the nearest are encoder, decoder, quant_conv, post_quant_conv. It takes full, lora, encoder"),
        ("decoder.conv_act", "names a part of this AutoencoderKL without weights"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(tiny_autoencoder_kl, word, message):
    with pytest.raises(ValueError, match=message):
        freeze_all_but(tiny_autoencoder_kl, [word])


def test_other_ways_to_change_latents_are_refused_where_they_are_kept(tiny_autoencoder_kl):
    asked = {"padding_mode": None, "normalization": "channel"}
    refuse_other_latents(tiny_autoencoder_kl, pretrained=False, asked=asked)
    freeze_all_but(tiny_autoencoder_kl, ["decoder"])
    refuse_other_latents(tiny_autoencoder_kl, pretrained=True, asked={"padding_mode": None})
    with pytest.raises(ValueError, match=r"--normalization channel gives other latents.*leave --normalization out"):
        refuse_other_latents(tiny_autoencoder_kl, pretrained=True, asked=asked)
    with pytest.raises(ValueError, match="one from --model_config has learned nothing; give --pretrained_model"):
        refuse_other_latents(tiny_autoencoder_kl, pretrained=False, asked={})
