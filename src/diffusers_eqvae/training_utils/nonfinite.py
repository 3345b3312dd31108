"""NaN and infinity in training: steps that are skipped, weights that are not saved, and what is said of both."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from .optimization import OptimizedModule

logger = logging.getLogger(__name__)

CALMER = (
    "Lower --learning_rate or set --max_grad_norm, and continue with --resume_from_checkpoint latest --allow_changes "
    "learning_rate max_grad_norm."
)


class NonfiniteGuard:
    """Counts skipped steps on the device; the host looks only when it reads the logs.

    Args:
        in_a_row, total, steps: counted before, in the run that is resumed.

    Attributes:
        steps: counted in all, skipped or not.
    """

    def __init__(self, device: torch.device, *, in_a_row: int = 0, total: int = 0, steps: int = 0) -> None:
        self.steps = steps
        self._in_a_row = torch.tensor(float(in_a_row), device=device)
        self._total = torch.tensor(float(total), device=device)
        self._said = total

    def count(self, nonfinite: Tensor) -> None:
        self.steps += 1
        self._in_a_row = (self._in_a_row + nonfinite) * nonfinite
        self._total = self._total + nonfinite

    def read(self) -> tuple[int, int]:
        """(bad steps in a row up to now, bad steps in all); waits for the device."""
        in_a_row, total = torch.stack([self._in_a_row, self._total]).tolist()
        return int(in_a_row), int(total)

    def counts(self) -> dict[str, int]:
        """What a resumed run begins with."""
        in_a_row, total = self.read()
        return {"in_a_row": in_a_row, "total": total, "steps": self.steps}

    def say(self, step: int) -> None:
        """Warns of the steps that were skipped since it was last called."""
        _, total = self.read()
        if total > self._said:
            said = "%d of the steps up to %d were skipped: NaN or infinite (%d of the run's so far)."
            logger.warning(said, total - self._said, step, total)
        self._said = total


def require_finite(entries: Iterable[OptimizedModule], *, step: int, output_dir: Path) -> None:
    """Refuses weights that a step has made NaN or infinite although its gradients were finite."""
    broken = [entry.name for entry in entries if not entry.is_finite()]
    if broken:
        raise ValueError(
            f"The weights of {', '.join(broken)}, or their average, are NaN or infinite after step {step} and were "
            f"not saved; what {output_dir}/checkpoints holds is finite. {CALMER}"
        )


def too_many_in_a_row(in_a_row: int, *, step: int, output_dir: Path) -> ValueError:
    return ValueError(
        f"Loss or gradients were NaN or infinite in {in_a_row} steps in a row, up to step {step}. The weights are "
        f"untouched by them and saved in {output_dir}/checkpoints. Look for broken input. {CALMER}"
    )
