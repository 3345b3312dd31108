"""Where the micro-batches of a training run come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from .checkpoints import Ancestry


def rank_loader(
    run: Any,
    ancestry: Ancestry,
    dataset: Any,
    *,
    batch_size: int | None,
    collate: Callable[[list[Any]], Any] | None,
) -> Iterable[Any]:
    """What `TrainingRun.loader` gives; settles the run's length where epochs decide it."""
    from ..data.order import draw_loader

    if identity := getattr(dataset, "identity", None):
        ancestry.identify("stream" if hasattr(dataset, "loader") else "data", identity)
    arguments, accelerator = run.arguments, run.accelerator
    batch_size = batch_size or arguments.train_batch_size
    accumulation = arguments.gradient_accumulation_steps
    if run.max_train_steps is None:
        per_step = batch_size * accumulation * accelerator.num_processes
        run.max_train_steps = math.ceil(arguments.num_train_epochs * len(dataset) / per_step)
    loader = draw_loader(
        dataset,
        batch_size,
        collate=collate,
        num_workers=arguments.dataloader_num_workers,
        pin_memory=run.device.type == "cuda",
        place=ancestry.place,
        seed=arguments.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        start_batch=run.step * accumulation,
    )
    ancestry.loader = loader
    return loader
