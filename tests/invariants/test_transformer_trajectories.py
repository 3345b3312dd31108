"""Trajectories of train_transformer.py, which interruption, processes, accumulation and validation must not change."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_eqvae.models.transformer_sit import SiTTransformer2DModel
from diffusers_eqvae.pipelines import ClassConditionalPipeline
from diffusers_eqvae.schedulers import FlowMatchODEScheduler
from diffusers_eqvae.training_utils.launch import STOPPED

from .tiny_latents import write_store
from .trajectories import assert_equal, last_checkpoint, run_script

SCRIPT = Path(__file__).resolve().parents[2] / "training" / "train_transformer.py"
TINY = {"patch_size": 2, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
CLASS = "SiTTransformer2DModel"
MODELS = {
    "tiny": {"_class_name": CLASS, **TINY},
    "diffusion": {
        "_class_name": CLASS,
        **TINY,
        "objective": "denoising",
        "prediction_type": "epsilon",
        "learn_sigma": True,
    },
    "score": {"_class_name": CLASS, **TINY, "prediction_type": "score"},
}


@pytest.fixture
def store(tmp_path, tiny_autoencoder_kl):
    for name, config in MODELS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    return write_store(tmp_path / "store", tiny_autoencoder_kl)


def flags(store: Path, output: Path, **options) -> list[str]:
    defaults = {"latents_dir": store, "model": store.parent / "tiny.json", "output_dir": output}
    defaults |= {"report_to": "none", "train_batch_size": 4, "max_train_steps": 10, "validation_steps": 0}
    defaults |= {"num_inference_steps": 2, "learning_rate": 1e-3, "ema_decay": 0.9, "checkpointing_steps": 5}
    return [str(word) for name, value in {**defaults, **options}.items() for word in (f"--{name}", value)]


def train(store: Path, output: Path, **options) -> dict:
    """Runs the script in this process and gives back its last checkpoint."""
    run_script(SCRIPT, flags(store, output, **options))
    return last_checkpoint(output, "objective")


def save_model_without_zeros(directory: Path) -> SiTTransformer2DModel:
    """Zero-initialised layers give those before them no gradient, and labels no influence, to speak of."""
    torch.manual_seed(0)
    model = SiTTransformer2DModel(**TINY, sample_size=4, in_channels=4, num_classes=3)
    for name, parameter in model.named_parameters():
        if not parameter.any() or name.startswith("class_embedder"):
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    return model


def assert_close(first: dict, second: dict, tolerance: float):
    for part in ("module", "ema"):
        for name in first[part]:
            difference = (first[part][name] - second[part][name]).abs().max()
            assert difference <= tolerance, f"{part}.{name} differs by {difference}"


@pytest.mark.parametrize(
    ("model", "workers", "optimizer"),
    [("tiny", 0, "adamw"), ("tiny", 2, "adamw"), ("diffusion", 0, "adafactor"), ("tiny", 0, "muon")],
)
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, store, model, workers, optimizer):
    options = {"dataloader_num_workers": workers, "gradient_accumulation_steps": 2, "optimizer": optimizer}
    options["model"] = store.parent / f"{model}.json"
    whole = train(store, tmp_path / "whole", **options)
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole", resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-00000010")
    (resumed / "checkpoints" / "step-00000010.tmp").mkdir()
    assert_equal(whole, train(store, resumed, resume_from_checkpoint="latest", **options))
    lines = [json.loads(line)["step"] for line in (resumed / "metrics.jsonl").read_text().splitlines()]
    assert lines == sorted(set(lines))


def test_killed_between_checkpoints_and_resumed(tmp_path, store):
    """kill -9 somewhere after the second checkpoint; then three steps more, against a run that was never killed."""
    killed = tmp_path / "killed"
    command = [sys.executable, str(SCRIPT), *flags(store, killed, max_train_steps=100000, checkpointing_steps=7)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed / "checkpoints" / "step-00000014" / "complete.json").exists():
        assert process.poll() is None and time.monotonic() < deadline, "the run to be killed did not come that far"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()

    newest = max(killed.glob("checkpoints/step-*/complete.json"), key=lambda path: path.parent.name)
    steps = json.loads(newest.read_text())["step"] + 3
    resumed = train(store, killed, max_train_steps=steps, resume_from_checkpoint="latest")
    assert_equal(resumed, train(store, tmp_path / "whole", max_train_steps=steps))


@pytest.mark.slow
def test_a_job_of_two_processes_that_is_told_to_stop_says_so_by_its_status_and_goes_on(tmp_path, store):
    """Started by RANK and WORLD_SIZE, as SLURM's srun does it."""
    job, options = tmp_path / "job", {"max_train_steps": 60, "logging_steps": 2}

    def start() -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        common["ACCELERATE_USE_CPU"] = str(torch.accelerator.is_available())
        command = [sys.executable, "-m", "eqvae_command", "train-transformer"]
        command += flags(store, job, resume_from_checkpoint="latest", **options)
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        return [subprocess.Popen(command, env={**os.environ, **common, **rank}) for rank in ranks]

    processes = start()
    deadline = time.monotonic() + 120
    while not (job / "metrics.jsonl").is_file():
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.005)
    processes[1].send_signal(signal.SIGUSR1)  # one that hears it is enough
    assert [process.wait(timeout=120) for process in processes] == [STOPPED, STOPPED]
    assert not (job / "model_index.json").exists()
    assert [process.wait(timeout=120) for process in start()] == [0, 0] and (job / "model_index.json").is_file()
    whole = train(store, tmp_path / "whole", train_batch_size=8, **options)
    assert_close(last_checkpoint(job, "objective"), whole, 1e-5)


# A head of its own on the hidden states, off in every other step: then its weights take no part, on no rank.
SOMETIMES = """
import torch
from diffusers_eqvae.regularizers import GeneratorRegularizer, register_regularizer


@register_regularizer("sometimes")
class Sometimes(GeneratorRegularizer):
    hidden_layers = (1,)

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(16, 1)

    def draw(self, size, randomness):
        return () if randomness.step % 2 else None

    def penalty(self, state, batch, draw):
        return (self.head(state.hidden_states[1]).mean((1, 2)) - state.sigmas).square().mean()
"""


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("diffusion", "score", "adafactor", "muon", "lora")]


@pytest.mark.parametrize("method", ["plain", "regularized", *SLOW])
def test_two_processes_are_one_with_twice_the_batch(tmp_path, store, method, tiny_autoencoder_kl):
    (tmp_path / "sometimes.py").write_text(SOMETIMES)
    score = {"model": store.parent / "score.json", "flow_path": "vp", "flow_weighting": "velocity"}
    options = {
        "plain": {},
        "regularized": {"extension": tmp_path / "sometimes.py", "regularizers": "sometimes"},
        "diffusion": {"model": store.parent / "diffusion.json"},
        "score": score,
        "adafactor": {"optimizer": "adafactor"},
        "muon": {"optimizer": "muon"},
        "lora": {"model": tmp_path / "base", "trainable": "lora", "lora_rank": 2},
    }[method]
    if method == "lora":
        model = save_model_without_zeros(tmp_path / "transformer")
        ClassConditionalPipeline(model, tiny_autoencoder_kl, FlowMatchODEScheduler()).save_pretrained(
            tmp_path / "base"
        )
    worker = tmp_path / "worker.py"
    worker.write_text(f"""
import importlib.util, os, sys, torch
specification = importlib.util.spec_from_file_location("script", {str(SCRIPT)!r})
script = importlib.util.module_from_spec(specification)
specification.loader.exec_module(script)
original = script.TrainingRun.finish
def finish(run, save):
    rank = run.accelerator.process_index
    states = [run.module("objective").state_dict(), run.averaged("objective").state_dict()]
    torch.save(states, f"{{run.output_dir}}/rank{{rank}}.pt")
    original(run, save)
script.TrainingRun.finish = finish
script.main(sys.argv[1:])
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(worker)]
    command += flags(store, tmp_path / "two", train_batch_size=4, **options)
    environment = {**os.environ, "ACCELERATE_USE_CPU": str(torch.accelerator.is_available()), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    ranks = [torch.load(tmp_path / "two" / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert_equal(ranks[0], ranks[1])
    one = train(store, tmp_path / "one", train_batch_size=8, **options)
    assert (method == "lora") == all(".lora_" in name for name in one["ema"])
    assert (method == "regularized") == ("regularizers.sometimes.head.weight" in one["module"])
    # Keys' biases have no gradient but rounding, which Adam makes as large as any; Muon computes its step in bfloat16.
    tolerance = {"plain": 1e-6, "muon": 1e-4}.get(method, 1e-5)
    assert_close(last_checkpoint(tmp_path / "two", "objective"), one, tolerance)


def test_accumulating_two_micro_batches_is_one_twice_as_large(tmp_path, store):
    accumulated = train(store, tmp_path / "accumulated", train_batch_size=4, gradient_accumulation_steps=2)
    assert_close(accumulated, train(store, tmp_path / "large", train_batch_size=8), 1e-6)


def test_validation_does_not_disturb_the_run(tmp_path, store):
    silent = train(store, tmp_path / "silent")
    watched = train(store, tmp_path / "watched", validation_steps=2)
    assert_equal(silent, watched)
    assert len(list((tmp_path / "watched" / "validation").iterdir())) == 5


def test_evaluation_gives_the_figures_of_the_finished_pipeline_and_disturbs_nothing(tmp_path, store):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "squeezenet.pth")
    np.savez(tmp_path / "reference.npz", np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8))
    # Without an average the trained module itself is sampled, which must not leave it in another mode.
    save_model_without_zeros(tmp_path / "start")
    plain = {"seed": 3, "use_ema": "false", "model": tmp_path / "start"}
    network = {
        "feature_networks": f"squeezenet={tmp_path / 'squeezenet.pth'}",
        "num_inference_steps": 2,
        "guidance_scale": 1.5,
        "seed": 3,
    }
    silent = train(store, tmp_path / "silent", **plain)
    options = {"evaluation_steps": 5, "num_evaluation_samples": 6}
    options |= {"evaluation_reference": tmp_path / "reference.npz", "keep_best": "fd_squeezenet1_1"}
    options |= {"checkpoints_total_limit": 1}
    interval = ["--guidance_interval", "0.0", "0.6"]
    run_script(SCRIPT, flags(store, tmp_path / "watched", **plain | options | network) + interval)
    assert_equal(silent, last_checkpoint(tmp_path / "watched", "objective"))
    lines = [json.loads(line) for line in (tmp_path / "watched" / "metrics.jsonl").read_text().splitlines()]
    curve = {line["step"]: line for line in lines if "evaluation/fd_squeezenet1_1" in line}
    assert list(curve) == [5, 10]
    best = min(curve, key=lambda step: curve[step]["evaluation/fd_squeezenet1_1"])
    kept = sorted(path.name for path in (tmp_path / "watched" / "checkpoints").iterdir())
    assert kept == [f"step-{step:08d}" for step in sorted({best, 10})]
    assert curve[5]["evaluation/fd_squeezenet1_1"] != curve[10]["evaluation/fd_squeezenet1_1"]

    words = {"samples": tmp_path / "watched", "reference": tmp_path / "reference.npz", "num_samples": 6}
    words |= {"batch_size": 4, "output": tmp_path / "card.json", **network}
    run_script(
        SCRIPT.with_name("evaluate_generation.py"),
        [str(word) for name, value in words.items() for word in (f"--{name}", value)] + interval,
    )
    for name, value in json.loads((tmp_path / "card.json").read_text())["metrics"].items():
        assert curve[10][f"evaluation/{name}"] == value


def test_bf16_run_moves_float32_weights_and_the_ema_follows(tmp_path, store):
    """In bfloat16 weights 95 % of them would not move at this learning rate."""
    model = save_model_without_zeros(tmp_path / "start")
    options = {"mixed_precision": "bf16", "learning_rate": 4.5e-6, "ema_decay": 0.99, "checkpointing_steps": 200}
    end = train(store, tmp_path / "end", max_train_steps=200, model=tmp_path / "start", **options)
    start = dict(model.named_parameters())
    before = torch.cat([start[name].detach().flatten() for name in start])
    names = ("module", "ema")
    after, average = (torch.cat([end[part][f"model.{name}"].flatten() for name in start]) for part in names)
    assert after.dtype == average.dtype == torch.float32
    assert (after != before).float().mean() > 0.99
    assert (average != before).float().mean() > 0.99
    assert (average - after).norm() < (before - after).norm()
