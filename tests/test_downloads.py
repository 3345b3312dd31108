"""A published file is fetched once, is the one that was meant, and is asked for in a sentence where it cannot be."""

from __future__ import annotations

import hashlib
import re

import pytest
import torch
from huggingface_hub import constants

from diffusers_eqvae.downloads import published_file
from diffusers_eqvae.metrics.feature_networks import load_feature_network


@pytest.fixture
def published(tmp_path, monkeypatch):
    """An address, and an empty cache."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "weights.pth").write_bytes(b"weights")
    return tmp_path / "weights.pth"


DIGEST = hashlib.sha256(b"weights").hexdigest()[:8]


def fetch(published, sha256=DIGEST, **options):
    address = f"file://{published}"
    return published_file(address, sha256=sha256, what="The network", instead="name a local copy", **options)


def test_a_file_is_fetched_once(published, tmp_path, monkeypatch):
    path = fetch(published)
    assert path == tmp_path / "cache" / "checkpoints" / "weights.pth" and path.read_bytes() == b"weights"
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *words, **options: pytest.fail("fetched again"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(published) == path


def test_another_file_at_the_address_is_not_kept(published, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"could not be fetched \(invalid hash value.*name a local copy"):
        fetch(published, sha256="00000000")
    assert not list((tmp_path / "cache" / "checkpoints").iterdir())


def test_without_a_network_the_address_and_the_place_are_said(published, tmp_path, monkeypatch):
    said = (
        rf"The network needs its\.pth, .* download file://{published} to {re.escape(str(tmp_path))}/cache/.*/its\.pth"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set: download file"):
        fetch(published)
    with pytest.raises(FileNotFoundError, match=said):
        fetch(published, name="its.pth")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    published.unlink()
    with pytest.raises(FileNotFoundError, match=said):
        fetch(published, name="its.pth")


@pytest.mark.parametrize("name", ["inception", "squeezenet", "cifar_resnet"])
def test_a_network_of_features_without_a_file_is_fetched(name, monkeypatch):
    asked = []

    def download(url, path, *, hash_prefix, progress):
        asked.append((url, hash_prefix))
        raise OSError("no network here")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(FileNotFoundError, match=rf"no network here\): download https.*{name}=FILE"):
        load_feature_network(name)
    ((url, digest),) = asked
    assert url.startswith("https://") and re.search(rf"-{digest}\.\w+$", url), "the name ends with the digest"
