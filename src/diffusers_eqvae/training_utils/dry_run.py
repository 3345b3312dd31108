"""What a run needs in memory and on disk, before it starts (`--dry_run`)."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any

from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ..randomness import reseed_global
from .optimization import OptimizedModule
from .optimizers import FLOAT32_BYTES, state_bytes

DRY_RUN_STEPS = 4  # what a step needs may depend on its random draw, so the largest of a few counts
CARDS_GIB = (8, 12, 16, 24, 40, 48, 80, 141)  # memory of common GPUs
FRAMEWORK_GIB = 0.5
MARGIN = 1.15  # the estimate has been within 15 % of what a profiler sees (on a CPU)
MEASURED = (2, 4)  # examples; what a micro-batch needs grows by as much with each


class LiveTensors(TorchDispatchMode):
    """Which tensors are alive when, each storage once and those of the models not at all.

    Counted are results of operations, in the forward and the backward, and not what a kernel needs while it runs.

    Example:
        >>> with LiveTensors([model]) as tensors:
        ...     model(pixels).square().mean().backward()
        >>> tensors.peak(without=[weight.grad for weight in model.parameters()])
        74448896
    """

    def __init__(self, models: Iterable[nn.Module]) -> None:
        super().__init__()
        self._changes: list[tuple[int, int]] = []  # a storage's number, and by how many bytes it makes memory grow
        self._numbers = WeakIdKeyDictionary()
        for model in models:
            for tensor in (*model.parameters(), *model.buffers()):
                self._numbers[tensor.untyped_storage()] = -1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._numbers:
                storage, number = tensor.untyped_storage(), len(self._changes)
                self._numbers[storage] = number
                self._changes.append((number, storage.nbytes()))
                weakref.finalize(storage, self._changes.append, (number, -storage.nbytes()))
        return result

    def peak(self, *, without: Iterable[Tensor]) -> int:
        """Bytes at the moment of most, leaving out what these tensors hold."""
        left_out = {self._numbers.get(tensor.untyped_storage()) for tensor in without}
        return max(accumulate(size for number, size in self._changes if number not in left_out), default=0)


def first_examples(batch: Any, count: int) -> Any:
    """The batch cut down to its first examples: tensors in nested dicts, lists and tuples are sliced."""
    if isinstance(batch, Tensor):
        return batch[:count]
    if isinstance(batch, Mapping):
        return {key: first_examples(value, count) for key, value in batch.items()}
    each = (first_examples(value, count) for value in batch) if isinstance(batch, (list, tuple)) else None
    return batch if each is None else type(batch)(each)


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


def smallest_card(size: float) -> str:
    """In words, the smallest common card whose memory holds `size` bytes with the margin and the framework.

    Example:
        >>> smallest_card(10 * 2**30)
        'a card of 12 GB'
    """
    needed = size * MARGIN / 2**30 + FRAMEWORK_GIB
    fitting = [card for card in CARDS_GIB if needed <= card]
    return f"a card of {fitting[0]} GB" if fitting else f"none of {CARDS_GIB[-1]} GB; lower --train_batch_size"


def per_batch(measured: Mapping[int, int], batch_size: int) -> int:
    """Bytes of a step of `batch_size` examples, from those of steps of one or two smaller sizes: a straight line.

    Example:
        >>> per_batch({2: 30, 4: 50}, 16)
        170
    """
    (few, least), (many, most) = min(measured.items()), max(measured.items())
    slope = (most - least) / (many - few) if many > few else 0.0
    return round(most + slope * (batch_size - many))


def report(
    entries: Iterable[OptimizedModule],
    frozen: Iterable[nn.Module],
    *,
    measured: Mapping[int, int],
    batch_size: int,
    accumulates: bool,
    checkpoints_kept: int | None,
    best_kept: bool = False,
) -> str:
    """The estimate as text: one line per part, sums, and how the step was measured.

    Args:
        measured: bytes that a step needs beside models and gradients, by its number of examples.
        accumulates: whether gradients of one micro-batch are there while another is computed; otherwise they come as
            activations go.
    """
    parts: dict[str, int] = {}
    for entry in entries:
        for part, size in weight_bytes(entry).items():
            parts[part] = parts.get(part, 0) + size
    gradients = parts.pop("gradients")
    checkpoint = gradients + parts["optimizer"] + parts["ema"]  # as many bytes as the learned weights
    parts["frozen modules"] = sum(frozen_bytes(module) for module in frozen)
    activations = per_batch(measured, batch_size)
    parts["step"] = activations + gradients if accumulates else max(activations, gradients)
    sizes = " and ".join(f"{count} ({readable(size)})" for count, size in sorted(measured.items()))
    best = ", the best one" if best_kept else ""
    lines = ["Memory per device, estimated:"]
    lines += [f"  {part:<16}{readable(size):>12}" for part, size in parts.items() if size]
    in_all = sum(parts.values())
    lines += [f"  {'in all':<16}{readable(in_all):>12}, plus the framework (about {FRAMEWORK_GIB} GiB on a GPU)"]
    lines += [
        f"With 15 % more for safety it needs {smallest_card(in_all)} (estimated, not measured on one).",
        f"Step: activations and temporary tensors ({readable(activations)}) measured in real steps of {sizes} "
        f"examples, for a micro-batch of {batch_size}; gradients ({readable(gradients)}) "
        + ("beside them." if accumulates else "after them."),
        f"Disk per checkpoint: {readable(checkpoint)}, "
        + (f"{checkpoints_kept} kept{best} and one being written." if checkpoints_kept else "all of them kept."),
    ]
    return "\n".join(lines)


def dry_run(run: Any, loader: Iterable[Any]) -> Iterator[Any]:
    """Yields small batches for a few steps of the script's loop, prints what a `TrainingRun` needs, and ends."""
    entries, given = list(run.modules.values()), run.arguments
    averages = [entry.ema.module for entry in entries if entry.ema is not None]
    batches, first_step = iter(loader), run.step
    measured: dict[int, int] = {}
    for count in sorted({min(size, given.train_batch_size) for size in MEASURED}):
        for run.step in range(first_step, first_step + DRY_RUN_STEPS):
            run.randomness.at(run.step, 0)
            reseed_global(given.seed, run.accelerator.process_index, run.step, 0)
            tensors = LiveTensors([*run.frozen, *(entry.module for entry in entries), *averages])
            with tensors:
                yield send_to_device(first_examples(next(batches), count), run.device)
            gradients = [each.grad for entry in entries for each in entry.parameters if each.grad is not None]
            measured[count] = max(measured.get(count, 0), tensors.peak(without=gradients))
            for entry in entries:
                entry.optimizer.zero_grad(set_to_none=True)
    text = report(
        entries,
        run.frozen,
        measured=measured,
        batch_size=given.train_batch_size,
        accumulates=given.gradient_accumulation_steps > 1,
        checkpoints_kept=given.checkpoints_total_limit,
        best_kept=given.keep_best is not None,
    )
    if run.is_main:
        sys.stdout.write(text + "\n")
    sys.exit(0)
