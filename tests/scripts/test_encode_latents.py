"""training/encode_latents.py through its real command line, with one and three processes, killed and resumed."""

from __future__ import annotations

import json
import logging
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoModel
from PIL import Image

from diffusers_eqvae.autoencoders import encode
from diffusers_eqvae.data.latent_store import LatentStore
from diffusers_eqvae.images import adm_center_crop, to_pixels
from diffusers_eqvae.latents import LatentNormalization
from diffusers_eqvae.models.alignment_network import AlignmentNetwork

PER_CLASS, CLASSES = 7, ("cat", "dog")
FLAGS = ["--resolution", "16", "--batch_size", "3", "--shard_size", "5", "--dtype", "fp32", "--flip"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pets")
    for number, name in enumerate(CLASSES):
        (root / name).mkdir()
        for index in range(PER_CLASS):
            levels = np.random.default_rng(100 * number + index).integers(0, 256, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(levels).save(root / name / f"{index}.png")
    return root


@pytest.fixture
def vae(tmp_path: Path, tiny_autoencoder_kl) -> Path:
    tiny_autoencoder_kl.save_pretrained(tmp_path / "kl")
    return tmp_path / "kl"


def command(repository: Path, vae: Path, images: Path, output: Path, *more: str, processes: int = 1) -> list[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    arguments = ["--vae", str(vae), "--train_data_dir", str(images), "--output_dir", str(output), *FLAGS, *more]
    return [*launcher, str(repository / "training" / "encode_latents.py"), *arguments]


def run_elsewhere(*arguments, **kwargs) -> str:
    done = subprocess.run(command(*arguments, **kwargs), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(*arguments) -> None:
    """The same command line in this process, which spares the start of a new one."""
    script, *argv = command(*arguments)[1:]
    main = runpy.run_path(script, run_name="encode_latents")["main"]
    main(argv)


def content(store: Path) -> dict[str, bytes]:
    files = [*store.glob("*.safetensors"), *store.glob("*.json"), *store.glob("vae/*")]
    return {str(path.relative_to(store)): path.read_bytes() for path in files}


def crop(images: Path, index: int) -> torch.Tensor:
    name, number = CLASSES[index // PER_CLASS], index % PER_CLASS
    with Image.open(images / name / f"{number}.png") as image:
        return to_pixels(adm_center_crop(image, 16))


def test_the_stores_copy_of_an_aligned_autoencoder_has_its_network(repository, images, vae, tmp_path):
    network = AlignmentNetwork(latent_channels=4, hidden_size=8, feature_size=6)
    network.save_pretrained(vae / "alignment_network")
    run(repository, vae, images, tmp_path / "store")
    copied = AlignmentNetwork.from_pretrained(tmp_path / "store" / "vae", subfolder="alignment_network")
    assert all(map(torch.equal, copied.state_dict().values(), network.state_dict().values()))


def test_store_holds_the_posteriors_of_both_views(repository, vae, images, tmp_path) -> None:
    run(repository, vae, images, tmp_path / "store", "--verify")
    normalised = AutoModel.from_pretrained(str(tmp_path / "store" / "vae"))
    store = LatentStore(tmp_path / "store", vae=normalised)
    assert len(store) == 14 and store.settings.num_shards == 3 and store.settings.views == 2
    assert store.labels.tolist() == [0] * PER_CLASS + [1] * PER_CLASS
    assert store.id2label == {0: "cat", 1: "dog"} and store.manifest["class_counts"] == {"0": 7, "1": 7}
    pixels = torch.stack([crop(images, index) for index in range(14)])
    for view, seen in enumerate((pixels, pixels.flip(-1))):
        with torch.no_grad():
            expected = encode(normalised, seen).moments
        torch.testing.assert_close(store.get_many(range(14), view=view)["moments"], expected, rtol=1e-4, atol=1e-5)

    moments = torch.cat([store.get_many(range(14), view=view)["moments"] for view in (0, 1)]).double()
    mean, logvar = moments.chunk(2, dim=1)
    std = (mean.var((0, 2, 3), correction=0) + logvar.exp().mean((0, 2, 3))).sqrt()
    written = json.loads((tmp_path / "store" / "mean_std.json").read_text())
    assert written["latents_mean"] == pytest.approx(mean.mean((0, 2, 3)).tolist(), rel=1e-9)
    assert written["latents_std"] == pytest.approx(std.tolist(), rel=1e-9) and written["num_samples"] == 14
    assert store.manifest["statistics"]["num_samples"] == 14 * 2  # posteriors, of both views
    assert normalised.config.scaling_factor == 1.0 and normalised.config.latents_std == written["latents_std"]
    with Image.open(tmp_path / "store" / "verify.png") as verification:
        assert verification.size[0] == 3 * 16 + 2 * 4

    with pytest.raises(ValueError, match="latent normalisation"):
        LatentStore(tmp_path / "store", vae=AutoModel.from_pretrained(str(vae)))


def test_three_processes_write_the_same_bytes(repository, vae, images, tmp_path) -> None:
    torch.set_num_threads(2)  # torchrun gives its processes one thread each, plain python all cores
    run(repository, vae, images, tmp_path / "one")
    assert torch.get_num_threads() == 1
    printed = run_elsewhere(repository, vae, images, tmp_path / "three", processes=3)
    assert printed.count("14 images") == 1  # only the first of three ranks speaks: they know of each other
    assert content(tmp_path / "three") == content(tmp_path / "one") and len(content(tmp_path / "one")) == 8


def test_a_killed_run_continues_to_the_same_bytes(repository, vae, images, tmp_path, caplog) -> None:
    run(repository, vae, images, tmp_path / "one")
    expected, killed = content(tmp_path / "one"), tmp_path / "killed"
    process = subprocess.Popen(
        command(repository, vae, images, killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (killed / "shard-00000.safetensors").exists() and process.poll() is None:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # Whatever the moment of the kill, a later shard is now missing and a half-written one lies about.
    (killed / "manifest.json").unlink(missing_ok=True)
    (killed / "shard-00002.safetensors").unlink(missing_ok=True)
    (killed / ".0123456789abcdef.tmp").write_bytes(b"half")
    before = (killed / "shard-00000.safetensors").stat().st_mtime_ns
    run(repository, vae, images, killed)
    assert (killed / "shard-00000.safetensors").stat().st_mtime_ns == before
    assert content(killed) == expected and not list(killed.glob("*.tmp"))

    shard = killed / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])
    with caplog.at_level(logging.WARNING):
        run(repository, vae, images, killed)
    assert "shard-00001.safetensors is truncated" in caplog.text and content(killed) == expected

    with pytest.raises(ValueError, match=r"other settings: dtype \(shard: float32, now: bfloat16\)"):
        run(repository, vae, images, killed, "--dtype", "bf16")
    assert content(killed) == expected


@pytest.mark.parametrize("normalization", ["scalar", "config"])
def test_deterministic_autoencoder_and_other_normalisations(
    repository, tiny_autoencoder_tiny, images, tmp_path, normalization
) -> None:
    tiny_autoencoder_tiny.save_pretrained(tmp_path / "tiny")
    # One shard larger than the data, in half precision, without flips.
    more = ["--shard_size", "100", "--dtype", "bf16", "--flip", "false", "--normalization", normalization]
    run(repository, tmp_path / "tiny", images, tmp_path / "store", *more, "--mixed_precision", "bf16")
    saved = AutoModel.from_pretrained(str(tmp_path / "store" / "vae"))
    store = LatentStore(tmp_path / "store", vae=saved)
    assert store.settings.kind == "latents" and store.latent_shape == (4, 4, 4) and len(store) == 14
    assert store.get_many([13])["moments"].dtype == torch.bfloat16
    normalization_saved = LatentNormalization.from_vae(saved)
    if normalization == "config":
        assert normalization_saved == LatentNormalization.from_vae(tiny_autoencoder_tiny)
    else:
        measured = store.statistics()  # what the pipelines of SD3 and FLUX read
        scaling, shift = 1 / measured.scalar_std, measured.scalar_mean
        assert normalization_saved == LatentNormalization(scaling_factor=scaling, shift_factor=shift)


def test_bad_input_ends_before_anything_is_written(repository, vae, images, tmp_path, capsys) -> None:
    for flags, message in (
        (["--resolution", "18"], "resolution must be a multiple of the autoencoder's stride 4; got 18"),
        (["--label_column", "clas"], "no label column 'clas'; the columns are image, label"),
        (["--image_column", "jpg"], "no image column 'jpg'; the columns are image, label"),
        (["--output_dir", str(vae / "config.json")], "cannot be written"),
    ):
        with pytest.raises(ValueError, match=message):
            run(repository, vae, images, tmp_path / "store", *flags)
    run(repository, vae, images, tmp_path / "store", "--dry_run")
    printed = capsys.readouterr().out
    assert "14 images, 3 shard(s)" in printed and "free at" in printed and "No labels" not in printed
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("file", ["config.json", "model_index.json", "run_metadata.json"])
def test_the_directory_of_a_model_is_left_as_it_is(repository, vae, images, tmp_path, file) -> None:
    finished = tmp_path / "finished"
    finished.mkdir()
    for name in (file, "mean_std.json"):
        (finished / name).write_text("{}")
    for more in ([], ["--dry_run"]):
        with pytest.raises(ValueError, match=rf"finished holds .*{file}.*choose a new or an empty"):
            run(repository, vae, images, finished, *more)
    assert {path.name: path.read_text() for path in finished.iterdir()} == {file: "{}", "mean_std.json": "{}"}


def test_the_end_says_where_the_store_is_and_what_it_is_good_for(repository, vae, images, tmp_path, capsys) -> None:
    unlabelled, place = images / "cat", f"The store is complete: {tmp_path / 'store'}\n"
    run(repository, vae, unlabelled, tmp_path / "store", "--dry_run")
    said = capsys.readouterr()
    assert "No labels: the store is good for statistics, not for train_transformer.py." in said.out
    run(repository, vae, unlabelled, tmp_path / "store")
    said = capsys.readouterr()
    assert "No labels" in said.out and "still to write" in said.out and said.out.endswith(place)
    run(repository, vae, unlabelled, tmp_path / "store")
    said = capsys.readouterr()
    assert "7 images, 2 shard(s)" in said.out and "all encoded before" in said.out and said.out.endswith(place)
    assert "img" not in said.err


def test_images_that_changed_since_a_shard_was_written_are_noticed(repository, vae, images, tmp_path) -> None:
    changed = tmp_path / "elsewhere" / images.name
    shutil.copytree(images, changed)
    run(repository, vae, images, tmp_path / "store")
    run(repository, vae, changed, tmp_path / "store")  # the same images in another place
    first = changed / "cat" / "0.png"
    first.rename(first.with_stem("00"))
    with pytest.raises(ValueError, match=r"other settings: source.files"):
        run(repository, vae, changed, tmp_path / "store")


def test_unreadable_images_are_replaced_counted_and_named(repository, vae, images, tmp_path, caplog) -> None:
    """Each by the image after it, with that one's label; the last one by the first."""
    broken = tmp_path / "broken"
    shutil.copytree(images, broken)
    for name in ("cat/6.png", "dog/6.png"):
        (broken / name).write_bytes((broken / name).read_bytes()[:200])  # the header is whole, the pixels are not
    with caplog.at_level(logging.WARNING):
        run(repository, vae, broken, tmp_path / "store")
    store = LatentStore(tmp_path / "store", vae=AutoModel.from_pretrained(str(tmp_path / "store" / "vae")))
    assert store.manifest["skipped"] == ["cat/6.png", "dog/6.png"]
    assert "Skipped image cat/6.png (1 so far)" in caplog.text
    assert "Skipped image dog/6.png (2 so far)" in caplog.text
    assert "2 unreadable images were replaced" in caplog.text
    assert store.labels.tolist() == [0] * 6 + [1] * 7 + [0] and len(store) == 14
    moments = store.get_many(range(14))["moments"]
    for replaced, used in ((6, 7), (13, 0)):
        torch.testing.assert_close(moments[replaced], moments[used], rtol=1e-5, atol=1e-6)


def test_disk_without_room_is_refused(repository, vae, images, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match="disk is too small"):
        run(repository, vae, images, tmp_path / "store")
    assert not list(tmp_path.glob("store/*"))
