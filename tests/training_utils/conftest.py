"""A tiny run: a regression whose data, model and arguments a test can change."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from diffusers_eqvae.training_utils.arguments import RunArguments
from diffusers_eqvae.training_utils.run import TrainingRun


class Numbers:
    """Examples {"x": (8,)} that depend on their index only; those in `broken` are NaN."""

    def __init__(self, length: int = 64, broken: frozenset[int] = frozenset()) -> None:
        self.length, self.broken = length, broken

    def __len__(self) -> int:
        return self.length

    def get(self, index, generator=None):
        x = torch.randn(8, generator=torch.Generator().manual_seed(index))
        return {"x": x * float("nan") if index in self.broken else x}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps its settings for the life of a process; each test starts without."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def numbers():
    return Numbers


@pytest.fixture
def make_run(tmp_path):
    """A run in tmp_path; keyword arguments are those of `RunArguments`."""

    def build(**options) -> TrainingRun:
        defaults = {"output_dir": str(tmp_path / "run"), "report_to": "none", "train_batch_size": 4}
        defaults |= {"max_train_steps": 6, "checkpointing_steps": 0, "logging_steps": 1, "learning_rate": 1e-2}
        return TrainingRun(RunArguments(**{**defaults, **options}), name="test")

    return build


@pytest.fixture
def make_model():
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 8))

    return build
