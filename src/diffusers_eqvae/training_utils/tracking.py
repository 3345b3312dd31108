"""What a run tells the world: metrics.jsonl always, trackers on request, images, a progress bar."""

from __future__ import annotations

import importlib
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from ..files import write_text
from ..images import image_grid
from .console import progress_bar

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


class Meter:
    """Means of device tensors between two readings; adding never waits for the device.

    What is added counts from the end of its step on, and not at all where the step is skipped. A vector keeps its
    elements apart, as NAME/0, NAME/1 and so on; of any other tensor the mean counts.
    """

    def __init__(self) -> None:
        self._step: list[tuple[str, Tensor]] = []
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor | float], device: torch.device) -> None:
        for name, value in values.items():
            value = torch.as_tensor(value, dtype=torch.float32, device=device).detach()
            self._step.append((name, value if value.ndim == 1 else value.mean()))

    def close_step(self, skipped: Tensor) -> None:
        """`skipped` (0-dim, 0 or 1) says whether the step that has been computed is left out."""
        taken = 1 - skipped
        for name, value in self._step:
            value = torch.where(taken.bool(), value, 0.0)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts[name] + taken if name in self._counts else taken
        self._step = []

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Means since the last reading, over all ranks too (every rank must have added the same names)."""
        if not self._sums:
            return {}
        means = torch.cat([(total / self._counts[name]).flatten() for name, total in self._sums.items()])
        names = [
            f"{name}/{index}" if total.ndim else name
            for name, total in self._sums.items()
            for index in range(total.numel())
        ]
        values = dict(zip(names, accelerator.reduce(means, reduction="mean").tolist(), strict=True))
        self._sums, self._counts = {}, {}
        return values


class Tracking:
    """Writes of the main process; every method does nothing on the others.

    Args:
        output_dir: of the run.
        accelerator: its trackers are started here.
        name: of what is trained, on the progress bar.
        project: in the trackers.
        arguments: resolved arguments, recorded by the tracker.
        step: where the run starts; later lines of an interrupted run's metrics.jsonl are dropped.
        total_steps: length of the progress bar.
    """

    def __init__(
        self,
        output_dir: Path,
        accelerator: Accelerator,
        *,
        name: str,
        project: str,
        arguments: Mapping[str, Any],
        step: int,
        total_steps: int,
    ) -> None:
        self._output_dir, self._accelerator = output_dir, accelerator
        self._is_main = accelerator.is_main_process
        self._last_time, self._last_step, self._first_step = time.perf_counter(), step, step
        self._waited = 0.0
        self._bar = progress_bar(total=total_steps, initial=step, desc=name, unit="step", disable=not self._is_main)
        if not self._is_main:
            return
        self._written_before = _drop_lines_after(output_dir / METRICS_FILE, step)
        if accelerator.log_with:
            simple = {key: value for key, value in arguments.items() if isinstance(value, (bool, int, float, str))}
            logs = output_dir / "logs"
            logs.mkdir(exist_ok=True)
            run = output_dir.resolve().name
            own = {"wandb": {"dir": str(logs), "name": run}, "trackio": {"name": run}}
            accelerator.init_trackers(project, config=simple, init_kwargs=own)

    def advance(self) -> None:
        self._bar.update(1)

    def fetch(self, batches: Iterator[Any]) -> Any:
        """The next batch; how long it took enters `data_wait`."""
        begun = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - begun
        return batch

    def scalars(self, step: int, values: Mapping[str, float], *, images_per_step: int) -> None:
        """Appends one line to metrics.jsonl and tells the tracker; adds images_per_second and data_wait.

        data_wait is the share of the time since the last line that went by until a batch was there: near 0 where the
        data keep up with the step.
        """
        if not self._is_main:
            return
        now = time.perf_counter()
        elapsed = max(now - self._last_time, 1e-9)
        rate = images_per_step * (step - self._last_step) / elapsed
        speed = {"images_per_second": rate, "data_wait": min(1.0, self._waited / elapsed)}
        self._last_time, self._last_step, self._waited = now, step, 0.0
        self.figures(step, {**values, **speed})
        losses = {key: f"{value:.4g}" for key, value in values.items() if "loss" in key}
        self._bar.set_postfix(
            {**losses, "images/s": f"{rate:.1f}", "data": f"{speed['data_wait']:.0%}"}, refresh=sys.stderr.isatty()
        )

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one line to metrics.jsonl and tells the tracker; NaN and infinity become null in the file."""
        if not self._is_main:
            return
        if step == self._first_step and {"step", *values} in self._written_before:
            return  # a run resumed at a validation step measures once more what it measured before it stopped
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        with (self._output_dir / METRICS_FILE).open("a") as handle:
            handle.write(json.dumps({"step": step, **finite}) + "\n")
        self._accelerator.log(dict(values), step=step)

    def images(self, step: int, name: str, images: np.ndarray | Sequence[Image.Image]) -> Path | None:
        """Images (uint8 NHWC, or PIL of one size) to validation/<step>_<name>.png as a grid, and to the tracker."""
        if not self._is_main:
            return None
        array = np.stack(
            [np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image) for image in images]
        )
        if array.dtype != np.uint8 or array.ndim != 4:
            raise TypeError(f"Images must be uint8 NHWC or PIL; got {array.dtype} of shape {array.shape}.")
        path = self._output_dir / image_path(step, name)
        path.parent.mkdir(exist_ok=True)
        image_grid(list(array), gap_px=0).save(path)
        for tracker in self._accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: array}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({name: list(array)}, step=step)
            elif tracker.name == "trackio":
                tracker.log({name: importlib.import_module("trackio").Image(path)}, step=step)
        return path

    def close(self) -> None:
        self._bar.close()


def figures_at(output_dir: Path, step: int) -> dict[str, float]:
    """What metrics.jsonl says of a step: name -> value; nothing where it has no line for it.

    Example:
        >>> figures_at(Path("runs/eq-vae"), 0)["validation/psnr"]
    """
    path = output_dir / METRICS_FILE
    found: dict[str, float] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        record = json.loads(line)
        if record.pop("step") == step:
            found |= {key: value for key, value in record.items() if value is not None}
    return found


def drawn_images(output_dir: Path, step: int, name: str, *, caption: str, private: bool) -> list[dict[str, Any]]:
    """The images that `Tracking.images` wrote of a step, as a card lists them; none where it wrote none.

    `private` where they show what only the owner of the data has.
    """
    path = image_path(step, name)
    return [{"path": path, "caption": caption, "private": private}] if (output_dir / path).exists() else []


def images_of(output_dir: Path, step: int) -> list[Path]:
    """What `Tracking.images` wrote of a step."""
    return sorted(output_dir.glob(image_path(step, "*")))


def image_path(step: int, name: str) -> str:
    """Of the images of a step, relative to the run: `image_path(500, "samples")`."""
    return f"validation/{step:08d}_{name}.png"


def _drop_lines_after(path: Path, step: int) -> list[set[str]]:
    """Keeps the lines up to `step` of an interrupted run, so that its curves continue instead of overlapping.

    Returns:
        The keys of each line of `step` itself. A run that starts at step 0 keeps no line.
    """
    if not path.exists():
        return []
    kept, present = [], []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            logger.warning("Dropping a half-written line of %s.", path)
            continue
        if 0 < step >= record["step"]:
            kept.append(line + "\n")
            present += [set(record)] if record["step"] == step else []
    write_text(path, "".join(kept))
    return present
