"""The checkpoints that a run writes, and which of them stay."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..directories import OutputDirectory
from .best import BestCheckpoint
from .checkpoints import Ancestry, delete_older, write_checkpoint
from .command_line import save_resolved
from .optimization import OptimizedModule

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes on the main process; the newest `limit` stay (None: all), and the best.

    Args:
        output: the run's directory, whose lock is held.
        ancestry: what the run is made of.
        arguments: resolved ones, kept beside the weights.

    Attributes:
        step: of the checkpoint that was written last, or is resumed.
    """

    def __init__(
        self,
        output: OutputDirectory,
        ancestry: Ancestry,
        *,
        best: BestCheckpoint,
        limit: int | None,
        arguments: dict[str, Any],
    ) -> None:
        self.output, self.ancestry, self.best, self.limit, self.arguments = output, ancestry, best, limit, arguments
        self.step = ancestry.step

    def write(self, step: int, entries: Iterable[OptimizedModule], *, skipped: Mapping[str, int]) -> None:
        """The state after `step` steps, unless it is there; deletes what neither is new nor the best."""
        self.output.require_lock()
        if self.step != step:

            def write(directory: Path) -> None:
                for entry in entries:
                    entry.save(directory)
                save_resolved(self.arguments, directory)

            facts = self.ancestry.record(skipped=skipped, best=self.best.record())
            path = write_checkpoint(self.output.path, step=step, write=write, facts=facts)
            self.ancestry.wrote(path)
            self.step = step
            logger.info("Checkpoint %s.", path)
        delete_older(self.output.path, self.limit, keep=self.best.checkpoint(self.output.path))
