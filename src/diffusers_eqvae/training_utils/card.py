"""What the card of a trained model says of its training, whatever was trained."""

from __future__ import annotations

import shlex
import sys
from typing import Any

from ..extensions import loaded_extensions
from ..provenance import versions
from .run import TrainingRun


def settings_of(run: TrainingRun) -> dict[str, Any]:
    """How it was trained."""
    arguments = run.arguments
    return {
        "optimizer_steps": run.step,
        "global_batch_size": run.global_batch_size,
        "optimizer": next((entry.optimizer_name for entry in run.modules.values()), None),
        "learning_rate": arguments.learning_rate,
        "mixed_precision": run.accelerator.mixed_precision,
        "ema_decay": arguments.ema_decay if arguments.use_ema else None,
        "seed": arguments.seed,
        "skipped_steps": run.skipped_steps,
        **({"changes": run.changes} if run.changes else {}),
    }


def how_it_was_made() -> dict[str, Any]:
    """By which versions, extensions and command."""
    program, *words = sys.argv
    started = program.split() if program.startswith("eqvae ") else [program]  # the console script's name, two words
    return {"versions": versions(), "extensions": loaded_extensions(), "command": shlex.join([*started, *words])}
