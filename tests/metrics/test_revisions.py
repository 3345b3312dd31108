"""Revisions: a Hub commit where one can be known, else a hash that every weight enters."""

from __future__ import annotations

import re

from diffusers import AutoencoderKL

from diffusers_eqvae.metrics.revisions import model_revision

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_local_weights_are_hashed(tiny_autoencoder_kl, tmp_path):
    tiny_autoencoder_kl.save_pretrained(tmp_path / "vae")
    loaded = AutoencoderKL.from_pretrained(tmp_path / "vae")
    first = model_revision(loaded)
    assert re.fullmatch(r"weights [0-9a-f]{16}", first) and first == model_revision(tiny_autoencoder_kl)
    loaded.decoder.conv_out.bias.data[0] += 1e-6
    assert model_revision(loaded) != first


def test_a_snapshot_of_the_hubs_cache_has_a_commit(tiny_autoencoder_kl, tmp_path, monkeypatch):
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / COMMIT
    tiny_autoencoder_kl.save_pretrained(snapshot / "vae")
    tiny_autoencoder_kl.save_pretrained(snapshot)
    assert model_revision(AutoencoderKL.from_pretrained(snapshot / "vae")) == f"commit {COMMIT}"
    # By name, the cache says what its main revision is.
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    named = tiny_autoencoder_kl
    named.register_to_config(_name_or_path="owner/name")
    assert model_revision(named) == f"commit {COMMIT}"
    named.register_to_config(_name_or_path="owner/unknown")
    assert model_revision(named).startswith("weights ")
    named.register_to_config(_commit_hash="f" * 40)
    assert model_revision(named) == f"commit {'f' * 40}"
