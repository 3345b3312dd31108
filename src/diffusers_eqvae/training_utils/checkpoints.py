"""Checkpoints that are either complete or ignored: written aside, marked, renamed."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..files import (
    UNFINISHED,
    delete,
    flush_to_disk,
    flush_tree,
    read_json,
    replace_directory,
    require_format_version,
    write_json,
)
from .tracking import METRICS_FILE

logger = logging.getLogger(__name__)

MARKER = "complete.json"
# One NAME.pt per module: {"module": weights, "optimizer": state, "ema": weights}; complete.json: step and arguments.
FORMAT_VERSION = 2

FINISHED = ("model_index.json", "config.json")  # one of them lies at the root of a finished run

# Arguments that may differ between a checkpoint and its continuation without changing the trajectory.
HARMLESS = frozenset(
    {
        "output_dir",
        "resume_from_checkpoint",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "report_to",
        "logging_steps",
        "validation_steps",
        "evaluation_steps",
        "evaluation_reference",
        "num_evaluation_samples",
        "feature_networks",
        "max_nonfinite_steps",
        "dataloader_num_workers",
        "gradient_checkpointing",
        "cache_dir",
        "dry_run",
        "push_to_hub",
        "hub_model_id",
    }
)


def checkpoint_directory(output_dir: Path, step: int) -> Path:
    return output_dir / "checkpoints" / f"step-{step:08d}"


def complete_checkpoints(output_dir: Path, *, warn: bool = True) -> list[Path]:
    """All complete checkpoints of a run, oldest first; half-written ones are named in a warning and left alone."""
    found = sorted((output_dir / "checkpoints").glob("step-*"))
    complete = [path for path in found if path.suffix != UNFINISHED and (path / MARKER).is_file()]
    unfinished = [path.name for path in found if path not in complete]
    if unfinished and warn:
        logger.warning("Ignoring half-written checkpoints in %s: %s.", found[0].parent, ", ".join(unfinished))
    return complete


def find_checkpoint(resume: str | None, output_dir: Path, *, warn: bool = True) -> Path | None:
    """The directory that `--resume_from_checkpoint` means: None, "latest", a path, or a name inside checkpoints/.

    Raises:
        ValueError: a path that holds no complete checkpoint; no `resume` although output_dir holds a run, which a
            fresh one would mix with its own; or "latest" where a finished run has left no checkpoint.
    """
    if resume is None or resume == "latest":
        complete = complete_checkpoints(output_dir, warn=warn)
        if complete and resume is None:
            raise ValueError(
                f"{output_dir} already holds a run with the checkpoint {complete[-1].name}. Continue it with "
                "--resume_from_checkpoint latest, choose another --output_dir, or delete the directory."
            )
        if not complete:
            _refuse_run_without_checkpoint(output_dir, restart=resume == "latest")
        return complete[-1] if complete else None
    for path in (Path(resume), output_dir / "checkpoints" / resume):
        if (path / MARKER).is_file() and path.suffix != UNFINISHED:
            return path
    there = ", ".join(path.name for path in complete_checkpoints(output_dir, warn=warn)) or "none"
    raise ValueError(f"{resume} is not a complete checkpoint (no {MARKER}). Complete ones in {output_dir}: {there}.")


def _refuse_run_without_checkpoint(output_dir: Path, *, restart: bool) -> None:
    """Refuses a finished run, and a begun one too unless `restart`: it was killed before its first checkpoint."""
    if any((output_dir / name).is_file() for name in FINISHED):
        raise ValueError(
            f"{output_dir} already holds a finished run, without checkpoints to continue from. Choose another "
            "--output_dir, or delete the directory."
        )
    metrics = output_dir / METRICS_FILE
    if not restart and metrics.is_file() and metrics.stat().st_size:
        raise ValueError(
            f"{output_dir} already holds a run that wrote no checkpoint. Start it over with --resume_from_checkpoint "
            "latest, choose another --output_dir, or delete the directory."
        )


def resumed_step(checkpoint: Path, now: dict[str, Any], *, warn: bool = True) -> int:
    """Steps done at a checkpoint; names in warnings what makes the continuation differ from an uninterrupted run.

    Args:
        checkpoint: a complete one.
        now: "arguments" (resolved), "global_batch_size" and "world_size" of the present run.
        warn: False on all but one process.

    Raises:
        ValueError: a marker that cannot be read.
    """
    needs = {"step": int, "arguments": dict, "global_batch_size": int, "world_size": int, "extensions": dict}
    then = _read(checkpoint, MARKER, lambda file: read_json(file, needs=needs))
    remedy = "start again in another output_dir"
    require_format_version(then.get("format_version"), FORMAT_VERSION, path=checkpoint / MARKER, remedy=remedy)
    if not warn:
        return int(then["step"])
    logger.info("Resuming from %s.", checkpoint)
    for key, value in now["arguments"].items():
        if key not in HARMLESS and then["arguments"].get(key, value) != value:
            before = then["arguments"][key]
            logger.warning("--%s was %r when the checkpoint was written and is %r now.", key, before, value)
    before = then["extensions"]
    if before != now["extensions"]:
        logger.warning(
            "Extensions were %s when the checkpoint was written, and are %s now.", before, now["extensions"]
        )
    if then["global_batch_size"] != now["global_batch_size"]:
        logger.warning(
            "The global batch was %d and is %d now, so the order of examples does not continue exactly.",
            then["global_batch_size"],
            now["global_batch_size"],
        )
    elif then["world_size"] != now["world_size"]:
        logger.warning(
            "Written by %d processes, continued by %d with the same global batch: equal up to rounding.",
            then["world_size"],
            now["world_size"],
        )
    return int(then["step"])


def read_module(checkpoint: Path, name: str) -> dict[str, Any]:
    """The state of the module `name` in a checkpoint, on the CPU.

    Raises:
        ValueError: no such module there, or a file that cannot be read.
    """
    if not (checkpoint / f"{name}.pt").is_file():
        raise ValueError(f"{checkpoint} holds no {name!r}; it was written by a run without that module.")
    return _read(checkpoint, f"{name}.pt", lambda file: torch.load(file, map_location="cpu", weights_only=True))


def _read(checkpoint: Path, name: str, load: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """`load` of a file of a checkpoint; where it fails, a ValueError that names the checkpoint to go back to."""
    try:
        return load(checkpoint / name)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes torch.load raise almost anything
        # Other messages than the system's advise to load without weights_only, which would run what the file says.
        reason = str(error) if isinstance(error, OSError) else type(error).__name__
        whole = sorted(marker.parent for marker in checkpoint.parent.glob(f"step-*/{MARKER}"))
        older = [path for path in whole if path.name < checkpoint.name and path.suffix != UNFINISHED]
        remedy = "There is no older one to resume from: start again in another --output_dir, or delete this one."
        if older:
            remedy = f"Resume from an older one by --resume_from_checkpoint {older[-1]}."
        raise ValueError(f"{checkpoint / name} is damaged and cannot be read ({reason}). {remedy}") from error


def write_checkpoint(
    output_dir: Path, *, step: int, write: Callable[[Path], None], facts: dict[str, Any], limit: int | None
) -> Path:
    """Calls `write(directory)` on a sibling, adds the marker, renames, then removes what exceeds `limit`.

    A kill at any moment leaves the earlier checkpoints and at most one directory ending in .tmp.
    """
    target = checkpoint_directory(output_dir, step)
    aside = target.with_name(target.name + UNFINISHED)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write(aside)
    flush_tree(aside)
    write_json(aside / MARKER, {"format_version": FORMAT_VERSION, "step": step, **facts})
    replace_directory(aside, target)
    flush_to_disk(output_dir)
    if limit is not None:
        for old in complete_checkpoints(output_dir, warn=False)[:-limit]:
            delete(old)
    return target


def publish(output_dir: Path, save: Callable[[Path], None]) -> None:
    """Runs `save(directory)` on a sibling and moves each entry to the root of output_dir, the index files last."""
    aside = output_dir / f"finished{UNFINISHED}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save(aside)
    index_last = sorted(aside.iterdir(), key=lambda path: (path.suffix == ".json", path.name))
    for path in index_last:
        flush_tree(path)
        replace_directory(path, output_dir / path.name)
    aside.rmdir()
    flush_to_disk(output_dir)
