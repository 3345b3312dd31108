"""Checkpoints that are either complete or ignored: written aside, marked, renamed; and what may continue them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..directories import OutputDirectory, is_leftover
from ..files import (
    UNFINISHED,
    delete,
    disk_trouble_explained,
    flush_to_disk,
    flush_tree,
    read_json,
    replace_directory,
    require_format_version,
    share,
    temporary_sibling,
    write_json,
)
from ..provenance import hash_file
from .tracking import METRICS_FILE

logger = logging.getLogger(__name__)

MARKER = "complete.json"
# One NAME.pt per module: {"module": weights, "optimizer": state, "ema": weights}. complete.json: step; digests of the
# other files; number (of the checkpoint among those the run wrote) and ancestors (names); and the facts of `Ancestry`.
FORMAT_VERSION = 3

NEEDS = {"step": int, "files": dict, "number": int, "ancestors": list, "identities": dict, "skipped": dict}
NEEDS |= {"arguments": dict, "global_batch_size": int, "world_size": int, "extensions": dict, "changes": list}

FINISHED = ("model_index.json", "config.json")  # one of them lies at the root of a finished run

# Arguments that may differ between a checkpoint and its continuation without changing the trajectory, or that stand
# for something which is compared itself (global_batch_size).
HARMLESS = frozenset(
    {
        "output_dir",
        "resume_from_checkpoint",
        "allow_changes",
        "break_lock",
        "train_batch_size",
        "gradient_accumulation_steps",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "keep_best",
        "max_hours",
        "report_to",
        "tracker_project_name",
        "logging_steps",
        "validation_steps",
        "evaluation_steps",
        "num_evaluation_samples",
        "max_nonfinite_steps",
        "dataloader_num_workers",
        "gradient_checkpointing",
        "gradient_checkpointing_every",
        "cache_dir",
        "dry_run",
        "push_to_hub",
        "push_every",
        "hub_model_id",
        "hub_private",
        "hub_revision",
        "hub_images",
    }
)
# These change no step that is done, unless the learning rate follows the length of the run.
LENGTH = frozenset({"max_train_steps", "num_train_epochs"})


def checkpoint_directory(output_dir: Path, step: int) -> Path:
    return output_dir / "checkpoints" / f"step-{step:08d}"


def complete_checkpoints(output_dir: Path, *, warn: bool = True) -> list[Path]:
    """All complete checkpoints of a run, the newest last; half-written ones are named in a warning and left alone.

    The newest is the one written last; where a run went on from an older checkpoint, those of the branch that it left
    count as older than its own, whatever their steps.
    """
    found = sorted(path for path in (output_dir / "checkpoints").glob("step-*") if path.suffix != UNFINISHED)
    complete = [path for path in found if (path / MARKER).is_file()]
    unfinished = [path.name for path in found if path not in complete]
    if unfinished and warn:
        logger.warning("Ignoring half-written checkpoints in %s: %s.", found[0].parent, ", ".join(unfinished))
    numbers: dict[Path, float] = {}
    for path in complete:  # one that cannot be read was written after the one before it
        numbers[path] = _noted(path).get("number", max(numbers.values(), default=0) + 0.5)
    newest = max(complete, key=lambda path: numbers[path], default=None)
    line = set() if newest is None else {newest.name, *_noted(newest).get("ancestors", ())}
    return sorted(complete, key=lambda path: (path.name in line, numbers[path]))


def _noted(checkpoint: Path) -> dict[str, Any]:
    """What the marker says; nothing where it cannot be read."""
    try:
        return read_json(checkpoint / MARKER)
    except (OSError, ValueError):
        return {}


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


def read_marker(checkpoint: Path) -> dict[str, Any]:
    """What a complete checkpoint says of itself.

    Raises:
        ValueError: a marker that cannot be read, of another format, or that of another step than its folder's.
    """
    marker = _read(checkpoint, MARKER, read_json)
    version = marker.get("format_version")
    remedy = "start again in another output_dir"
    require_format_version(version, FORMAT_VERSION, path=checkpoint / MARKER, remedy=remedy)
    _read(checkpoint, MARKER, lambda file: read_json(file, needs=NEEDS))
    if checkpoint.name.startswith("step-") and checkpoint.name != f"step-{marker['step']:08d}":
        raise _damaged(checkpoint, MARKER, f"it is that of step {marker['step']}")
    return marker


class Ancestry:
    """What a run is made of, compared with the checkpoint that it continues.

    What would make its steps, its data's order or its result those of another run is refused unless `allowed` names
    it; other images and other starting points are warned of.

    Args:
        checkpoint: a complete one, or None.
        facts: of this run: "arguments" (resolved), "global_batch_size", "world_size" and "extensions".
        allowed: names of arguments, or of what `identify` gets, that may differ.
        by_identity: arguments that name what is read: `identify` compares what is there.
        warn: False on all but one process.

    Attributes:
        step: optimizer steps done.
        skipped: {"in_a_row", "total", "steps"}: what the checkpoint's run counted.
        best: what the checkpoint's run noted of the best one, see `BestCheckpoint`.
        changes: [{"step", "name", "before", "after"}]: what was allowed to change, and when.
        loader: of the run's data; its `place`, where it has one, is kept.
    """

    def __init__(
        self,
        checkpoint: Path | None,
        facts: Mapping[str, Any],
        *,
        allowed: Sequence[str] = (),
        by_identity: Iterable[str] = (),
        warn: bool = True,
    ) -> None:
        self.checkpoint, self.facts, self.allowed, self.warn = checkpoint, facts, tuple(allowed), warn
        self._then = {} if checkpoint is None else read_marker(checkpoint)
        self._identities: dict[str, Any] = {}
        self.loader: Any = None
        self.step: int = self._then.get("step", 0)
        self.skipped: dict[str, int] = self._then.get("skipped", {})
        self.best: dict[str, Any] | None = self._then.get("best")
        self.changes: list[dict[str, Any]] = list(self._then.get("changes", ()))
        self._line = [] if checkpoint is None else [*self._then["ancestors"], checkpoint.name]
        if checkpoint is not None:
            self._say(logging.INFO, "Resuming from %s.", checkpoint)
            self._compare(HARMLESS | frozenset(by_identity))

    def identify(self, name: str, identity: Mapping[str, Any]) -> None:
        """Notes what something is that the run reads or trains, and compares that with the checkpoint.

        Args:
            name: "data", or of a module.
            identity: JSON values. Those of "data", and "learned" of a module (the weights that it began with, which
                the checkpoint's replace), are warned of.
        """
        now = json.loads(json.dumps(identity, default=str))
        self._identities[name] = now
        then = self._then.get("identities", {}).get(name, now)
        differing = [key for key in {**then, **now} if then.get(key) != now.get(key)]
        light = [key for key in differing if name == "data" or key == "learned"]
        if light:
            what = "data are not those" if name == "data" else f"{name} began with other weights than that"
            self._say(logging.WARNING, "The %s of %s (%s differs).", what, self.checkpoint, ", ".join(light))
        if heavy := [_difference(key, then.get(key), now.get(key)) for key in differing if key not in light]:
            self._consent({name: (f"{name} is not the one", ", ".join(heavy), None, None)})

    @property
    def place(self) -> list[int] | None:
        """Where the checkpoint's run read a stream; None where it read none, or another than this run."""
        then = self._then.get("identities", {}).get("stream")
        return self._then.get("place") if then == self._identities.get("stream") else None

    def record(self, *, skipped: Mapping[str, int], best: Mapping[str, Any] | None) -> dict[str, Any]:
        """What complete.json says beside the step."""
        own = {"identities": self._identities, "changes": self.changes, "skipped": dict(skipped), "best": best}
        stands = {"place": list(self.loader.place)} if hasattr(self.loader, "place") else {}
        return {**self.facts, **own, **stands, "ancestors": self._line}

    def wrote(self, checkpoint: Path) -> None:
        """Makes a checkpoint that the run wrote an ancestor of the next one."""
        self._line = [*(name for name in self._line if (checkpoint.parent / name).is_dir()), checkpoint.name]

    def _compare(self, ignored: frozenset[str]) -> None:
        then, now = ({**facts["arguments"], **facts} for facts in (self._then, self.facts))
        follows = {then.get("lr_scheduler"), now.get("lr_scheduler")} & {"linear", "cosine"}
        ignored |= frozenset({"arguments", "world_size"}) | (frozenset() if follows else LENGTH)
        pairs = {name: (then.get(name, after), after) for name, after in now.items() if name not in ignored}
        self._consent(
            {
                name: (f"{name} was {before!r}", f"it is {after!r} now", before, after)
                for name, (before, after) in pairs.items()
                if before != after
            }
        )
        if then["world_size"] != now["world_size"] and then["global_batch_size"] == now["global_batch_size"]:
            said = "Written by %d processes, continued by %d with the same global batch: equal up to rounding."
            self._say(logging.WARNING, said, then["world_size"], now["world_size"])

    def _consent(self, changes: Mapping[str, tuple[str, str, Any, Any]]) -> None:
        """Refuses changes that are not allowed, and notes those that are.

        Args:
            changes: by name; how it was, what is different now, and both values.
        """
        sentences = {
            name: f"{was} when {self.checkpoint} was written ({now})" for name, (was, now, *_) in changes.items()
        }
        if refused := [name for name in changes if name not in self.allowed]:
            raise ValueError(
                f"{'; '.join(sentences[name] for name in refused)}: the run would go on as another one. Give what the "
                "checkpoint has (its resolved_arguments.yaml), start again in another --output_dir, or, where that is "
                f"meant, say --allow_changes {' '.join(dict.fromkeys((*self.allowed, *refused)))}."
            )
        for name, (_, _, before, after) in changes.items():
            self._say(logging.WARNING, "%s: changed from step %d on, as allowed.", sentences[name], self.step)
            self.changes.append({"step": self.step, "name": name, "before": before, "after": after})

    def _say(self, level: int, message: str, *values: Any) -> None:
        if self.warn:
            logger.log(level, message, *values)


def _difference(key: str, before: Any, after: Any) -> str:
    """The entries of a config by name; of anything else, that it differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
        return f"its {key} differs in {', '.join(names)}"
    return f"its {key} differs"


def read_module(checkpoint: Path, name: str) -> dict[str, Any]:
    """The state of the module `name` in a checkpoint, on the CPU.

    Raises:
        ValueError: no such module there, or a file that cannot be read or is not the one that was written.
    """
    file = f"{name}.pt"
    if not (checkpoint / file).is_file():
        raise ValueError(f"{checkpoint} holds no {name!r}; it was written by a run without that module.")
    if hash_file(checkpoint / file) != read_marker(checkpoint)["files"].get(file):
        raise _damaged(checkpoint, file, f"its content is not what {MARKER} says")
    return _read(checkpoint, file, lambda path: torch.load(path, map_location="cpu", weights_only=True))


def _read(checkpoint: Path, name: str, load: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """`load` of a file of a checkpoint; where it fails, a ValueError that names the checkpoint to go back to."""
    try:
        return load(checkpoint / name)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes torch.load raise almost anything
        # Other messages than the system's advise to load without weights_only, which would run what the file says.
        raise _damaged(checkpoint, name, str(error) if isinstance(error, OSError) else type(error).__name__) from error


def _damaged(checkpoint: Path, name: str, reason: str) -> ValueError:
    older = [path for path in complete_checkpoints(checkpoint.parents[1], warn=False) if path.name < checkpoint.name]
    remedy = "There is no older one to resume from: start again in another --output_dir, or delete this one."
    if older:
        remedy = f"Resume from an older one by --resume_from_checkpoint {older[-1]}."
    return ValueError(f"{checkpoint / name} is damaged and cannot be read ({reason}). {remedy}")


def write_checkpoint(output_dir: Path, *, step: int, write: Callable[[Path], None], facts: dict[str, Any]) -> Path:
    """Calls `write(directory)` on a sibling, adds the marker, and renames.

    A kill at any moment leaves the earlier checkpoints and at most one directory ending in .tmp, which the next call
    removes.
    """
    target = checkpoint_directory(output_dir, step)
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in filter(is_leftover, list(target.parent.iterdir())):
        delete(leftover)
    present = complete_checkpoints(output_dir, warn=False)
    number = 1 + math.ceil(max((_noted(path).get("number", 0) for path in present), default=0))
    aside = temporary_sibling(target)
    aside.mkdir()
    try:
        with disk_trouble_explained(target, remedy="The earlier checkpoints are whole; resume from them afterwards."):
            write(aside)
            flush_tree(aside)
            files = {path.name: hash_file(path) for path in sorted(aside.iterdir())}
            own = {"format_version": FORMAT_VERSION, "step": step, "number": number, "files": files}
            write_json(aside / MARKER, {**facts, **own})
    except BaseException:
        delete(aside)
        raise
    replace_directory(aside, target)
    flush_to_disk(output_dir)
    return target


def delete_older(output_dir: Path, limit: int | None, *, keep: Path | None = None) -> None:
    """Deletes all complete checkpoints but the newest `limit`, at least 1, and `keep`; none where limit is None."""
    older = complete_checkpoints(output_dir, warn=False)[:-limit] if limit else []
    for path in older:
        if path != keep:
            delete(path)


def publish(output: OutputDirectory, save: Callable[[Path], None], *, keep: Iterable[str] = ()) -> None:
    """Runs `save(directory)` on a sibling and moves each entry to the root of `output`, the index files last.

    The index files of an earlier result go first, so that a kill in between leaves none rather than a mixture, and
    with it whatever that result had and this one has not.

    Args:
        keep: names in `output` that are not a result's.
    """
    aside = temporary_sibling(output.path / "result")
    aside.mkdir()
    try:
        with disk_trouble_explained(output.path, remedy="The checkpoints are whole: resume afterwards."):
            save(aside)
        share(aside)
        entries = sorted(aside.iterdir(), key=lambda path: (path.suffix == ".json", path.name))
        names = [path.name for path in entries]
        output.add(*names)
        output.delete(*FINISHED)
        output.delete(*(name for name in output.names if name not in (*names, *keep)))
        for path in entries:
            flush_tree(path)
            replace_directory(path, output.path / path.name)
    finally:
        delete(aside)
    flush_to_disk(output.path)
