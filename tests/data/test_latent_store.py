"""The store gives back what was written, and refuses what is broken or belongs elsewhere."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from diffusers_eqvae.data.latent_format import StoreSettings
from diffusers_eqvae.data.latent_store import LatentStore
from diffusers_eqvae.data.latent_writer import LatentStoreWriter
from diffusers_eqvae.data.order import DrawDataset, DrawSampler, collate_draws
from diffusers_eqvae.latents import LatentStatistics
from diffusers_eqvae.provenance import autoencoder_identity
from tests.faults.test_stores import HEADERS, change_header

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SETTINGS = StoreSettings(
    num_examples=11,
    shape=(8, 2, 3),
    dtype="bfloat16",
    views=2,
    kind="moments",
    shard_size=4,
    batch_size=3,
    resolution=16,
    downsampling_factor=8,
    labelled=True,
    encoder="0" * 16,
)


def moments_of(settings: StoreSettings) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    moments = torch.randn((settings.num_examples, settings.views, *settings.shape), generator=generator)
    return moments.to(TORCH_DTYPES[settings.dtype])


def labels_of(settings: StoreSettings) -> torch.Tensor:
    return torch.arange(settings.num_examples) % 3


def write(path: Path, settings: StoreSettings = SETTINGS, *, order=None, autoencoder=None) -> Path:
    moments, labels = moments_of(settings), labels_of(settings)
    for shard in order or range(settings.num_shards):
        examples = list(settings.examples(shard))
        LatentStoreWriter(path, settings).write_shard(
            shard, moments[examples], labels=labels[examples] if settings.labelled else None, skipped=[f"bad{shard}"]
        )
    LatentStoreWriter(path, settings).finish(autoencoder=autoencoder, id2label={0: "a", 1: "b", 2: "c", 3: "none"})
    return path


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_batches_hold_exactly_what_was_written(tmp_path: Path, dtype: str) -> None:
    settings = replace(SETTINGS, dtype=dtype)
    store = LatentStore(write(tmp_path, settings))
    indices = [10, 0, 3, 4, 0, 7]
    for view in (0, 1):
        batch = store.get_many(indices, view=view)
        assert batch["moments"].dtype == TORCH_DTYPES[dtype] and batch["moments"].is_contiguous()
        assert torch.equal(batch["moments"], moments_of(settings)[indices, view])
        assert batch["class_labels"].tolist() == labels_of(settings)[indices].tolist()
    assert torch.equal(store[5]["moments"], moments_of(settings)[5, 0]) and int(store[5]["class_labels"]) == 2
    assert store.latent_shape == (4, 2, 3) and store.num_classes == 4 and len(store) == 11
    assert store.manifest["class_counts"] == {"0": 4, "1": 4, "2": 3, "3": 0}
    assert store.manifest["skipped"] == ["bad0", "bad1", "bad2"]


def test_posterior_splits_moments_and_deterministic_latents_are_the_mean(tmp_path: Path) -> None:
    store = LatentStore(write(tmp_path / "moments"))
    batch = store.get_many([1, 2])["moments"]
    assert torch.equal(store.posterior(batch).mean, batch[:, :4])
    settings = replace(SETTINGS, kind="latents", labelled=False, views=1)
    store = LatentStore(write(tmp_path / "latents", settings))
    batch = store.get_many([1, 2])
    assert list(batch) == ["moments"] and store.labels is None
    assert store.posterior(batch["moments"]).logvar is None and store.latent_shape == (8, 2, 3)


def test_statistics_equal_float64_of_everything_stored(tmp_path: Path) -> None:
    statistics = LatentStore(write(tmp_path)).statistics()
    mean, logvar = moments_of(SETTINGS).flatten(0, 1).double().chunk(2, dim=1)
    variance = mean.var((0, 2, 3), correction=0) + logvar.exp().mean((0, 2, 3))
    assert statistics.num_samples == 22
    assert statistics.mean == pytest.approx(mean.mean((0, 2, 3)).tolist(), rel=1e-12, abs=1e-15)
    assert statistics.std == pytest.approx(variance.sqrt().tolist(), rel=1e-12)


def test_order_of_writing_changes_no_byte(tmp_path: Path) -> None:
    write(tmp_path / "forth"), write(tmp_path / "back", order=[2, 0, 1])
    names = sorted(path.name for path in (tmp_path / "forth").iterdir())
    assert names == [".eqvae.json", "manifest.json", *(f"shard-0000{shard}.safetensors" for shard in range(3))]
    for name in names:
        assert (tmp_path / "forth" / name).read_bytes() == (tmp_path / "back" / name).read_bytes()


def test_draws_choose_both_views_and_workers_change_nothing(tmp_path: Path) -> None:
    store = LatentStore(write(tmp_path))

    def read(num_workers: int) -> list[torch.Tensor]:
        dataset = DrawDataset(store, seed=1)
        loader = iter(
            DataLoader(
                dataset,
                batch_sampler=DrawSampler(len(store), 8, seed=1),
                collate_fn=collate_draws,
                num_workers=num_workers,
            )
        )
        return [next(loader)["moments"] for _ in range(8)]

    batches = read(0)
    assert all(torch.equal(a, b) for a, b in zip(batches, read(2), strict=True))
    assert torch.equal(DrawDataset(store, seed=1)[9]["moments"], batches[1][1])
    first = torch.cat([store.get_many(range(11), view=0)["moments"], store.get_many(range(11), view=1)["moments"]])
    seen = [int((first == row).flatten(1).all(1).nonzero()) for row in torch.cat(batches)]
    assert 20 < sum(position >= 11 for position in seen) < 44
    assert pickle.loads(pickle.dumps(store))._maps == {}


def test_finished_shards_are_skipped_and_other_settings_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "shard-00002.safetensors").unlink()
    writer = LatentStoreWriter(tmp_path, SETTINGS)
    assert writer.pending() == ([2], []) and writer.pending(0, 2) == ([2], []) and writer.pending(1, 2) == ([], [])
    for change in ({"dtype": "float16"}, {"encoder": "1" * 16}, {"batch_size": 2}, {"source": {"dataset": "other"}}):
        with pytest.raises(ValueError, match=f"other settings: {next(iter(change))}"):
            LatentStoreWriter(tmp_path, replace(SETTINGS, **change)).pending()


@pytest.mark.parametrize("keep", [-1, 200, 4, 0])
def test_truncated_shard_is_named_with_the_remedy(tmp_path: Path, keep: int) -> None:
    shard = write(tmp_path) / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"shard-00001.*delete it and encode the data again"):
        LatentStore(tmp_path)
    shards, complaints = LatentStoreWriter(tmp_path, SETTINGS).pending()
    assert shards == [1] and "shard-00001" in complaints[0]
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard-00001.* is missing"):
        LatentStore(tmp_path)


def test_a_header_that_claims_to_be_longer_than_memory_is_not_read(tmp_path: Path) -> None:
    shard = write(tmp_path) / "shard-00001.safetensors"
    shard.write_bytes((2**62).to_bytes(8, "little") + shard.read_bytes()[8:])
    with pytest.raises(ValueError, match=r"shard-00001.*delete it and encode the data again"):
        LatentStore(tmp_path)


@pytest.mark.parametrize("change", ["offsets outside", "no checksums", "statistics that are not finite"])
def test_a_header_that_was_changed_before_the_store_was_finished_is_noticed(tmp_path: Path, change: str) -> None:
    shard = write(tmp_path) / "shard-00001.safetensors"
    (tmp_path / "manifest.json").unlink()  # whose digests would say so
    assert LatentStoreWriter(tmp_path, SETTINGS).pending() == ([], [])
    change_header(shard, HEADERS[change])
    if change == "offsets outside":  # damage, and not another shard
        shards, complaints = LatentStoreWriter(tmp_path, SETTINGS).pending()
        assert shards == [1] and "shard-00001" in complaints[0]
    else:
        with pytest.raises(ValueError, match=r"shard-00001.* does not hold what .*; delete it and encode it again"):
            LatentStoreWriter(tmp_path, SETTINGS).pending()


def test_unfinished_foreign_or_newer_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a finished latent store"):
        LatentStore(tmp_path / "absent")
    manifest = write(tmp_path) / "manifest.json"
    for version, message in ((99, "newer than 3: update"), (1, "older than 3, .* encode the data again")):
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format_version": version}))
        with pytest.raises(ValueError, match=f"manifest.json has format_version {version}, {message}"):
            LatentStore(tmp_path)
    manifest.write_text("{")
    with pytest.raises(ValueError, match=r"is not a whole JSON file.* again"):
        LatentStore(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        LatentStoreWriter(tmp_path / "file", SETTINGS)


def test_another_autoencoder_is_refused_in_one_sentence(tmp_path: Path, tiny_autoencoder_kl) -> None:
    write(tmp_path, autoencoder=autoencoder_identity(tiny_autoencoder_kl))
    LatentStore(tmp_path, vae=tiny_autoencoder_kl)
    with torch.no_grad():
        tiny_autoencoder_kl.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
    with pytest.raises(ValueError, match="encoder weights differ"):
        LatentStore(tmp_path, vae=tiny_autoencoder_kl)


@pytest.mark.parametrize(
    ("version", "message"), [(1, "older than 3, .* another output directory"), (4, "newer than 3")]
)
def test_shards_of_another_format_are_neither_read_nor_written_over(tmp_path, monkeypatch, version, message) -> None:
    for module in ("latent_writer", "latent_format"):
        monkeypatch.setattr(f"diffusers_eqvae.data.{module}.FORMAT_VERSION", version)
    write(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=f"shard-00000.safetensors has format_version {version}, {message}"):
        LatentStoreWriter(tmp_path, SETTINGS).pending()


def test_statistics_of_a_store_merge_to_the_same_numbers(tmp_path: Path) -> None:
    writer = LatentStoreWriter(write(tmp_path), SETTINGS)
    merged = LatentStatistics.from_state_dict(json.loads((tmp_path / "manifest.json").read_text())["statistics"])
    assert merged.state_dict() == writer.statistics().state_dict()


def test_wrong_tensors_are_refused(tmp_path: Path) -> None:
    writer, moments, labels = LatentStoreWriter(tmp_path, SETTINGS), moments_of(SETTINGS)[:4], labels_of(SETTINGS)[:4]
    with pytest.raises(ValueError, match="must hold moments"):
        writer.write_shard(0, moments[:3], labels=labels)
    with pytest.raises(ValueError, match="must hold 4 labels"):
        writer.write_shard(0, moments)
    moments[1, 0, 0, 0, 0] = np.inf
    with pytest.raises(ValueError, match="not finite"):
        writer.write_shard(0, moments, labels=labels)
    with pytest.raises(IndexError, match=r"\[0, 11\)"):
        LatentStore(write(tmp_path)).get_many([11])
    with pytest.raises(ValueError, match="views must be one of"):
        replace(SETTINGS, views=3)
