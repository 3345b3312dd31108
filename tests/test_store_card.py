"""The card of a latent store: it says what the store holds, and its code reads it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import yaml

from diffusers_eqvae.hub import prepare_push
from diffusers_eqvae.latents import LatentNormalization
from diffusers_eqvae.provenance import autoencoder_identity
from tests.data.test_latent_store import SETTINGS, write


@pytest.fixture
def store(tmp_path, tiny_autoencoder_kl):
    """As encode_latents leaves one, with a few files that are nobody's business."""
    LatentNormalization(mean=(0.1, -0.2, 0.3, 0.0), std=(1.0, 1.5, 2.0, 0.5)).apply_to(tiny_autoencoder_kl)
    identity = autoencoder_identity(tiny_autoencoder_kl)
    source = {"dataset": "me/photographs", "split": "train"}
    settings = replace(SETTINGS, shape=(8, 4, 4), encoder=identity["encoder"]["float32"], source=source)
    path = write(tmp_path / "latents", settings, autoencoder=identity)
    tiny_autoencoder_kl.save_pretrained(path / "vae")
    LatentNormalization.from_vae(tiny_autoencoder_kl).save_json(path / "mean_std.json", num_samples=11)
    (path / "verify.png").write_bytes(b"images of somebody")
    (path / "shard-00000.safetensors.tmp").write_bytes(b"half written")
    return path


def test_what_is_pushed_is_the_store_and_its_autoencoder(store):
    files, _ = prepare_push(store, "me/latents")
    shards = [f"shard-{number:05d}.safetensors" for number in range(3)]
    own = ["README.md", "manifest.json", "mean_std.json", *shards]
    assert files == sorted([*own, "vae/config.json", "vae/diffusion_pytorch_model.safetensors"])


@pytest.mark.parametrize("license", [None, "cc-by-4.0"])
def test_the_card_says_what_the_store_holds_and_no_licence_of_its_own(store, license):
    files, card = prepare_push(store, "me/latents", license=license)
    front = yaml.safe_load(card.split("---\n")[1])
    assert front.get("license") == license and front["size_categories"] == ["n<1K"]
    assert front["source_datasets"] == ["me/photographs"]
    assert ("is not known to this card, and no\n> licence is stated" in card) is (license is None)
    size = sum((store / name).stat().st_size for name in files if name != "README.md") / 1e6
    for text in (
        "The latents of 11 images of [me/photographs]",
        "| of each image | 8 x 4 x 4 in bfloat16, and of the mirrored image |",
        f"| size | {size:.1f} MB in 3 shards |",
        "3 could not be read and were replaced",
        "| classes | 4: a, b, c, none |",
        "| 1 | -0.2 | 1.5 |",
        "| 3 | 0 | 0.5 |",
    ):
        assert text in card, card


def test_the_code_of_the_card_reads_the_store(store, monkeypatch):
    _, card = prepare_push(store, "me/latents")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *words, **options: asked.append((words, options)) or str(store)
    )
    names = {}
    exec(compile(code, "card", "exec"), names)
    assert asked == [(("me/latents",), {"repo_type": "dataset"})]
    assert names["raw_latents"].shape == (11, 4, 4, 4)


@pytest.mark.parametrize("own_card", [False, True])
def test_a_damaged_store_is_not_published(store, own_card):
    if own_card:
        (store / "README.md").write_text("Mine.")
    content = (store / "shard-00001.safetensors").read_bytes()
    (store / "shard-00001.safetensors").write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors is truncated.*encode the data again"):
        prepare_push(store, "me/latents")
