"""Revisions: a hash that every weight enters, and a commit of the Hub where the loader knew it."""

from __future__ import annotations

import re

from diffusers import AutoencoderKL

from diffusers_eqvae.provenance import model_revision

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_local_weights_are_hashed(tiny_autoencoder_kl, tmp_path):
    tiny_autoencoder_kl.save_pretrained(tmp_path / "vae")
    loaded = AutoencoderKL.from_pretrained(tmp_path / "vae")
    first = model_revision(loaded)
    assert re.fullmatch(r"weights [0-9a-f]{16}", first) and first == model_revision(tiny_autoencoder_kl)
    loaded.decoder.conv_out.bias.data[0] += 1e-6
    assert model_revision(loaded) != first


def test_a_snapshot_of_the_hubs_cache_has_a_commit(tiny_autoencoder_kl, tmp_path):
    snapshot = tmp_path / "models--owner--name" / "snapshots" / COMMIT
    tiny_autoencoder_kl.save_pretrained(snapshot / "vae")
    weights = model_revision(tiny_autoencoder_kl)
    loaded = AutoencoderKL.from_pretrained(snapshot / "vae")
    assert model_revision(loaded) == f"commit {COMMIT}, {weights}"
    loaded.decoder.conv_out.bias.data[0] += 1e-6
    assert model_revision(loaded).startswith(f"commit {COMMIT}, weights ") and weights not in model_revision(loaded)
    tiny_autoencoder_kl.register_to_config(_commit_hash="f" * 40)
    assert model_revision(tiny_autoencoder_kl) == f"commit {'f' * 40}, {weights}"


def test_a_name_alone_has_no_commit(tiny_autoencoder_kl, tmp_path, monkeypatch):
    """Another revision may have been loaded by that name than the one that the cache holds as main."""
    repository = tmp_path / "models--owner--name"
    tiny_autoencoder_kl.save_pretrained(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    weights = model_revision(tiny_autoencoder_kl)
    tiny_autoencoder_kl.register_to_config(_name_or_path="owner/name")
    assert model_revision(tiny_autoencoder_kl) == weights and weights.startswith("weights ")
