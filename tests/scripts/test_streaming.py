"""train_autoencoder.py --streaming: parquet files and http addresses, resumed exactly, without a copy."""

from __future__ import annotations

import functools
import http.server
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time

import datasets
import numpy as np
import pytest
from PIL import Image

from diffusers_eqvae.data import hf_datasets
from diffusers_eqvae.data.image_streams import load_image_stream
from diffusers_eqvae.options import options_of
from diffusers_eqvae.training_utils.arguments import DataArguments

from ..invariants.trajectories import ROOT, as_flags, assert_close, assert_equal, last_checkpoint, run_script, torchrun

SCRIPT = ROOT / "training" / "train_autoencoder.py"
MODEL = {
    "block_out_channels": [8],
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
}
COUNTS = (5, 2, 6)


def png(number: int) -> bytes:
    content = io.BytesIO()
    smooth = np.random.default_rng(number).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    Image.fromarray(smooth).resize((24, 24), Image.Resampling.BICUBIC).save(content, "PNG")
    return content.getvalue()


def write_shards(directory, counts=COUNTS, form="parquet") -> None:
    directory.mkdir(parents=True)
    for shard, count in enumerate(counts):
        images = [png(sum(counts[:shard]) + number) for number in range(count)]
        path = directory / f"{shard:02d}.{form}"
        if form == "tar":
            with tarfile.open(path, "w") as tar:
                for number, content in enumerate(images):
                    member = tarfile.TarInfo(f"{shard}_{number}.png")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
            continue
        rows = {"image": [{"bytes": each, "path": None} for each in images], "label": list(range(count))}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path, batch_size=2)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    root = tmp_path_factory.mktemp("streams")
    write_shards(root / "tables")
    write_shards(root / "tars", form="tar")
    (root / "model.json").write_text(json.dumps(MODEL))
    return root


def flags(material, output_dir, **options) -> list[str]:
    given = {
        "model_config": material / "model.json",
        "train_data_dir": material / "tables",
        "output_dir": output_dir,
        "cache_dir": output_dir.parent / "cache",
        "resolution": 16,
        "regularizers": "none",
        "perceptual_weight": 0,
        "disc_weight": 0,
        "reduction": "mean",
        "train_batch_size": 2,
        "shuffle_buffer_size": 4,
        "learning_rate": 1e-3,
        "max_train_steps": 9,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 20,
        "ema_decay": 0.9,
        "report_to": "none",
        "logging_steps": 1,
        "validation_steps": 0,
        "num_validation_images": 2,
        "num_normalization_images": 4,
    }
    return [*filter(None, as_flags({k: v for k, v in {**given, **options}.items() if v is not None})), "--streaming"]


def train(material, output_dir, **options) -> dict:
    run_script(SCRIPT, flags(material, output_dir, **options))
    return last_checkpoint(output_dir, "objective")


@pytest.fixture(scope="module")
def whole(material, tmp_path_factory):
    """A run of 18 draws of 13 images, in blocks of 4: where it wrote, and its last checkpoint."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    return directory, train(material, directory)


@pytest.mark.parametrize("stopped_at", [1, 2, 6, 7])
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, material, whole, stopped_at):
    """After 2 draws a block is half seen, after 4 it is over, and between 12 and 14 so is the epoch."""
    resumed = tmp_path / "resumed"
    shutil.copytree(whole[0], resumed)
    for step in range(stopped_at + 1, 10):
        shutil.rmtree(resumed / "checkpoints" / f"step-{step:08d}")
    marker = json.loads((resumed / "checkpoints" / f"step-{stopped_at:08d}" / "complete.json").read_text())
    draw = 2 * stopped_at
    assert draw - 4 <= marker["place"][4] < draw
    assert_equal(whole[1], train(material, resumed, resume_from_checkpoint="latest"))


def test_no_copy_is_written_and_the_metadata_say_which_stream_it_was(material, whole):
    cache = whole[0].parent / "cache"
    assert sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) == 0
    stream = json.loads((whole[0] / "run_metadata.json").read_text())["data"]["stream"]
    assert stream["shards"] == 3 and set(stream) == {"shards", "files", "sampled"}


def test_workers_change_nothing(tmp_path, material, whole):
    assert_equal(whole[1], train(material, tmp_path / "run", dataloader_num_workers=2))


def test_other_shards_are_not_what_the_run_goes_on_with(tmp_path, material, whole):
    write_shards(tmp_path / "tables", counts=(5, 2, 6, 1))
    resumed, sixth = tmp_path / "run", {"resume_from_checkpoint": "step-00000006"}
    options = {"train_data_dir": tmp_path / "tables", **sixth}
    shutil.copytree(whole[0], resumed)
    with pytest.raises(ValueError, match=r"stream is not the one when .*its shards differs.*--allow_changes stream"):
        train(material, resumed, **options)
    train(material, resumed, allow_changes="stream", **options)
    with pytest.raises(ValueError, match=r"shuffle_buffer_size was 4 when"):
        train(material, resumed, shuffle_buffer_size=5, **sixth)


def test_a_stream_that_breaks_off_leaves_a_checkpoint_to_go_on_from(tmp_path, material, whole, monkeypatch):
    opened, read = [], hf_datasets.open_stream

    def breaking(*arguments, **options):
        shards, rows = read(*arguments, **options)

        def once(shard, first):
            for row in rows(shard, first):
                opened.append(shard)
                if len(opened) == 20:
                    raise ConnectionError("Server Disconnected")
                yield row

        return shards, once

    monkeypatch.setattr(hf_datasets, "open_stream", breaking)
    with pytest.raises(
        ValueError, match=r"broke off in the shard \d\d\.parquet at about row \d \(Server Disconnected"
    ):
        train(material, tmp_path / "run", checkpointing_steps=100)
    (written,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert written.name not in ("step-00000000", "step-00000009")
    monkeypatch.undo()
    assert_equal(whole[1], train(material, tmp_path / "run", checkpointing_steps=100, resume_from_checkpoint="latest"))


def test_a_damaged_shard_is_named(tmp_path, material):
    shutil.copytree(material / "tables", tmp_path / "tables")
    path = tmp_path / "tables" / "02.parquet"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"broke off in the shard 02\.parquet .*A damaged shard: mend it first"):
        train(material, tmp_path / "run", train_data_dir=tmp_path / "tables")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_train_steps": None}, r"--streaming does not say how many images an epoch has; give --max_train_steps"),
        ({"train_data_dir": "tars"}, r"tars is read where it lies, .*without a copy.*Read it without streaming"),
        ({"image_column": "photo"}, r"There is no image column 'photo'; the columns are image, label"),
        ({"split": "test"}, r"There is no split 'test' in .*; it has train"),
        (
            {"aspect_buckets": 3},
            r"--aspect_buckets looks at all images first, which --streaming cannot; leave one out",
        ),
        ({"train_data_dir": None, "dataset_name": "http://localhost/x.zip"}, r"must end in \.tar or \.parquet"),
        ({"train_data_dir": None, "dataset_name": "http://localhost:9/{0..1}.tar"}, r"cannot be opened as a stream"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_what_a_stream_cannot_do_is_refused_at_the_start(tmp_path, material, options, message, monkeypatch):
    monkeypatch.setattr(datasets.config, "STREAMING_OPEN_MAX_RETRIES", 0)
    if options.get("train_data_dir"):
        options = {"train_data_dir": material / options["train_data_dir"]}
    with pytest.raises(ValueError, match=message):
        train(material, tmp_path / "run", **options)


@pytest.fixture
def address(material):
    """Of a server of the shards."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(material))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("form", "column"), [("tars/{00..02}.tar", "png"), ("tables/{00..02}.parquet", "image")])
def test_shards_on_a_server_are_those_on_the_disk(material, address, form, column, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False)
    stream = load_image_stream(f"{address}/{form}", image_column=column)
    found = [row.record["bytes"] for shard in range(3) for row in stream.read(shard)]
    assert found == [png(number) for number in range(13)]
    assert [row.record["bytes"] for row in stream.read(2, 4)] == found[11:]


def test_no_other_script_has_the_flag(capsys):
    given = ["--vae", "vae", "--train_data_dir", "tables", "--output_dir", "store", "--streaming"]
    with pytest.raises(SystemExit):
        run_script(ROOT / "training" / "encode_latents.py", given)
    assert "--streaming" in capsys.readouterr().err and "streaming" not in options_of(DataArguments)


@pytest.mark.slow
def test_two_ranks_are_one_with_twice_the_batch(tmp_path, material):
    one = train(material, tmp_path / "one", train_batch_size=4)
    finished = torchrun(SCRIPT, flags(material, tmp_path / "two"), processes=2)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert_close(one, last_checkpoint(tmp_path / "two", "objective"), tolerance=1e-5)


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path, material, whole):
    command = [sys.executable, str(SCRIPT), *flags(material, tmp_path / "run", dataloader_num_workers=2)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and not (tmp_path / "run" / "checkpoints" / "step-00000005").exists():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    resume = ["--resume_from_checkpoint", "latest"]
    subprocess.run([*command, *resume], check=True, stderr=subprocess.PIPE)
    assert_equal(whole[1], last_checkpoint(tmp_path / "run", "objective"))
