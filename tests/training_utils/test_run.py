"""TrainingRun: what happens between the lines of a training script."""

import json
import math
import os
import re
import shutil
import signal
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusers_eqvae.training_utils.run import TrainingRun


def train(run: TrainingRun, model, dataset, *, stop_after=None):
    wrapped = run.add("model", model, ema=True)
    for batch in run.steps(run.loader(dataset)):
        noise = run.randomness.randn(batch["x"].shape)
        loss = (wrapped(batch["x"] + 0.1 * noise) - batch["x"]).square().mean()
        run.backward(loss)
        run.log({"loss": loss})
        if run.step == stop_after:
            break
    return model


def weights(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()]).clone()


def metrics(run):
    return [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]


def test_two_runs_with_one_seed_are_equal_and_with_two_are_not(make_run, make_model, numbers, tmp_path):
    results = []
    for number, seed in enumerate((0, 0, 1)):
        run = make_run(seed=seed, output_dir=str(tmp_path / f"run{number}"))
        results.append(weights(train(run, make_model(), numbers())))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_resumed_run_draws_the_same_dropout(make_run, make_model, numbers):
    """What a module draws from the global generators is reproduced too."""
    whole = weights(train(make_run(checkpointing_steps=3, checkpoints_total_limit=None), make_model(), numbers()))
    resumed = make_run(resume_from_checkpoint="step-00000003")
    torch.rand(7)
    assert resumed.step == 3 and torch.equal(weights(train(resumed, make_model(), numbers())), whole)
    saved = json.loads((resumed.output_dir / "resolved_arguments.json").read_text())
    assert saved["resume_from_checkpoint"] is None  # the preset repeats the run instead of opening it again


def test_nan_batch_leaves_weights_bit_equal_and_the_next_step_continues(make_run, make_model, numbers):
    run = make_run(train_batch_size=8, max_train_steps=6)
    dataset, model, seen = numbers(48), make_model(), []
    wrapped = run.add("model", model, ema=True)
    for batch in run.steps(run.loader(dataset)):
        seen.append(weights(model))
        x = batch["x"] * float("nan") if run.step == 3 else batch["x"]
        run.backward((wrapped(x) - x).square().mean())
    seen.append(weights(model))
    moved = [not torch.equal(before, after) for before, after in pairwise(seen)]
    assert moved == [True, True, True, False, True, True]
    assert all(torch.isfinite(state).all() for state in seen)
    assert torch.isfinite(weights(run.averaged("model"))).all()
    assert metrics(run)[-1]["nonfinite_steps"] == 1 and metrics(run)[3]["gradient_norm/model"] is None


def test_endless_nan_stops_with_a_finite_emergency_checkpoint(make_run, make_model, numbers):
    run = make_run(max_train_steps=50, max_nonfinite_steps=3, logging_steps=2)
    with pytest.raises(ValueError, match=r"4 steps in a row.*latest"):
        train(run, make_model(), numbers(64, broken=frozenset(range(64))))
    saved = torch.load(run.output_dir / "checkpoints" / "step-00000004" / "model.pt", weights_only=True)
    assert all(torch.isfinite(tensor).all() for tensor in saved["module"].values())


def test_a_nan_loss_with_finite_gradients_is_skipped_too(make_run, make_model, numbers, caplog):
    """L1 passes no gradient where the output is NaN; the other terms must not train alone."""
    run = make_run(max_train_steps=3)
    model = make_model()
    wrapped, seen = run.add("model", model), []
    for batch in run.steps(run.loader(numbers())):
        seen.append(weights(model))
        output = wrapped(batch["x"])
        broken = output.detach() * (float("nan") if run.step == 1 else 1.0)
        loss = F.l1_loss(output - output.detach() + broken, batch["x"])
        assert torch.isfinite(loss) == (run.step != 1)
        run.backward(loss + weight_decay(model))
    seen.append(weights(model))
    assert [not torch.equal(before, after) for before, after in pairwise(seen)] == [True, False, True]
    assert metrics(run)[-1]["nonfinite_steps"] == 1
    assert "steps up to 2 were skipped" in caplog.text


def weight_decay(model):
    return sum(parameter.square().sum() for parameter in model.parameters())


def test_a_run_that_never_stepped_publishes_nothing(make_run, make_model, numbers):
    run = make_run(max_train_steps=2, max_nonfinite_steps=20)
    train(run, make_model(), numbers(64, broken=frozenset(range(64))))
    with pytest.raises(ValueError, match="2 steps in a row"):
        run.finish(lambda directory: (directory / "config.json").write_text("{}"))
    assert not (run.output_dir / "config.json").exists()
    assert (run.output_dir / "checkpoints" / "step-00000002").is_dir()


def test_two_modules_step_on_their_own_gradients_only(make_run, make_model, numbers):
    """A discriminator that starts at step 2: untouched before, then trained through `inputs`, the generator not."""
    run = make_run(max_train_steps=4)
    generator, discriminator = make_model(), nn.Linear(8, 1)
    wrapped = run.add("generator", generator, ema=True)
    judge = run.add("discriminator", discriminator, optimizer="adam", betas=(0.5, 0.9))
    history = []
    for batch in run.steps(run.loader(numbers())):
        history.append(weights(discriminator))
        output = wrapped(batch["x"])
        run.backward((output - batch["x"]).square().mean(), retain_graph=True)
        before = [parameter.grad.clone() for parameter in generator.parameters()]
        if run.step >= 2:
            run.backward(judge(output).mean(), inputs=list(discriminator.parameters()))
        assert all(torch.equal(old, new.grad) for old, new in zip(before, generator.parameters(), strict=True))
    history.append(weights(discriminator))
    moved = [not torch.equal(before, after) for before, after in pairwise(history)]
    assert moved == [False, False, True, True]


def test_a_loop_without_backward_is_an_error(make_run, make_model, numbers):
    run = make_run()
    run.add("model", make_model())
    with pytest.raises(RuntimeError, match=r"run\.backward"):
        list(run.steps(run.loader(numbers())))


def test_clipping_limits_the_update(make_run, make_model, numbers):
    run = make_run(max_grad_norm=1e-3, max_train_steps=1)
    seen = {}
    original = run._optimize

    def spy():
        original_clip = run.modules["model"].clip

        def clip(max_norm, norm):
            original_clip(max_norm, norm)
            seen["norm"] = run.modules["model"].gradient_norm().item()

        run.modules["model"].clip = clip
        original()

    run._optimize = spy
    train(run, make_model(), numbers())
    assert seen["norm"] == pytest.approx(1e-3, rel=1e-3)


def test_due_fires_once_per_multiple_even_with_accumulation(make_run, make_model, numbers):
    run = make_run(gradient_accumulation_steps=3, max_train_steps=7)
    wrapped, fired = run.add("model", make_model()), []
    for batch in run.steps(run.loader(numbers())):
        fired += [run.step] if run.due(2) else []
        run.backward(wrapped(batch["x"]).square().mean())
    assert fired == [2, 4, 6] and not run.due(0) and not run.due(None)


def test_validation_restores_modes_and_random_numbers(make_run, make_model, numbers):
    run = make_run()
    model = make_model()
    model[2].eval()
    run.add("model", model)
    run.randomness.at(0, 0)
    torch.manual_seed(0)
    expected = run.randomness.rand((2,)), torch.rand(2)
    run.randomness.at(0, 0)
    torch.manual_seed(0)
    with run.validation():
        assert not model.training and not torch.is_grad_enabled()
        torch.rand(5), run.randomness.rand((2,))
    assert model.training and not model[2].training
    assert torch.equal(run.randomness.rand((2,)), expected[0]) and torch.equal(torch.rand(2), expected[1])


def test_epochs_become_steps_and_logs_hold_means(make_run, make_model, numbers):
    run = make_run(max_train_steps=None, num_train_epochs=2, train_batch_size=8, logging_steps=3)
    train(run, make_model(), numbers(20))
    assert run.step == run.max_train_steps == 5
    assert [line["step"] for line in metrics(run)] == [3, 5]
    assert {"loss", "learning_rate", "images_per_second", "data_wait", "ema_distance/model"} <= metrics(run)[-1].keys()


def test_a_run_resumed_at_a_validation_step_writes_its_figures_once(make_run, make_model, numbers):
    """Also where it was killed between the checkpoint and the validation."""

    def validated(run):
        wrapped = run.add("model", make_model())
        for batch in run.steps(run.loader(numbers())):
            if run.due(2):
                run.log_figures({"validation/psnr": 20.0})
            run.backward(wrapped(batch["x"]).square().mean())
        return [line["step"] for line in metrics(run) if "validation/psnr" in line]

    run = make_run(checkpointing_steps=2, checkpoints_total_limit=None)
    assert validated(run) == [2, 4]
    whole = [line["step"] for line in metrics(run)]
    for checkpoint in ("step-00000004", "step-00000002"):
        resumed = make_run(resume_from_checkpoint=checkpoint, checkpointing_steps=2, checkpoints_total_limit=None)
        assert validated(resumed) == [2, 4] and [line["step"] for line in metrics(resumed)] == whole
    path = run.output_dir / "metrics.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if "validation" not in line))
    assert validated(make_run(resume_from_checkpoint="step-00000004")) == [4]


def test_images_become_a_grid(make_run, make_model, numbers):
    from PIL import Image

    run = make_run(report_to="tensorboard")
    train(run, make_model(), numbers(), stop_after=3)
    run.log_images("ramp", np.full((3, 4, 6, 3), 200, np.uint8))
    image = np.asarray(Image.open(run.output_dir / "validation" / "00000003_ramp.png"))
    assert image.shape == (8, 12, 3) and (image == 200).mean() == 0.75
    with pytest.raises(TypeError, match="uint8"):
        run.log_images("ramp", np.zeros((3, 4, 6, 3)))
    run.finish(lambda directory: (directory / "done").write_text("") and None)
    assert (run.output_dir / "done").exists() and list((run.output_dir / "logs").rglob("events*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_at_the_step_boundary_and_exits_cleanly(make_run, make_model, numbers, number, caplog):
    caplog.set_level("INFO")
    run = make_run(max_train_steps=50)
    wrapped = run.add("model", make_model())
    with pytest.raises(SystemExit) as stopped:
        for batch in run.steps(run.loader(numbers())):
            run.backward(wrapped(batch["x"]).square().mean())
            if run.step == 4:
                os.kill(os.getpid(), number)
    assert stopped.value.code == 75
    assert (run.output_dir / "checkpoints" / "step-00000005" / "complete.json").is_file()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert f"Stopped by {signal.Signals(number).name} after step 5;" in caplog.text


def test_a_run_whose_hours_are_over_stops_as_by_a_signal_and_goes_on(make_run, make_model, numbers, monkeypatch):
    """Hours count from the start of the program, and each start takes at least a step."""
    clock = [0.0]
    monkeypatch.setattr("diffusers_eqvae.training_utils.launch.time.monotonic", lambda: clock[0])

    def start(**options):
        run, clock_per_step = make_run(max_train_steps=5, **options), 3600 * 0.25
        wrapped = run.add("model", model := make_model())
        for batch in run.steps(run.loader(numbers())):
            run.backward(wrapped(batch["x"]).square().mean())
            clock[0] += clock_per_step
        return run, model

    stops = []
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            start(max_hours=0.5, resume_from_checkpoint="latest")
        stops.append(stopped.value.code)
    resumed, parts = start(max_hours=0.5, resume_from_checkpoint="latest")
    assert stops == [75, 75] and resumed.step == 5
    whole = start(output_dir=str(resumed.output_dir) + "-whole")[1]
    assert all(map(torch.equal, parts.parameters(), whole.parameters()))


@pytest.mark.parametrize("hours", [0, -1, math.inf, math.nan])
def test_hours_are_a_time_that_passes(make_run, hours):
    with pytest.raises(ValueError, match=r"max_hours must be (positive|finite)"):
        make_run(max_hours=hours)


def test_dry_run_writes_nothing_and_says_what_is_needed(make_run, make_model, numbers, capsys):
    run = make_run(dry_run=True, report_to="tensorboard", train_batch_size=32, resume_from_checkpoint="latest")
    with pytest.raises(SystemExit) as stopped:
        train(run, make_model(), numbers())
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and not run.output_dir.exists()
    assert "activations" in text and "Disk per checkpoint" in text and "micro-batch of 32" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mixed_precision": "fp16"}, "65504"), ({"resume_from_checkpoint": "nowhere"}, "not a complete checkpoint")],
)
def test_refused_at_start(make_run, options, message):
    with pytest.raises(ValueError, match=message):
        make_run(**options)


def test_unwritable_output_is_refused_at_start(make_run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run cannot be written: .*file is not a directory"):
        make_run(output_dir=str(tmp_path / "file" / "run"))


def test_an_average_that_cannot_follow_is_said(make_run, make_model, numbers, caplog):
    train(make_run(ema_decay=0.9999), make_model(), numbers(), stop_after=1)
    assert any("of the average will be the weights it started from" in message for message in caplog.messages)
    caplog.clear()
    train(make_run(ema_decay=0.5, resume_from_checkpoint="latest"), make_model(), numbers(), stop_after=1)
    assert not any("average" in message for message in caplog.messages)


def measured_run(make_run, make_model, dataset, values, *, stop_after=None, **options):
    """A run whose figure after step i is values[i], and which keeps the best."""
    run = make_run(checkpointing_steps=1, checkpoints_total_limit=1, keep_best="psnr", **options)
    run.best.require({"psnr": "higher", "fid": "lower"}, by="validation_steps")
    wrapped = run.add("model", make_model())
    for batch in run.steps(run.loader(dataset)):
        run.log_figures({"validation/psnr": values[run.step]})
        if run.step == stop_after:
            break
        run.backward(wrapped(batch["x"]).square().mean())
    return run


def checkpoints(run):
    return {path.name: (path / "complete.json").read_text() for path in (run.output_dir / "checkpoints").iterdir()}


def test_the_best_checkpoint_stays_and_a_resumed_run_keeps_the_same(make_run, make_model, numbers, tmp_path):
    values = [99.0, 1.0, 3.0, math.nan, 2.0, 3.0]  # before the first step it is not the run's
    whole = measured_run(make_run, make_model, numbers(), values, output_dir=str(tmp_path / "whole"))
    assert (whole.best.value, whole.best.step) == (3.0, 2)
    assert sorted(checkpoints(whole)) == ["step-00000002", "step-00000006"]
    for stop_after in (2, 4):  # where the best has just been measured, and where it has been for a while
        measured_run(make_run, make_model, numbers(), values, stop_after=stop_after, output_dir=str(tmp_path / "run"))
        options = {"output_dir": str(tmp_path / "run"), "resume_from_checkpoint": "latest"}
        resumed = measured_run(make_run, make_model, numbers(), values, **options)
        assert (resumed.best.value, resumed.best.step) == (3.0, 2)
        assert sorted(checkpoints(resumed)) == ["step-00000002", "step-00000006"]
        noted = [json.loads(checkpoints(each)["step-00000006"])["best"] for each in (whole, resumed)]
        assert noted == [{"metric": "psnr", "value": 3.0, "step": 2}] * 2
        shutil.rmtree(tmp_path / "run")


def test_the_best_is_a_checkpoint_where_no_other_is_written(make_run, make_model, numbers):
    run = make_run(keep_best="fid", checkpoints_total_limit=1)
    run.best.require({"fid": "lower"}, by="evaluation_steps")
    wrapped = run.add("model", make_model())
    for batch in run.steps(run.loader(numbers())):
        run.log_figures({"evaluation/fid": [9.0, 5.0, 4.0, 4.0, 6.0, 4.5][run.step]})
        run.backward(wrapped(batch["x"]).square().mean())
    assert [path.name for path in (run.output_dir / "checkpoints").iterdir()] == ["step-00000002"]


def test_weights_that_are_not_finite_are_not_the_best(make_run, make_model, numbers):
    """Whatever is measured of them: the figure is of one module's average, and another may be broken."""
    run = make_run(keep_best="psnr", checkpointing_steps=0, max_train_steps=3)
    run.best.require({"psnr": "higher"}, by="validation_steps")
    wrapped, other = run.add("model", make_model()), make_model()
    run.add("other", other)
    with pytest.raises(ValueError, match="weights of other, or their average, are NaN"):
        for batch in run.steps(run.loader(numbers())):
            if run.step == 2:
                with torch.no_grad():
                    next(other.parameters()).fill_(math.nan)
            run.log_figures({"psnr": float(run.step)})
            run.backward(wrapped(batch["x"]).square().mean())
        run.save_checkpoint()
    assert [path.name for path in (run.output_dir / "checkpoints").iterdir()] == ["step-00000001"]


REFUSED = [
    ("psnr", {}, "--keep_best psnr needs measurements to choose by; give --validation_steps."),
    ("ssim", {"psnr": "higher"}, "--keep_best must be one of the figures that --validation_steps measures: psnr; got"),
    ("latent_std", {"psnr": "higher", "latent_std": None}, "measures: psnr; got latent_std"),
]


@pytest.mark.parametrize(("metric", "measured", "said"), REFUSED)
def test_a_figure_that_is_not_measured_or_has_no_direction_is_refused(make_run, metric, measured, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        make_run(keep_best=metric).best.require(measured, by="validation_steps")
