"""train_autoencoder.py --trainable decoder: latents and whatever stands on them stay; the encoder may cost nothing."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from diffusers_eqvae.autoencoders import encode, load_autoencoder
from diffusers_eqvae.data.image_datasets import load_image_dataset
from diffusers_eqvae.data.latent_store import LatentStore
from diffusers_eqvae.data.stored_images import StoredImages
from diffusers_eqvae.hub import prepare_push
from diffusers_eqvae.provenance import autoencoder_identity

from ..invariants.trajectories import ROOT, as_flags, assert_close, assert_equal, last_checkpoint, run_script
from .test_train_autoencoder import SCRIPT, flags, folder

__all__ = ["folder"]
ENCODE = ROOT / "training" / "encode_latents.py"
DECODER = {"trainable": "decoder", "regularizers": "none", "validation_steps": 0, "checkpointing_steps": 2}
STORED = {"center_crop": True, "sample_posterior": "false"}


@pytest.fixture
def store(folder, tiny_autoencoder_kl):
    """Of the folder's images, both views, in float32."""
    tiny_autoencoder_kl.save_pretrained(folder / "base")
    words = {"vae": folder / "base", "train_data_dir": folder / "images", "output_dir": folder / "store"}
    words |= {"resolution": 32, "dtype": "fp32", "cache_dir": folder / "cache"}
    run_script(ENCODE, [*as_flags(words), "--flip"])
    return folder / "store"


def train(folder, store, **options):
    vae = load_autoencoder(str(store / "vae"))
    run_script(SCRIPT, flags(folder, vae, **{**DECODER, **STORED, "latents_dir": store, **options}))


def test_latents_and_what_stands_on_them_stay(folder, store):
    vae = load_autoencoder(str(store / "vae"))
    run_script(SCRIPT, flags(folder, vae, **DECODER))
    after = load_autoencoder(str(folder / "run"))
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        assert torch.equal(encode(vae, pixels).moments, encode(after, pixels).moments)
    ours, theirs = autoencoder_identity(after), autoencoder_identity(vae)
    assert {key for key in ours if ours[key] != theirs[key]} == {"decoder"}
    LatentStore(store, vae=after)
    moved = [not torch.equal(a, b) for a, b in zip(after.decoder.parameters(), vae.decoder.parameters(), strict=True)]
    assert all(moved)
    _, card = prepare_push(folder / "run", "me/decoder")
    assert "**Compatibility: drop-in.**" in card and "| trainable | decoder |" in card
    state = last_checkpoint(folder / "run", "objective")
    assert not any("encoder" in name for name in (*state["module"], *state["ema"]))


def test_from_a_store_the_decoder_learns_what_it_learns_from_images(folder, store):
    """A store in float32 changes nothing but the rounding of the encoder's batches."""
    train(folder, store)
    stored = last_checkpoint(folder / "run", "objective")
    options = {**DECODER, **STORED, "output_dir": folder / "images-run"}
    run_script(SCRIPT, flags(folder, load_autoencoder(str(store / "vae")), **options))
    assert_close(stored, last_checkpoint(folder / "images-run", "objective"), tolerance=1e-4)


def test_from_a_store_nothing_is_encoded_and_a_resumed_run_is_an_uninterrupted_one(folder, store, monkeypatch):
    from diffusers_eqvae.objectives import autoencoder as objective

    def refuse(*_):
        raise AssertionError("the encoder was called")

    monkeypatch.setattr(objective, "encode", refuse)
    options = {"random_flip": True, "sample_posterior": True, "regularizers": "equivariance", "max_train_steps": 4}
    train(folder, store, **options)
    whole = last_checkpoint(folder / "run", "objective")
    shutil.rmtree(folder / "run" / "checkpoints" / "step-00000004")
    train(folder, store, **options, resume_from_checkpoint="latest")
    assert_equal(whole, last_checkpoint(folder / "run", "objective"))


def test_moments_pixels_and_side_belong_together(folder, store):
    vae, source = load_autoencoder(str(store / "vae")), load_image_dataset(train_data_dir=folder / "images")
    pairs = StoredImages(LatentStore(store, vae=vae), source, random_flip=True)
    drawn = [pairs.get(index % 6, np.random.default_rng(index)) for index in range(18)]
    for example in drawn:
        with torch.no_grad():
            moments = encode(vae, example["pixel_values"][None]).moments[0]
        torch.testing.assert_close(moments, example["moments"], rtol=1e-4, atol=1e-4)
    assert len({example["pixel_values"].sum().item() for example in drawn}) > 6  # both sides were drawn


def other_images(folder):
    image = folder / "images" / "3.png"
    ImageOps.invert(Image.open(image)).save(image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"center_crop": False}, "holds centre crops of 32 px; add --center_crop --resolution 32"),
        ({"resolution": 64}, "holds centre crops of 32 px; add --center_crop --resolution 32"),
        ({"trainable": "full"}, "--latents_dir holds latents of an encoder that stays as it is; give --trainable dec"),
        ({"normalization": "channel"}, "--normalization channel gives other latents"),
        ({"padding_mode": "reflect"}, "--padding_mode reflect gives other latents"),
        ({"spoil": other_images}, "These are not the data of the store .*give the images that it was encoded from"),
    ],
)
def test_what_does_not_belong_to_the_store_is_refused(folder, store, options, message):
    if spoil := options.pop("spoil", None):
        spoil(folder)
    with pytest.raises(ValueError, match=message):
        train(folder, store, **options)
    assert not (folder / "run").exists()


def test_another_encoder_and_missing_views_are_refused(folder, store, tiny_autoencoder_kl):
    torch.nn.init.ones_(tiny_autoencoder_kl.encoder.conv_in.bias)
    options = {**DECODER, **STORED, "latents_dir": store}
    with pytest.raises(ValueError, match=r"does not belong to the store .*its encoder weights"):
        run_script(SCRIPT, flags(folder, tiny_autoencoder_kl, **options))
    source = load_image_dataset(train_data_dir=folder / "images")
    opened = LatentStore(store)
    object.__setattr__(opened.settings, "views", 1)
    with pytest.raises(ValueError, match="holds no mirrored views; encode it with them, or do not flip"):
        StoredImages(opened, source, random_flip=True)


def test_the_alignment_of_a_frozen_encoder_is_refused(folder, store):
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder / "dino")
    options = {"regularizers": "alignment", "alignment_teacher": folder / "dino", "alignment_image_size": 56}
    with pytest.raises(
        ValueError,
        match="alignment moves nothing of the autoencoder but its encoder, and no weight of that learns here",
    ):
        train(folder, store, **options)


def test_adapters_of_the_decoder_train_from_a_store(folder, store):
    train(folder, store, trainable=["lora", "decoder"], lora_rank=2)
    before, after = (autoencoder_identity(load_autoencoder(str(path))) for path in (store / "vae", folder / "run"))
    assert [part for part in before if before[part] != after[part]] == ["decoder"]
    LatentStore(store, vae=load_autoencoder(str(folder / "run")))
