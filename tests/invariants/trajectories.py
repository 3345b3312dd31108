"""Running a training script in this process and comparing what it leaves."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState

ROOT = Path(__file__).resolve().parents[2]


def load_script(path: Path):
    """The module of a script, under its own name."""
    specification = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    return script


def as_flags(options: dict) -> list[str]:
    """{"name": value} as --name value; lists become several words."""
    words = []
    for name, value in options.items():
        words += [f"--{name}", *(str(item) for item in (value if isinstance(value, list) else [value]))]
    return words


def run_script(path: Path, flags: list[str]) -> None:
    """Calls the script's main(flags) in this process, with accelerate's process-wide state reset afterwards."""
    try:
        load_script(path).main(flags)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def torchrun(path: Path, flags: list[str], *, processes: int) -> subprocess.CompletedProcess:
    """Launches the script on `processes` gloo ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": str(torch.accelerator.is_available()), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, str(path), *flags], env=environment, capture_output=True, text=True, timeout=300)


def last_checkpoint(output_dir: Path, name: str) -> dict:
    """The saved state of one module in the newest checkpoint."""
    newest = sorted((output_dir / "checkpoints").glob("step-*[0-9]"))[-1]
    return torch.load(newest / f"{name}.pt", weights_only=True)


def assert_equal(first, second, path: str = "state") -> None:
    """Bit for bit, through nested dicts and lists."""
    assert type(first) is type(second), path
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), f"{path} differs by {(first - second).abs().max()}"
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            assert_equal(first[key], second[key], f"{path}.{key}")
    elif isinstance(first, list):
        assert len(first) == len(second), path
        for index, pair in enumerate(zip(first, second, strict=True)):
            assert_equal(*pair, f"{path}[{index}]")
    else:
        assert first == second, path


def assert_close(first: dict, second: dict, tolerance: float = 2e-3) -> None:
    """Weights and averages of two saved modules agree: |difference| / |weights| over all of them together.

    A norm, not a maximum: Adam divides a gradient by its own size, so the rounding of a vanishing one moves its weight
    by a whole step. A few steps at 1e-3 move the norm by several per cent, and an adaptive weight that is not averaged
    over ranks by half a per cent or more.
    """
    for part in first.keys() & {"module", "ema"}:
        weights = torch.cat([value.flatten().double() for value in first[part].values()])
        others = torch.cat([second[part][name].flatten().double() for name in first[part]])
        difference = (weights - others).norm() / weights.norm()
        assert difference <= tolerance, f"{part} differs by {difference:.1e}"
