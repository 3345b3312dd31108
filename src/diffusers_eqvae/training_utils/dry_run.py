"""What a run needs in memory and on disk, before it starts (`--dry_run`)."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from ..randomness import reseed_global
from .optimization import OptimizedModule
from .optimizers import FLOAT32_BYTES, state_bytes

DRY_RUN_STEPS = 4  # what a step saves may depend on its random draw, so the largest of a few counts


class SavedActivations:
    """Bytes that autograd keeps for the backward, each storage counted once and weights not at all."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._weights = {
            parameter.untyped_storage().data_ptr() for module in modules for parameter in module.parameters()
        }
        self.largest = 0

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Counts what the forward inside saves; `largest` is the maximum over all measured forwards."""
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
        self.largest = max(self.largest, sum(storages.values()))


def first_example(batch: Any) -> Any:
    """The batch cut down to one example: tensors in nested dicts, lists and tuples are sliced."""
    if isinstance(batch, Tensor):
        return batch[:1]
    if isinstance(batch, Mapping):
        return {key: first_example(value) for key, value in batch.items()}
    return type(batch)(first_example(value) for value in batch) if isinstance(batch, (list, tuple)) else batch


def weight_bytes(entry: OptimizedModule) -> dict[str, int]:
    """Bytes of weights, gradients, optimizer state and EMA of one optimized module."""
    every = sum(tensor.numel() for tensor in entry.module.state_dict().values()) * FLOAT32_BYTES
    trainable = sum(parameter.numel() for parameter in entry.parameters)
    return {
        "weights": every,
        "gradients": trainable * FLOAT32_BYTES,
        "optimizer": state_bytes(entry.optimizer_name, entry.module),
        "ema": trainable * FLOAT32_BYTES if entry.ema is not None else 0,
    }


def frozen_bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


def readable(size: float) -> str:
    """Bytes as '1.25 GiB' or '310.4 MiB'."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def report(
    entries: Iterable[OptimizedModule],
    frozen: Iterable[nn.Module],
    *,
    activation_bytes_per_example: int,
    batch_size: int,
    checkpoints_kept: int | None,
    best_kept: bool = False,
) -> str:
    """The estimate as text: one line per part, sums, and how the activations were found."""
    parts: dict[str, int] = {}
    for entry in entries:
        for part, size in weight_bytes(entry).items():
            parts[part] = parts.get(part, 0) + size
    checkpoint = parts["gradients"] + parts["optimizer"] + parts["ema"]  # as many bytes as the learned weights
    parts["frozen modules"] = sum(frozen_bytes(module) for module in frozen)
    parts["activations"] = activation_bytes_per_example * batch_size
    best = ", the best one" if best_kept else ""
    lines = ["Memory per device, estimated:"]
    lines += [f"  {part:<16}{readable(size):>12}" for part, size in parts.items() if size]
    lines += [f"  {'in all':<16}{readable(sum(parts.values())):>12}, plus the framework (about 0.5 GiB on a GPU)"]
    lines += [
        f"Activations: measured in real forwards of one example ({readable(activation_bytes_per_example)} saved for "
        f"the backward), times a micro-batch of {batch_size}; temporary buffers are not in it.",
        f"Disk per checkpoint: {readable(checkpoint)}, "
        + (f"{checkpoints_kept} kept{best} and one being written." if checkpoints_kept else "all of them kept."),
    ]
    return "\n".join(lines)


def dry_run(run: Any, loader: Iterable[Any]) -> Iterator[Any]:
    """Yields first examples for a few steps of the script's loop, prints what a `TrainingRun` needs, and ends."""
    entries = list(run.modules.values())
    modules = [*run.frozen, *(entry.module for entry in entries)]
    saved, batches, first_step = SavedActivations(modules), iter(loader), run.step
    for run.step in range(first_step, first_step + DRY_RUN_STEPS):
        batch = send_to_device(first_example(next(batches)), run.device)
        run.randomness.at(run.step, 0)
        reseed_global(run.arguments.seed, run.accelerator.process_index, run.step, 0)
        with saved.measure():
            yield batch
        for entry in entries:
            entry.optimizer.zero_grad(set_to_none=True)
    text = report(
        entries,
        run.frozen,
        activation_bytes_per_example=saved.largest,
        batch_size=run.arguments.train_batch_size,
        checkpoints_kept=run.arguments.checkpoints_total_limit,
        best_kept=run.arguments.keep_best is not None,
    )
    if run.is_main:
        sys.stdout.write(text + "\n")
    sys.exit(0)
