"""What a run sends to the Hub: beside the training, and only what is whole."""

import threading
import types

import pytest
import torch

from diffusers_eqvae.training_utils.arguments import RunArguments
from diffusers_eqvae.training_utils.run import TrainingRun
from diffusers_eqvae.training_utils.uploads import Uploads


def test_pushes_on_the_way_need_pushing(make_run, caplog):
    make_run(push_every=5)
    assert "Without effect, since nothing is pushed without --push_to_hub: --push_every" in caplog.text


def test_pushes_on_the_way_run_beside_the_training_one_at_a_time(make_run, make_model, numbers, monkeypatch, caplog):
    """The first push hangs until the third is due, and fails; training does not wait and the weights are the same."""
    pushed, wait = [], threading.Event()

    def push(directory, repo_id, **options):
        message = options.pop("commit_message", None)
        if message == "Step 1":
            wait.wait(60)
        pushed.append((message, sorted(path.name for path in directory.iterdir() if path.is_file()), repo_id, options))
        return message is None

    def trained(**options):
        run = make_run(push_to_hub=True, hub_private=True, hub_revision="v2", hub_model_id="me/x", **options)
        model = make_model()
        wrapped = run.add("model", model)

        def save(directory):
            (directory / "config.json").write_text("{}")
            torch.rand(3)

        for batch in run.steps(run.loader(numbers())):
            if run.step == 3 and run.arguments.push_every:
                wait.set()
                run._uploads._running.join()
            run.push_meanwhile(save)
            run.backward(wrapped(batch["x"]).square().mean())
        run.finish(save)
        run.push()
        return run, torch.nn.utils.parameters_to_vector(model.parameters()).detach()

    monkeypatch.setattr("diffusers_eqvae.training_utils.uploads.push_run", push)
    run, after = trained(push_every=1)
    assert [message for message, *_ in pushed][:2] == ["Step 1", "Step 3"] and pushed[-1][0] is None
    assert pushed[0][1:] == (
        ["config.json", "metrics.jsonl"],
        "me/x",
        {"private": True, "revision": "v2", "hub_images": None},
    )
    assert "there is none of step 2" in caplog.text and not (run.output_dir / "pushed").exists()
    wait.set()
    assert torch.equal(after, trained(output_dir=str(run.output_dir) + "-silent")[1])


def test_a_run_goes_on_past_what_cannot_be_pushed_on_the_way(make_run, make_model, numbers, monkeypatch, caplog):
    pushed = []
    monkeypatch.setattr(
        "diffusers_eqvae.training_utils.uploads.push_run",
        lambda *args, **kw: pushed.append(kw["commit_message"]) or True,
    )
    run = make_run(push_to_hub=True, hub_model_id="me/x", push_every=1, max_train_steps=4)
    wrapped = run.add("model", make_model())

    def save(directory):
        if run.step == 1:
            raise OSError(28, "No space left on device")
        (directory / "config.json").write_text("{}")

    for batch in run.steps(run.loader(numbers())):
        if run.step == 2:
            with torch.no_grad():
                run.module("model")[0].weight.fill_(float("inf"))
        run.push_meanwhile(save)
        if run.step == 2:
            with torch.no_grad():
                run.module("model")[0].weight.fill_(0)
        run.backward(wrapped(batch["x"]).square().mean())
    run._uploads._running.join()
    assert pushed == ["Step 3"]
    assert "Nothing is pushed of step 1: [Errno 28] No space left on device." in caplog.text
    assert "Nothing is pushed of step 2: its weights are NaN or infinite." in caplog.text
    assert sorted(path.name for path in run.output_dir.glob(".*")) == [".eqvae.json", ".eqvae.lock"]


def test_a_finished_run_is_pushed_as_its_options_say(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        "diffusers_eqvae.training_utils.uploads.push_run", lambda *args, **kw: pushed.append((args, kw))
    )
    arguments = RunArguments(
        output_dir=str(tmp_path), push_to_hub=True, hub_model_id="me/x", hub_private=True, hub_revision="v2"
    )
    run = types.SimpleNamespace(arguments=arguments, is_main=True, _uploads=Uploads(tmp_path, arguments))
    with pytest.raises(SystemExit):  # None is not a push that worked
        TrainingRun.push(run)
    run.is_main = False
    TrainingRun.push(run)
    assert pushed == [((tmp_path, "me/x"), {"private": True, "revision": "v2", "hub_images": None})]
