"""What reaches the tracker that --report_to names, and what happens where it is not installed."""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from accelerate import tracking
from accelerate.utils import LoggerType


class StubWandb(ModuleType):
    """Records what accelerate calls; stands for the module and for its run."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.options: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0
        self.config = self

    def init(self, **options: Any) -> StubWandb:
        self.options = options
        return self

    def update(self, values: dict[str, Any], allow_val_change: bool) -> None:
        self.settings |= values

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def Image(self, levels: np.ndarray) -> np.ndarray:
        return levels

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch) -> StubWandb:
    stub = StubWandb()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.WANDB])
    return stub


def train(run, model, dataset, *, factor: float = 1.0) -> None:
    wrapped = run.add("model", model)
    for batch in run.steps(run.loader(dataset)):
        loss = factor * wrapped(batch["x"]).square().mean()
        run.backward(loss)
        run.log({"loss": loss})
        if run.due(2):
            run.log_images("ramp", np.full((3, 4, 6, 3), 10 * run.step, np.uint8))


def test_wandb_gets_scalars_and_images_and_is_closed(wandb, make_run, make_model, numbers):
    run = make_run(report_to="wandb", max_train_steps=3)
    train(run, make_model(), numbers())
    assert wandb.options == {"project": "test", "dir": str(run.output_dir / "logs"), "name": "run"}
    assert wandb.settings["learning_rate"] == 1e-2
    scalars = {step: values for step, values in wandb.logged if "loss" in values}
    assert sorted(scalars) == [1, 2, 3] and all(
        math.isfinite(values["loss"]) and values["learning_rate"] > 0 for values in scalars.values()
    )
    ((step, images),) = [(step, values["ramp"]) for step, values in wandb.logged if "ramp" in values]
    assert step == 2 and np.array_equal(images, np.full((3, 4, 6, 3), 20))
    assert not wandb.finished
    run.finish(lambda directory: (directory / "done").write_text("") and None)
    assert wandb.finished == 1


def test_wandb_is_closed_where_a_run_gives_up(wandb, make_run, make_model, numbers):
    with pytest.raises(ValueError, match="NaN or infinite"):
        train(make_run(report_to="wandb", max_nonfinite_steps=2), make_model(), numbers(), factor=math.nan)
    assert wandb.finished == 1


def test_all_are_those_that_are_installed(wandb, make_run, make_model, numbers):
    run = make_run(report_to="all", tracker_project_name="mine", max_train_steps=3)
    train(run, make_model(), numbers())
    assert wandb.options["project"] == "mine" and [step for step, values in wandb.logged if "loss" in values] == [
        1,
        2,
        3,
    ]
    assert [tracker.name for tracker in run.accelerator.trackers] == ["wandb"]


def test_all_needs_one(make_run, monkeypatch):
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.MLFLOW])
    with pytest.raises(ValueError, match="--report_to all needs a package: pip install tensorboard"):
        make_run(report_to="all")


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "trackio"])
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_tracker_that_is_not_installed_is_refused_at_the_start(name, dry_run, make_run, monkeypatch, tmp_path):
    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(ValueError, match=f"--report_to {name} needs a package: pip install {name}"):
        make_run(report_to=name, dry_run=dry_run)
    assert not list(tmp_path.iterdir())
    make_run(report_to="none")
