"""Timing shared by the benchmarks: variants take turns in one process, medians, ratios, one JSON with the versions."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from diffusers_eqvae.files import write_json
from diffusers_eqvae.provenance import hardware

Step = Callable[[], object]


def seconds(step: Step, device: str) -> float:
    """CPU seconds of this process on the CPU, which other work on the machine does not inflate; events on a GPU."""
    if not device.startswith("cuda"):
        start = time.process_time()
        step()
        return time.process_time() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def median_seconds(steps: Mapping[str, Step], *, device: str, repetitions: int, warmup: int = 2) -> dict[str, float]:
    """Variant -> median seconds of one call; the variants take turns, the first `warmup` rounds do not count."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in range(repetitions + warmup):
        for name, step in steps.items():
            elapsed = seconds(step, device)
            if repetition >= warmup:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def save_result(path: Path | None, *, device: str, arguments: Mapping[str, Any], **results: Any) -> None:
    """Writes the result with date, device and versions, where a path is given."""
    if path is None:
        return
    named = {name: str(value) for name, value in arguments.items() if name != "output"}
    write_json(path, {**hardware(device), "arguments": named, **results})
