"""Kill -9 at any moment, a full disk, two programs in one directory: nothing is lost, and the end is the same."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusers_eqvae.directories import LOCK
from diffusers_eqvae.pipelines.pipeline_class_conditional import ClassConditionalPipeline
from diffusers_eqvae.schedulers.scheduling_flow_match_ode import FlowMatchODEScheduler

from ..invariants import test_transformer_trajectories as transformer
from ..invariants.trajectories import ROOT, as_flags, assert_equal, last_checkpoint

pytestmark = pytest.mark.slow

store = transformer.store
LATEST = {"resume_from_checkpoint": "latest"}
RUN = {"report_to": "none", "validation_steps": 0, "checkpointing_steps": 2, "logging_steps": 1, "max_train_steps": 20}
MODEL = """{"block_out_channels": [8, 16], "norm_num_groups": 4, "latent_channels": 4, "sample_size": 16,
"down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
"up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"]}"""


@pytest.fixture
def commands(tmp_path, store, tiny_sit, tiny_autoencoder_kl):
    """name -> (script, flags without output_dir, what may be added when it is started again)."""
    rng = np.random.default_rng(0)
    for number in range(24):
        path = tmp_path / "images" / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    (tmp_path / "model.json").write_text(MODEL)
    ClassConditionalPipeline(tiny_sit, tiny_autoencoder_kl, FlowMatchODEScheduler()).save_pretrained(tmp_path / "pipe")
    images = {"train_data_dir": tmp_path / "images", "resolution": 32}
    autoencoder = {**images, **RUN, "model_config": tmp_path / "model.json", "perceptual_weight": 0, "disc_weight": 0}
    autoencoder |= {"num_validation_images": 2, "num_normalization_images": 4, "train_batch_size": 2}
    generator = {"latents_dir": store, "model": tmp_path / "tiny.json", **RUN, "train_batch_size": 4}
    encode = {**images, "vae": store / "vae", "shard_size": 4, "batch_size": 2, "dtype": "fp32"}
    sample = {"model": tmp_path / "pipe", "num_samples": 24, "batch_size": 2, "num_inference_steps": 10}
    return {
        "train_transformer": ("training/train_transformer.py", generator, LATEST),
        "train_autoencoder": ("training/train_autoencoder.py", autoencoder, LATEST),
        "encode_latents": ("training/encode_latents.py", encode, {}),
        "sample": ("pipelines/sample.py", sample, {}),
    }


def start(command, output_dir, *, again=False, **options):
    script, flags, more = command
    words = as_flags({**flags, "output_dir": output_dir, **(more if again else {})})
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, ROOT / script, *words], **{**quiet, **options})


def finish(process):
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said[-3000:]


def result(name: str, directory: Path) -> dict:
    """What a program leaves, as far as it does not hold times."""
    assert not (directory / LOCK).exists() and not list(directory.rglob("*.tmp"))
    if name.startswith("train"):
        weights = {
            str(path.relative_to(directory)): path.read_bytes()
            for path in sorted(directory.rglob("*.safetensors"))
            if "checkpoints" not in path.parts
        }
        return {"state": last_checkpoint(directory, "objective"), **weights}
    patterns = ("*.npz", "*.png") if name == "sample" else ("shard-*", "manifest.json", "mean_std.json")
    return {path.name: path.read_bytes() for pattern in patterns for path in sorted(directory.glob(pattern))}


@pytest.mark.parametrize("name", ["train_transformer", "train_autoencoder", "encode_latents", "sample"])
def test_killed_at_random_moments_and_continued_the_result_is_the_same(commands, tmp_path, name):
    began = time.monotonic()
    finish(start(commands[name], tmp_path / "whole"))
    seconds, whole = time.monotonic() - began, result(name, tmp_path / "whole")
    moments = random.Random(name)
    for number in range(5):
        killed = tmp_path / f"killed{number}"
        process = start(commands[name], killed)
        time.sleep(seconds * moments.uniform(0.4, 1.0))  # most of the first part are imports
        process.kill()
        process.communicate()
        finish(start(commands[name], killed, again=True))
        assert_equal(whole, result(name, killed))


@pytest.mark.parametrize("name", ["train_transformer", "encode_latents", "sample"])
def test_a_full_disk_is_said_and_what_was_whole_is_still_used(commands, tmp_path, name):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))  # noqa: E731
    process = start(commands[name], tmp_path / "full", preexec_fn=limit)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 2 and "Traceback" not in said, said[-3000:]
    assert "could not be written: File too large" in said and "Make room" in said
    finish(start(commands[name], tmp_path / "full", again=True))
    finish(start(commands[name], tmp_path / "whole"))
    assert_equal(result(name, tmp_path / "full"), result(name, tmp_path / "whole"))


@pytest.mark.parametrize("name", ["train_transformer", "encode_latents", "sample"])
def test_the_second_of_two_programs_in_one_directory_is_refused(commands, tmp_path, name):
    both = [start(commands[name], tmp_path / "both") for _ in range(2)]
    ends = [(*process.communicate(timeout=600), process.returncode) for process in both]
    statuses = sorted(status for *_, status in ends)
    assert statuses in ([0, 2], [0, 0]), ends  # the slower one may find the other's work finished
    if statuses == [0, 2]:
        (said,) = [said for said, _, status in ends if status]
        assert "is being written to by process" in said or "already holds" in said or "meanwhile" in said
    finish(start(commands[name], tmp_path / "alone"))
    assert_equal(result(name, tmp_path / "both"), result(name, tmp_path / "alone"))


def test_a_lock_of_a_machine_that_is_gone_is_broken_on_request(commands, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).write_text('{"pid": 1, "host": "elsewhere", "since": "yesterday", "boot_id": "another"}')
    process = start(commands["sample"], tmp_path / "run")
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 2 and "process 1 on elsewhere" in said and "--break_lock" in said
    script, flags, _ = commands["sample"]
    finish(start((script, {**flags, "break_lock": "true"}, {}), tmp_path / "run"))
    assert os.listdir(tmp_path / "run")
