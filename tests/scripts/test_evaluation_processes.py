"""Both evaluation scripts on one, two and three processes: not one bit of a figure moves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from diffusers_eqvae.metrics.cifar_resnet import CifarResNet

COUNT = 40
BATCH_SIZES = (7, 32)


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    from diffusers import AutoencoderTiny

    folder = tmp_path_factory.mktemp("material")
    torch.manual_seed(0)
    state = {key.removeprefix("features."): value for key, value in CifarResNet(1).state_dict().items()}
    torch.save(state, folder / "resnet.pth")
    blocks = {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
    widths = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    AutoencoderTiny(**blocks, **widths).save_pretrained(folder / "vae")
    (folder / "images").mkdir()
    arrays = np.random.default_rng(0).integers(0, 256, (COUNT, 32, 32, 3), dtype=np.uint8)
    for index, each in enumerate(arrays):
        Image.fromarray(each).save(folder / "images" / f"{index:02d}.png")
    np.savez(folder / "samples.npz", arrays[::-1] // 2)
    return folder


def plan(repository: Path, material: Path, output: Path) -> list[tuple[str, list[str]]]:
    output.mkdir(exist_ok=True)
    network = ["--feature_networks", f"cifar_resnet={material / 'resnet.pth'}"]
    runs = []
    for batch_size in BATCH_SIZES:
        ending = ["--batch_size", str(batch_size), "--output"]
        samples = ["--samples", str(material / "samples.npz"), "--reference", str(material / "images")]
        runs.append(("generation", [*samples, *network, *ending, str(output / f"generation-{batch_size}.json")]))
        vae = ["--vae", str(material / "vae"), "--data_dir", str(material / "images"), "--resolution", "32"]
        words = [*vae, *network, *ending, str(output / f"autoencoder-{batch_size}.json")]
        runs.append(("autoencoder", words))
    return [(str(repository / "training" / f"evaluate_{name}.py"), words) for name, words in runs]


def numbers(output: Path) -> dict[str, dict]:
    """Per card everything but where, when and by which files it was made."""
    cards = {path.stem: json.loads(path.read_text()) for path in sorted(output.iterdir())}
    assert len(cards) == 2 * len(BATCH_SIZES)
    return {
        name: {key: value for key, value in card.items() if key not in ("provenance", "settings")}
        for name, card in cards.items()
    }


def launch(repository: Path, steps: list, folder: Path, processes: int) -> None:
    (folder / "plan.json").write_text(json.dumps(steps))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    worker = repository / "tests" / "scripts" / "evaluation_worker.py"
    done = subprocess.run(
        [*launcher, str(worker), str(folder / "plan.json")],
        env={**os.environ, "ACCELERATE_USE_CPU": str(torch.accelerator.is_available()), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def alone(repository, material, tmp_path_factory) -> dict[str, dict]:
    import runpy

    output = tmp_path_factory.mktemp("alone") / "cards"
    for script, words in plan(repository, material, output):
        runpy.run_path(script)["main"](words)
    AcceleratorState._reset_state(reset_partial_state=True)
    return numbers(output)


@pytest.mark.parametrize("processes", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_the_number_of_processes_changes_no_bit(processes, alone, repository, material, tmp_path):
    """40 images in batches of 32 are two, so that the third process has nothing to do."""
    launch(repository, plan(repository, material, tmp_path / "cards"), tmp_path, processes)
    assert numbers(tmp_path / "cards") == alone


def test_the_batch_size_moves_last_digits_only(alone):
    """Kernels add in another order for another batch; a pixel on the border of two uint8 values may cross it."""
    for name in ("generation", "autoencoder"):
        one, other = (alone[f"{name}-{batch_size}"] for batch_size in BATCH_SIZES)
        assert one["metrics"] == pytest.approx(other["metrics"], rel=1e-4, abs=1e-6)
        assert one["protocol"] == other["protocol"]
