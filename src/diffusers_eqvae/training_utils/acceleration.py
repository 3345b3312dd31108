"""The Accelerator of a run and the wrapping of its modules: autocast, DDP."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, LoggerType
from torch import nn

from .arguments import RunArguments
from .processes import runs_on_cpu

# The other ranks wait while the main process validates, measures statistics and saves.
LONGEST_WAIT = timedelta(hours=2)


def build_accelerator(arguments: RunArguments) -> Accelerator:
    """An Accelerator for one process or many, with its tracker; a dry run has none.

    Raises:
        ValueError: float16, wherever it was asked for, or a tracker that is not installed.
    """
    precision = arguments.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16"):
        raise ValueError(
            f"Mixed precision must be no or bf16; got {precision}. float16 ends at 65504, which activations and sums "
            "over pixels exceed: the run would end in NaN. Use --mixed_precision bf16."
        )
    tracker = arguments.report_to
    if tracker != "none" and LoggerType(tracker) not in get_available_trackers():  # accelerate goes on without it
        raise ValueError(f"--report_to {tracker} needs a package: pip install {tracker}. Or use --report_to none.")
    return Accelerator(
        cpu=runs_on_cpu(),
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        mixed_precision=precision,
        log_with=None if arguments.dry_run or tracker == "none" else tracker,
        project_dir=None if arguments.dry_run else Path(arguments.output_dir) / "logs",
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=False),
            InitProcessGroupKwargs(timeout=LONGEST_WAIT),
        ],
        step_scheduler_with_optimizer=False,
    )


def wrap(accelerator: Accelerator, module: nn.Module) -> nn.Module:
    """What the training step calls in the module's stead."""
    with warnings.catch_warnings():  # torch 2.15 renames the option, torch 2.6 knows only the old name
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        return accelerator.prepare_model(module)
