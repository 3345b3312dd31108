"""`eqvae export`: the weights of a checkpoint, averaged or not, as a pipeline that loads."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from diffusers_eqvae.commands.export import main
from diffusers_eqvae.pipelines.pipeline_class_conditional import ClassConditionalPipeline
from diffusers_eqvae.training_utils.checkpoints import MARKER

from ..invariants.test_transformer_trajectories import store, train  # noqa: F401


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_a_checkpoint_becomes_a_pipeline(tmp_path, store, capsys):  # noqa: F811
    train(store, tmp_path / "run", checkpoints_total_limit=5)
    run, step = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00000005"
    saved = torch.load(step / "objective.pt", weights_only=True)
    for weights, part in (("ema", "ema"), ("model", "module")):
        main([str(step), str(tmp_path / weights), "--weights", weights])
        state = ClassConditionalPipeline.from_pretrained(tmp_path / weights).transformer.state_dict()
        for name, weight in state.items():
            assert torch.equal(weight, saved[part][f"model.{name}"]), f"{part} {name}"
        facts = json.loads((tmp_path / weights / "run_metadata.json").read_text())
        assert facts["training"]["optimizer_steps"] == 5
        assert (facts["training"].get("ema_decay") is None) == (weights == "model")
    main([str(run), str(tmp_path / "newest"), "--with_code"])
    assert f"{tmp_path}/newest-code holds the same with its classes" in capsys.readouterr().out
    assert list((tmp_path / "newest-code").glob("*.py"))
    newest = ClassConditionalPipeline.from_pretrained(tmp_path / "newest").transformer.state_dict()
    finished = ClassConditionalPipeline.from_pretrained(run).transformer.state_dict()
    assert all(map(torch.equal, newest.values(), finished.values()))
    for source, message in (
        (tmp_path / "ema", "is neither a complete checkpoint nor"),
        (tmp_path / "x", "is neither"),
    ):
        with pytest.raises(ValueError, match=message):
            main([str(source), str(tmp_path / "other")])


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (b"- a\n", "arguments.yaml holds a list"),
        (b"", "does not say use_ema.*restore it from resolved_arguments.json"),
        (b"model: sit_s_2\n", "does not say use_ema"),
        (b"a: [1", "arguments.yaml is not YAML"),
        (b"\xff\xfe\x00", "arguments.yaml is not YAML"),
    ],
    ids=["a list", "nothing", "cut short", "no YAML", "no text"],
)
def test_arguments_that_no_run_wrote_are_refused_by_name(written, said, tmp_path, store):  # noqa: F811
    run = tmp_path / "run"
    (run / "checkpoints" / "step-00000002").mkdir(parents=True)
    (run / "checkpoints" / "step-00000002" / MARKER).write_text("{}")
    (run / "resolved_arguments.yaml").write_bytes(written)
    with pytest.raises(ValueError, match=said):
        main([str(run / "checkpoints" / "step-00000002"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_exported_over_itself(tmp_path, store):  # noqa: F811
    train(store, tmp_path / "run")
    before = (tmp_path / "run" / "resolved_arguments.yaml").read_bytes()
    for destination in (tmp_path / "run", tmp_path):
        with pytest.raises(ValueError, match=r"which is read here .*never written to: choose another place"):
            main([str(tmp_path / "run"), str(destination)])
    assert (tmp_path / "run" / "resolved_arguments.yaml").read_bytes() == before
