"""training/evaluate_autoencoder.py: exactly N pictures, noise of their own, the same figures from any batches."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_eqvae.data.images import adm_center_crop, to_pixels
from diffusers_eqvae.metrics.autoencoder import measure_autoencoder

COUNT = 13


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(COUNT):
        levels = np.random.default_rng(index).integers(0, 256, (36, 48, 3), dtype=np.uint8)
        Image.fromarray(levels).save(folder / f"{index:02d}.png")
    return folder


@pytest.fixture
def vae(tmp_path, tiny_autoencoder_kl) -> Path:
    tiny_autoencoder_kl.save_pretrained(tmp_path / "kl")
    return tmp_path / "kl"


def script(repository: Path) -> Path:
    return repository / "training" / "evaluate_autoencoder.py"


def run(repository: Path, vae: Path, pictures: Path, output: Path, *more: str) -> dict:
    flags = ["--vae", str(vae), "--train_data_dir", str(pictures), "--output", str(output), "--resolution", "32"]
    runpy.run_path(str(script(repository)))["main"]([*flags, *more])
    return json.loads(output.read_text())


def test_figures_are_those_of_the_library(repository, vae, pictures, tmp_path, tiny_autoencoder_kl):
    content = run(repository, vae, pictures, tmp_path / "deep" / "all.json", "--batch_size", "5")
    images = [Image.open(path).convert("RGB") for path in sorted(pictures.iterdir())]
    pixels = torch.stack([to_pixels(adm_center_crop(image, 32)) for image in images])
    expected = measure_autoencoder(tiny_autoencoder_kl, [pixels])
    measured = content["figures"]
    assert measured["num_images"] == COUNT and set(measured) == set(expected)
    for name, value in expected.items():
        if isinstance(value, float):
            assert measured[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert content["posterior"] == "mean" and content["lpips"] is None and content["data"] == "pictures"


def test_samples_depend_on_the_seed_and_not_on_the_batch(repository, vae, pictures, tmp_path):
    def psnr(*more: str) -> float:
        content = run(repository, vae, pictures, tmp_path / "x.json", "--sample_posterior", "--num_images", "7", *more)
        assert content["figures"]["num_images"] == 7 and content["posterior"].startswith("sample")
        return content["figures"]["psnr"]

    reference = psnr("--batch_size", "7")
    assert psnr("--batch_size", "2") == pytest.approx(reference, abs=1e-5)
    assert abs(psnr("--seed", "1") - reference) > 1e-5


def test_what_cannot_be_measured_is_refused(repository, vae, pictures, tmp_path):
    for more, message in (
        (["--num_images", "14"], r"1\.\.13"),
        (["--resolution", "30"], "multiple of the stride 4"),
    ):
        with pytest.raises(ValueError, match=message):
            run(repository, vae, pictures, tmp_path / "x.json", *more)
    broken = sorted(pictures.iterdir())[4]
    broken.write_bytes(broken.read_bytes()[:900])
    with pytest.raises(ValueError, match=f"{broken.name} cannot be read"):
        run(repository, vae, pictures, tmp_path / "x.json")


def test_two_processes_measure_what_one_does(repository, vae, pictures, tmp_path):
    one = run(repository, vae, pictures, tmp_path / "one.json", "--batch_size", "1", "--sample_posterior")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = ["--vae", str(vae), "--train_data_dir", str(pictures), "--output", str(tmp_path / "two.json")]
    command = [*launcher, str(script(repository)), *flags, "--resolution", "32", "--batch_size", "1"]
    done = subprocess.run(
        [*command, "--sample_posterior"], capture_output=True, text=True, timeout=500, env=os.environ.copy()
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two.json").read_text())["figures"] == one["figures"]
