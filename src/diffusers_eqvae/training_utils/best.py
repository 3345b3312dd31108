"""Which checkpoint of a run is the best so far, by a figure that it measures."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..metrics.base import Better
from .checkpoints import checkpoint_directory
from .optimization import OptimizedModule

logger = logging.getLogger(__name__)


class BestCheckpoint:
    """The best value yet of one measured figure, and the step it was measured at.

    Args:
        metric: its name; None keeps no checkpoint.
        noted: what the checkpoint that is resumed says, see `record`. Of another figure it does not count.
    """

    def __init__(self, metric: str | None, noted: Mapping[str, Any] | None) -> None:
        self.metric, self._better = metric, ""
        own = noted if noted is not None and noted["metric"] == metric else {}
        self.value: float | None = own.get("value")
        self.step: int | None = own.get("step")

    def require(self, measured: Mapping[str, Better], *, by: str) -> None:
        """Refuses a figure that is not measured, or of which neither more nor less is better.

        Args:
            measured: name -> which is better; empty where nothing is measured.
            by: the option that says how often something is.
        """
        if self.metric is None:
            return
        if not measured:
            raise ValueError(f"--keep_best {self.metric} needs measurements to choose by; give --{by}.")
        self._better = measured.get(self.metric) or ""
        if not self._better:
            names = ", ".join(sorted(name for name, better in measured.items() if better))
            raise ValueError(
                f"--keep_best must be one of the figures that --{by} measures: {names}; got {self.metric}."
            )

    def improves(self, step: int, values: Mapping[str, float], entries: Iterable[OptimizedModule]) -> bool:
        """Whether the weights after `step` steps are better than all before, and finite.

        Those of step 0 are not the run's.
        """
        if self.metric is None or step == 0:
            return False
        named = {name.rpartition("/")[2]: value for name, value in values.items()}
        if self.metric not in named:
            raise ValueError(
                f"--keep_best {self.metric} was not measured at step {step}; there were: {', '.join(named)}."
            )
        value, sign = named[self.metric], 1 if self._better == "higher" else -1
        if not math.isfinite(value) or (self.value is not None and sign * value <= sign * self.value):
            return False
        if not all(entry.is_finite() for entry in entries):
            return False
        self.value, self.step = value, step
        return True

    def checkpoint(self, output_dir: Path) -> Path | None:
        """Where it lies."""
        return None if self.step is None else checkpoint_directory(output_dir, self.step)

    def say(self, output_dir: Path) -> None:
        """Where the best one lies, for the log."""
        path = self.checkpoint(output_dir)
        if self.metric is not None and path is not None:
            said = "The best %s is %.6g, after step %d: eqvae export %s DESTINATION makes a result of it."
            logger.info(said, self.metric, self.value, self.step, path)

    def record(self) -> dict[str, Any] | None:
        """As JSON, for a checkpoint."""
        return None if self.step is None else {"metric": self.metric, "value": self.value, "step": self.step}
