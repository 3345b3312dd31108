"""A store of tokens: exact, in random order, by any number of processes, with the laws of the other kinds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusers_eqvae.data.latent_format import StoreSettings
from diffusers_eqvae.data.latent_store import LatentStore
from diffusers_eqvae.data.latent_writer import LatentStoreWriter
from diffusers_eqvae.data.order import DrawDataset

SETTINGS = StoreSettings(
    num_examples=11,
    shape=(2, 3),
    dtype="uint16",
    views=2,
    kind="tokens",
    shard_size=4,
    batch_size=3,
    resolution=48,
    downsampling_factor=16,
    labelled=True,
    encoder="an encoder",
    codebook="a codebook",
    codebook_size=2**16,
)


def tokens_of(settings=SETTINGS) -> torch.Tensor:
    drawn = np.random.default_rng(0).integers(settings.codebook_size, size=(11, settings.views, 2, 3), dtype=np.uint16)
    drawn[0, 0, 0] = (0, settings.codebook_size - 1, 1)  # both ends
    return torch.from_numpy(drawn)


def write(path, settings=SETTINGS, *, shards=None, finish=True):
    writer = LatentStoreWriter(path, settings)
    for shard in writer.pending()[0] if shards is None else shards:
        examples = settings.examples(shard)
        labels = torch.arange(11)[examples.start : examples.stop] % 3
        writer.write_shard(shard, tokens_of(settings)[examples.start : examples.stop], labels=labels)
    if finish:
        writer.finish(autoencoder=None, id2label={0: "cat", 1: "dog", 2: "otter"})
    return path


def test_tokens_come_back_as_they_went_in(tmp_path):
    store = LatentStore(write(tmp_path))
    for view in (0, 1):
        batch = store.get_many([10, 0, 3], view=view)
        assert list(batch) == ["tokens", "class_labels"] and batch["tokens"].dtype == torch.uint16
        assert torch.equal(batch["tokens"].long(), tokens_of()[[10, 0, 3], view].long())
    assert torch.equal(store[5]["tokens"].long(), tokens_of()[5, 0].long())
    assert store.latent_shape == (2, 3) and store.settings.is_tokens
    assert store.settings.bytes(11) == 11 * (2 * 6 * 2 + 8)
    counts = np.bincount(tokens_of().numpy().ravel(), minlength=2**16)
    assert store.token_counts == counts.tolist()
    drawn = DrawDataset(store, seed=0).__getitems__([4, 9])
    assert drawn["tokens"].shape == (2, 2, 3) and drawn["class_labels"].shape == (2,)


def test_shards_do_not_depend_on_who_wrote_them(tmp_path):
    write(tmp_path / "one")
    write(tmp_path / "two", shards=[2], finish=False)
    write(tmp_path / "two", shards=[0, 1])
    for path in (tmp_path / "one").iterdir():
        if path.suffix in (".safetensors", ".json"):
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    # The first shard is whole and stays; one of another codebook is refused.
    assert LatentStoreWriter(tmp_path / "one", SETTINGS).pending()[0] == []
    with pytest.raises(ValueError, match=r"other settings: codebook \(shard: a codebook, now: another\)"):
        LatentStoreWriter(tmp_path / "one", replace(SETTINGS, codebook="another")).pending()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"dtype": "bfloat16"}, "Tokens are stored as uint16 with the size of their codebook"),
        ({"kind": "latents", "shape": (1, 2, 3)}, "uint16 with the size of their codebook, and nothing else is"),
        ({"codebook_size": None}, "with codebook_size None"),
        ({"codebook_size": 2**16 + 1}, r"codebooks of 1 \.\. 65536 vectors; got 65537"),
        ({"codebook_size": 0}, r"codebooks of 1 \.\. 65536 vectors; got 0"),
    ],
    ids=["a float", "latents as uint16", "no size", "too many vectors", "no vectors"],
)
def test_settings_that_are_not_of_tokens_are_refused(changed, words):
    with pytest.raises(ValueError, match=words):
        replace(SETTINGS, **changed)


def test_what_tokens_are_not_is_refused(tmp_path):
    writer = LatentStoreWriter(tmp_path, replace(SETTINGS, codebook_size=100, labelled=False))
    with pytest.raises(ValueError, match="Shard 0 must hold tokens below 100, the size of the codebook; got 65535"):
        writer.write_shard(0, tokens_of()[:4])
    store = LatentStore(write(tmp_path / "whole"))
    for read in (store.statistics, lambda: store.posterior(store.get_many([0])["tokens"])):
        with pytest.raises(ValueError, match="holds tokens, not latents; encode it as posteriors for those"):
            read()
