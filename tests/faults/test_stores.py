"""What a latent store holds is what was written, of the images that are there now; all else is refused by name."""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from diffusers_eqvae.data.latent_store import LatentStore
from diffusers_eqvae.data.latent_writer import LatentStoreWriter
from diffusers_eqvae.data.order import DrawDataset, DrawSampler, collate_draws
from tests.invariants.tiny_latents import write_store
from tests.scripts.test_train_transformer import flags
from tests.scripts.test_train_transformer import script as trainer  # noqa: F401

SHARD = "shard-00001.safetensors"


def tensor_bytes(path: Path, name: str) -> tuple[int, int]:
    """Where a tensor lies in a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    begin, end = json.loads(content[8 : 8 + length])[name]["data_offsets"]
    return 8 + length + begin, 8 + length + end


def overwrite(path: Path, place: int, new: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[place : place + len(new)] = new
    path.write_bytes(content)


def one_bit_of_moments(shard: Path) -> None:
    _, end = tensor_bytes(shard, "moments")
    overwrite(shard, end - 2, bytes([shard.read_bytes()[end - 2] ^ 1]))


def a_nan(shard: Path) -> None:
    overwrite(shard, tensor_bytes(shard, "moments")[0], np.float32(np.nan).tobytes() * 8)


def zeros(shard: Path) -> None:
    begin, end = tensor_bytes(shard, "moments")
    overwrite(shard, begin, bytes(end - begin))


def swapped_labels(shard: Path) -> None:
    begin, _ = tensor_bytes(shard, "labels")
    overwrite(shard, begin, np.array([1, 0], dtype="<i8").tobytes())


def other_labels(shard: Path) -> None:
    begin, end = tensor_bytes(shard, "labels")
    overwrite(shard, begin, bytes(end - begin))


def label_beyond(shard: Path) -> None:
    overwrite(shard, tensor_bytes(shard, "labels")[0], np.array([2**60], dtype="<i8").tobytes())


def negative_label(shard: Path) -> None:
    overwrite(shard, tensor_bytes(shard, "labels")[0], np.array([-1], dtype="<i8").tobytes())


def a_checksum(shard: Path) -> None:
    overwrite(shard, tensor_bytes(shard, "crc32")[0], b"\1\2\3")


def rows_of_another_shard(shard: Path) -> None:
    begin, end = tensor_bytes(shard, "moments")
    overwrite(shard, begin, shard.with_name("shard-00000.safetensors").read_bytes()[begin:end])


CONTENT = [one_bit_of_moments, a_nan, zeros, swapped_labels, other_labels, label_beyond, negative_label]
CONTENT += [a_checksum, rows_of_another_shard]


@pytest.fixture
def store(tmp_path, tiny_autoencoder_kl) -> Path:
    return write_store(tmp_path / "store", tiny_autoencoder_kl)


@pytest.mark.parametrize("damage", CONTENT, ids=lambda each: each.__name__)
def test_damage_inside_a_shard_is_found_where_it_is_read(store, damage):
    damage(store / SHARD)
    with pytest.raises(ValueError, match=r"is damaged.*(delete it and encode|verify the store)"):
        opened = LatentStore(store)
        for view in range(2):
            opened.get_many(range(len(opened)), view=view)
    with pytest.raises(ValueError, match=rf"{SHARD} is damaged: .* only this shard is written anew"):
        LatentStore(store).verify()


def test_a_worker_says_it_in_one_sentence(store):
    zeros(store / SHARD)
    draws = DrawDataset(LatentStore(store), seed=0)
    sampler = DrawSampler(len(draws.dataset), 8, seed=0)
    loader = DataLoader(draws, batch_sampler=sampler, collate_fn=collate_draws, num_workers=1)
    with pytest.raises(ValueError, match=rf"^The shard .*{SHARD} is damaged: example \d+ is not") as error:
        for _, _ in zip(range(6), loader, strict=False):
            pass
    assert "\n" not in str(error.value)


def test_training_stops_at_damage(store, tmp_path, trainer):  # noqa: F811
    a_nan(store / SHARD)
    with pytest.raises(ValueError, match=rf"{SHARD} is damaged"):
        trainer.main(flags(tmp_path, latents_dir=store, max_train_steps=20, validation_steps=0))


def change_header(shard: Path, change) -> None:
    content = shard.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    notes = json.loads(header["__metadata__"]["latent_store"])
    change(header, notes)
    header["__metadata__"]["latent_store"] = json.dumps(notes)
    text = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


HEADERS = {
    "offsets outside": lambda header, _: header["moments"].update(
        data_offsets=[-64, header["moments"]["data_offsets"][1]]
    ),
    "offsets too near": lambda header, _: header["labels"].update(data_offsets=[0, 8]),
    "no checksums": lambda header, _: header.pop("crc32"),
    "statistics": lambda _, notes: notes["statistics"].update(mean=[1.0] * 4),
    "statistics that are not finite": lambda _, notes: notes["statistics"].update(mean=[float("nan")] * 4),
    "names of replaced images": lambda _, notes: notes.update(skipped=["other.png"]),
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_a_changed_header_is_refused_when_the_store_is_opened(store, change):
    change_header(store / SHARD, change)
    with pytest.raises(ValueError, match=rf"{SHARD}.*(delete it|only this shard)"):
        LatentStore(store)


@pytest.mark.parametrize(
    "key", ["statistics", "class_counts", "id2label", "autoencoder", "settings", "skipped", "report", "shards"]
)
def test_a_changed_manifest_is_refused(store, key):
    manifest = json.loads((store / "manifest.json").read_text())
    manifest[key] = {"0": 1}
    (store / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest\.json has been changed .* run the encoding again"):
        LatentStore(store)


@pytest.mark.parametrize("version", [1, 2])
def test_older_stores_are_refused_with_the_remedy(store, version):
    manifest = json.loads((store / "manifest.json").read_text()) | {"format_version": version}
    (store / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"format_version {version}, older than 3, .*encode the data again"):
        LatentStore(store)


def npy_files(root: Path) -> None:
    (root / "imagenet256_features").mkdir(parents=True)
    np.save(root / "imagenet256_features" / "0.npy", np.zeros((1, 4, 4, 4), np.float32))


def lightning_files(root: Path) -> None:
    root.mkdir()
    latents = torch.zeros(2, 4, 4, 4)
    tensors = {"latents": latents, "latents_flip": latents.clone(), "labels": torch.zeros(2, dtype=torch.int64)}
    save_file(tensors, root / "latents_rank00_shard000.safetensors")


@pytest.mark.parametrize(
    ("make", "words"),
    [(npy_files, r"one \.npy file per image"), (lightning_files, "latents, latents_flip and labels")],
)
def test_latents_of_other_programs_are_recognised(tmp_path, make, words):
    make(tmp_path / "foreign")
    with pytest.raises(ValueError, match=rf"holds {words}.*not a latent store.*a directory of its own"):
        LatentStore(tmp_path / "foreign")


def test_a_shard_that_was_replaced_by_a_valid_one_is_noticed(store, tmp_path):
    settings = LatentStore(store).settings
    tensors = load_file(store / SHARD)
    writer = LatentStoreWriter(store, settings)
    writer.write_shard(1, tensors["moments"] + 1, labels=tensors["labels"])
    with pytest.raises(ValueError, match=rf"{SHARD} is damaged: its header is not the one that the manifest knows"):
        LatentStore(store)


@pytest.fixture
def script(repository):
    specification = importlib.util.spec_from_file_location("encode_latents", repository / "training/encode_latents.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules["encode_latents"] = module
    specification.loader.exec_module(module)
    yield module
    del sys.modules["encode_latents"]
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def images(tmp_path, tiny_autoencoder_kl) -> Path:
    tiny_autoencoder_kl.save_pretrained(tmp_path / "vae")
    for k in range(6):
        values = np.random.default_rng(k).integers(0, 255, (16, 16, 3), np.uint8)
        path = tmp_path / "images" / "ab"[k % 2] / f"{k}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(path)
    return tmp_path / "images"


def encode(script, images: Path, *words: str) -> LatentStore:
    output, vae = images.with_name("encoded"), images.with_name("vae")
    options = {"vae": vae, "output_dir": output, "train_data_dir": images, "resolution": 16, "shard_size": 3}
    script.main([str(word) for name, value in options.items() for word in (f"--{name}", value)] + list(words))
    return LatentStore(output, vae=AutoencoderKL.from_pretrained(output / "vae"))


def test_a_finished_store_of_images_that_have_changed_is_refused(script, images):
    encode(script, images)
    Image.new("RGB", (16, 16)).save(images / "a" / "2.bmp")
    with pytest.raises(ValueError, match=r"other settings: source\.sampled"):
        encode(script, images)


def test_the_manifest_says_what_became_of_the_images(script, images):
    Image.new("RGB", (8, 12)).save(images / "a" / "small.bmp")
    (images / "a" / "x.heic").write_bytes(b"ftypheic")
    report = encode(script, images).manifest["report"]
    assert report["small"]["count"] == 1 and report["small"]["examples"] == ["a/small.bmp"]
    assert report["ending"]["count"] == 1


def test_verify_reads_every_byte_of_store_and_images(script, images, monkeypatch):
    store = encode(script, images, "--verify")
    assert store.manifest["content"] and (store.path / "verify.png").is_file()
    monkeypatch.setattr("diffusers_eqvae.data.image_datasets.SAMPLED_IMAGES", 2)  # the first and the last
    monkeypatch.setattr("diffusers_eqvae.data.latent_format._flat", lambda settings: {})  # as if no sample had seen it
    Image.new("RGB", (16, 16)).save(images / "a" / "2.bmp")
    with pytest.raises(ValueError, match=r"not the data of the store .*: the content of images differ"):
        encode(script, images, "--verify")
    manifest = json.loads((store.path / "manifest.json").read_text())
    (store.path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"Row \d of .* is not what a/2\.bmp encodes to now"):
        encode(script, images, "--verify")
    assert manifest["content"] != LatentStore(store.path).manifest["content"]
