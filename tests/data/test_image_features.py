"""Features beside latents: row by row those of their image and view, under the laws of the latents themselves."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from diffusers_eqvae.autoencoders import encode, encoder_features
from diffusers_eqvae.data.image_features import EncoderFeatures, TeacherFeatures, feature_name, feature_networks
from diffusers_eqvae.data.latent_format import FeatureSettings
from diffusers_eqvae.data.latent_store import LatentStore
from diffusers_eqvae.data.latent_writer import LatentStoreWriter
from diffusers_eqvae.models.feature_teacher import FeatureTeacher

from .test_latent_store import SETTINGS, labels_of, moments_of

MAPS, WHOLE = (
    FeatureSettings((5, 2, 2), "float16", {"teacher": "a"}),
    FeatureSettings((7,), "float32", {"teacher": "b"}),
)
WITH = replace(SETTINGS, features={"maps": MAPS, "whole": WHOLE})


def features_of() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    maps, whole = (torch.randn((11, 2, *each.shape), generator=generator) for each in (MAPS, WHOLE))
    return {"features.maps": maps.half(), "features.whole": whole}


def write(path, settings=WITH, shards=None, *, finish=True):
    writer = LatentStoreWriter(path, settings)
    for shard in writer.pending()[0] if shards is None else shards:
        rows = list(settings.examples(shard))
        kept = writer.kept(shard)
        features = {name: values[rows] for name, values in features_of().items() if name in settings.rows}
        features |= kept.get("features", {})
        moments = kept.get("moments", moments_of(settings)[rows])
        writer.write_shard(shard, moments, labels=labels_of(settings)[rows], features=features)
    if finish:
        writer.finish(autoencoder=None, id2label={0: "a", 1: "b", 2: "c"})
    return path


def files(path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in path.iterdir() if each.suffix in (".json", ".safetensors")}


def test_every_view_has_the_features_that_were_written_beside_it(tmp_path):
    store = LatentStore(write(tmp_path))
    indices, words = [10, 0, 3, 4, 0], np.array([0, 2**63, 1, 2**63, 5], np.uint64)
    assert set(store.get_many(indices)) == {"moments", "class_labels"}  # 32 times the latents are not read unasked
    store.read_features("whole", "maps")
    batch, views = store.get_many(indices, words), [0, 1, 0, 1, 0]
    assert batch["features.maps"].dtype == torch.float16
    assert torch.equal(batch["moments"], moments_of(WITH)[indices, views])
    for name, values in features_of().items():
        assert torch.equal(batch[name], values[indices, views])
        assert torch.equal(store.get_many(indices, view=1)[name], values[indices, 1])
    with pytest.raises(ValueError, match="does not hold the features dino, but maps, whole"):
        store.read_features("dino")
    assert store.settings.features["maps"] == MAPS and store.settings.bytes(1) == 2 * (48 * 2 + 20 * 2 + 7 * 4) + 8


def swap(path, store, name, first, second):
    """Exchanges two rows of a tensor in shard 0, so that each is whole but stands beside another's latents."""
    entry = store._headers[0].tensors[name]
    begin, end = (store._headers[0].data_start + offset for offset in entry["data_offsets"])
    data = bytearray((path / "shard-00000.safetensors").read_bytes())
    size = (end - begin) // entry["shape"][0]
    a, b = (
        slice(begin + first * size, begin + (first + 1) * size),
        slice(begin + second * size, begin + (second + 1) * size),
    )
    data[a], data[b] = data[b], data[a]
    (path / "shard-00000.safetensors").write_bytes(data)


@pytest.mark.parametrize("with_checksums", [False, True])
def test_features_of_another_row_are_noticed(tmp_path, with_checksums):
    store = LatentStore(write(tmp_path))
    names = ["features.maps", "crc32.features.maps"] if with_checksums else ["features.maps"]
    for name in names:
        swap(tmp_path, store, name, 0, 2)
    store = LatentStore(tmp_path)
    store.get_many([0, 1, 2])  # the latents are whole
    store.read_features("maps")
    store.get_many([1, 3])
    with pytest.raises(ValueError, match=r"shard-00000.safetensors is damaged: example 2 is not what was written"):
        store.get_many([2])
    with pytest.raises(ValueError, match="its content does not agree with its digest"):
        store.verify()


def test_a_store_gets_features_later_and_is_then_the_same_to_the_last_byte(tmp_path):
    at_once = files(write(tmp_path / "once"))
    later = write(tmp_path / "later", SETTINGS)
    before = LatentStore(later).get_many(range(11))["moments"]
    writer = LatentStoreWriter(later, WITH)
    assert writer.pending() == ([0, 1, 2], []) and torch.equal(writer.kept(1)["moments"], moments_of(WITH)[4:8])
    write(later, shards=[1], finish=False)  # interrupted
    with pytest.raises(ValueError, match="is not a finished latent store"):
        LatentStore(later)
    assert LatentStoreWriter(later, WITH).pending()[0] == [0, 2]
    write(later, replace(WITH, features={"maps": MAPS, "whole": WHOLE}))
    assert files(later) == at_once and torch.equal(LatentStore(later).get_many(range(11))["moments"], before)
    # One kind after the other, too; and what is asked for without them, or with those of another network, is refused.
    write(tmp_path / "third", replace(WITH, features={"maps": MAPS}))
    assert files(write(tmp_path / "third")) == at_once
    with pytest.raises(ValueError, match=r"other settings: features.maps.dtype \(shard: float16, now: None\)"):
        LatentStoreWriter(later, replace(WITH, features={"whole": WHOLE})).pending()
    other = replace(MAPS, identity={"teacher": "another"})
    with pytest.raises(ValueError, match=r"other settings: features.maps.identity \(shard: {'teacher': 'a'}"):
        LatentStoreWriter(later, replace(WITH, features={"maps": other, "whole": WHOLE})).pending()


def test_what_is_damaged_is_not_kept(tmp_path, caplog):
    shard = write(tmp_path, SETTINGS) / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-200] ^= 1  # within the tensors
    shard.write_bytes(content)
    writer = LatentStoreWriter(tmp_path, WITH)
    assert writer.kept(1) == {} and "Encoding the shard" in caplog.text and writer.kept(0)
    shutil.rmtree(tmp_path)
    assert writer.kept(0) == {}


def test_wrong_features_are_refused(tmp_path):
    writer, given = LatentStoreWriter(tmp_path, WITH), features_of()
    rows = {"labels": labels_of(WITH)[:4]}
    first = {name: values[:4] for name, values in given.items()}
    for features, message in (
        ({}, r"Shard 0 must hold features.maps \(4, 2, 5, 2, 2\) of float16; got none"),
        (first | {"features.maps": first["features.maps"].float()}, r"float16; got \(4, 2, 5, 2, 2\) of float32"),
        (first | {"features.x": first["features.maps"]}, "must hold features.x never"),
        (
            first | {"features.maps": first["features.maps"] / 0},
            "network of features.maps gave values in shard 0 that",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            writer.write_shard(0, moments_of(WITH)[:4], features=features, **rows)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="got 'int8'"):
        FeatureSettings((3, 2, 2), "int8")


@pytest.fixture
def teacher_directory(tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, patch_size=4, image_size=8
    )
    Dinov2Model(config).save_pretrained(tmp_path / "dino")
    return tmp_path / "dino"


@torch.no_grad()
def test_the_encoders_features_are_averages_over_the_cells(tiny_autoencoder_kl):
    network = EncoderFeatures(tiny_autoencoder_kl, (2, 2), dtype="float16")
    pixels = torch.rand(3, 3, 16, 16) * 2 - 1
    with encoder_features(tiny_autoencoder_kl) as seen:
        encode(tiny_autoencoder_kl, pixels)
    expected = seen[0].double().reshape(3, 16, 2, 2, 2, 2).mean((3, 5))
    given = network(pixels, seen)["features.vae_encoder"]
    torch.testing.assert_close(given.double(), expected, atol=1e-6, rtol=1e-5)
    assert network.features["vae_encoder"].shape == (16, 2, 2) and not list(network.parameters())
    before = network.features["vae_encoder"].identity
    tiny_autoencoder_kl.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
    assert EncoderFeatures(tiny_autoencoder_kl, (2, 2), dtype="float16").features["vae_encoder"].identity != before


def test_a_vision_models_features_are_its_own_at_the_cells(teacher_directory):
    pixels = torch.rand(3, 3, 16, 16) * 2 - 1
    for before_norm in (False, True):
        network = TeacherFeatures(teacher_directory, (2, 2), dtype="float16", before_norm=before_norm)
        teacher = FeatureTeacher.from_pretrained(teacher_directory, image_size=8, final_norm=not before_norm)
        patch, cls = teacher(pixels)
        given = network(pixels, [])
        assert torch.equal(given.pop("features.dino"), patch)
        assert not before_norm or torch.equal(given.pop("features.dino.global"), cls)
        assert not given and network.features["dino"].identity["final_norm"] is not before_norm
        assert json.loads(json.dumps(network.features["dino"].to_json()))["shape"] == [12, 2, 2]
        assert str(teacher_directory.parent) not in json.dumps(network.features["dino"].to_json())
    assert feature_name("facebook/dinov2-base") == "dinov2-base"


def test_what_cannot_be_stored_is_refused(tiny_autoencoder_kl, teacher_directory):
    with pytest.raises(ValueError, match="the grid must divide the 4 latent positions of a side; got 3"):
        feature_networks(["vae_encoder"], tiny_autoencoder_kl, resolution=16, grid=3)
    with pytest.raises(ValueError, match="dino is given twice"):
        feature_networks([str(teacher_directory), "someone/dino"], tiny_autoencoder_kl, resolution=16)
    (network,) = feature_networks([str(teacher_directory)], tiny_autoencoder_kl, resolution=16, grid=3)
    assert network.features["dino"].shape == (12, 3, 3) and network.teacher.image_size == 12
