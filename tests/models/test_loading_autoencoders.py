"""Loading an autoencoder by name: on its own, inside a pipeline, or not one at all."""

from __future__ import annotations

import pytest
import torch

from diffusers_eqvae.autoencoders import autoencoder_location, load_autoencoder
from diffusers_eqvae.models.transformer_sit import SiTTransformer2DModel


def test_a_pipeline_is_searched_in_vae(tmp_path, tiny_autoencoder_kl):
    tiny_autoencoder_kl.save_pretrained(tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    assert autoencoder_location(str(tmp_path)) == {"subfolder": "vae"}
    assert autoencoder_location(str(tmp_path), subfolder="other", revision="v1") == {
        "subfolder": "other",
        "revision": "v1",
    }
    for name in (tmp_path, tmp_path / "vae"):
        loaded = load_autoencoder(str(name))
        assert not loaded.training
        assert torch.equal(loaded.encoder.conv_in.weight, tiny_autoencoder_kl.encoder.conv_in.weight)


def test_what_is_no_autoencoder_is_refused(tmp_path):
    model = SiTTransformer2DModel(sample_size=4, num_layers=1, num_attention_heads=1, attention_head_dim=8)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a SiTTransformer2DModel, not an autoencoder"):
        load_autoencoder(str(tmp_path))
    with pytest.raises(OSError, match="nowhere"):
        load_autoencoder(str(tmp_path / "nowhere"))
