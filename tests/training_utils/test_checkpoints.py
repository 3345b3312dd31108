"""A checkpoint is complete or it is not there."""

import json
import os

import pytest
import torch

from diffusers_eqvae.directories import LOCK, RECORD, OutputDirectory
from diffusers_eqvae.files import UNFINISHED
from diffusers_eqvae.training_utils import checkpoints
from diffusers_eqvae.training_utils.checkpoints import (
    Ancestry,
    complete_checkpoints,
    delete_older,
    find_checkpoint,
    publish,
    read_marker,
    read_module,
    write_checkpoint,
)

FACTS = {
    "global_batch_size": 8,
    "world_size": 1,
    "extensions": {},
    "arguments": {"learning_rate": 0.1, "logging_steps": 5},
}


def write(output_dir, step, *, limit=None, content="x"):
    path = write_checkpoint(
        output_dir,
        step=step,
        write=lambda directory: (directory / "weights").write_text(content) and None,
        facts=Ancestry(None, FACTS).record(skipped={}, best=None),
    )
    delete_older(output_dir, limit)
    return path


def test_limit_keeps_the_newest(tmp_path):
    for step in (5, 10, 15):
        write(tmp_path, step, limit=2)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000010", "step-00000015"]
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


def test_a_failure_while_writing_leaves_the_earlier_ones(tmp_path):
    write(tmp_path, 5)

    def fail(directory):
        (directory / "weights").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(tmp_path, step=10, write=fail, facts=FACTS)
    assert find_checkpoint("latest", tmp_path).name == "step-00000005"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]
    assert write(tmp_path, 10).name == "step-00000010"


def test_a_directory_without_marker_is_ignored_and_named(tmp_path, caplog):
    write(tmp_path, 5)
    (tmp_path / "checkpoints" / "step-00000009").mkdir()
    assert find_checkpoint("latest", tmp_path).name == "step-00000005"
    assert "step-00000009" in caplog.text
    with pytest.raises(ValueError, match=r"not a complete checkpoint.*step-00000005"):
        find_checkpoint("step-00000009", tmp_path)


def test_writing_a_step_again_replaces_it(tmp_path):
    write(tmp_path, 5, content="old")
    assert (write(tmp_path, 5, content="new") / "weights").read_text() == "new"


def test_a_fresh_run_does_not_mix_with_an_old_one(tmp_path):
    assert find_checkpoint(None, tmp_path) is None and find_checkpoint("latest", tmp_path) is None
    path = write(tmp_path, 5)
    with pytest.raises(ValueError, match="--resume_from_checkpoint latest"):
        find_checkpoint(None, tmp_path)
    assert find_checkpoint(str(path), tmp_path) == find_checkpoint("step-00000005", tmp_path) == path


@pytest.mark.parametrize("name", ["model_index.json", "config.json"])
@pytest.mark.parametrize("resume", [None, "latest"])
def test_a_finished_run_without_checkpoints_is_never_overwritten(tmp_path, name, resume):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="holds a finished run"):
        find_checkpoint(resume, tmp_path)


def test_a_run_stopped_before_its_first_checkpoint_starts_over_with_latest_only(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    assert find_checkpoint(None, tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}')
    assert find_checkpoint("latest", tmp_path) is None
    with pytest.raises(ValueError, match="wrote no checkpoint"):
        find_checkpoint(None, tmp_path)


@pytest.mark.parametrize(("version", "message"), [(None, "older than 3"), (4, "newer than 3: update")])
def test_another_format_is_refused_in_a_sentence(tmp_path, version, message):
    path = write(tmp_path, 5)
    marker = json.loads((path / "complete.json").read_text())
    (path / "complete.json").write_text(json.dumps({**marker, "format_version": version}))
    with pytest.raises(ValueError, match=message):
        read_marker(path)


def claimed(path, *names):
    output = OutputDirectory(path, kind="training run")
    output.claim(*names)
    return output


def test_publishing_replaces_and_keeps_the_rest(tmp_path):
    output = claimed(tmp_path, "vae", "metrics.jsonl", "discriminator")
    (tmp_path / "discriminator").mkdir()
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "old").write_text("old")
    (tmp_path / "metrics.jsonl").write_text("{}")

    def save(directory):
        (directory / "vae").mkdir()
        (directory / "vae" / "new").write_text("new")
        (directory / "model_index.json").write_text("{}")

    publish(output, save, keep=["metrics.jsonl"])
    output.release()
    assert sorted(path.name for path in tmp_path.iterdir()) == [RECORD, "metrics.jsonl", "model_index.json", "vae"]
    assert [path.name for path in (tmp_path / "vae").iterdir()] == ["new"]


def test_a_failing_save_publishes_nothing(tmp_path):
    output = claimed(tmp_path, "config.json")
    (tmp_path / "config.json").write_text("old")

    def save(directory):
        (directory / "config.json").write_text("new")
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        publish(output, save)
    assert (tmp_path / "config.json").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == [RECORD, LOCK, "config.json"]


def test_the_marker_is_written_last(tmp_path, monkeypatch):
    """All the data is on disk before the marker is written, and the marker before the directory takes its name."""
    order = []
    write_json = checkpoints.write_json
    monkeypatch.setattr(checkpoints, "flush_tree", lambda path: order.append(f"flush {path.suffix}"))
    monkeypatch.setattr(
        checkpoints, "write_json", lambda path, content: (order.append(path.name), write_json(path, content))
    )
    renamed = lambda source, target: (order.append("rename"), source.rename(target))  # noqa: E731
    monkeypatch.setattr(checkpoints, "replace_directory", renamed)
    path = write(tmp_path, 5)
    assert order == [f"flush {UNFINISHED}", "complete.json", "rename"]
    assert json.loads((path / "complete.json").read_text())["step"] == 5


def flipped(content):
    return content[:2000] + bytes([content[2000] ^ 1]) + content[2001:]


def test_a_damaged_file_is_named_with_the_checkpoint_to_go_back_to(tmp_path):
    def save(directory):
        torch.save({"module": {"weight": torch.randn(1000)}}, directory / "net.pt")

    first, second = (
        write_checkpoint(tmp_path, step=step, write=save, facts=Ancestry(None, FACTS).record(skipped={}, best=None))
        for step in (5, 10)
    )
    assert read_module(second, "net")["module"]["weight"].shape == (1000,)
    with pytest.raises(ValueError, match="holds no 'other'"):
        read_module(second, "other")
    whole = (second / "net.pt").read_bytes()
    for damaged in (b"", whole[:300], whole[:-1], bytes(len(whole)), b"a text\n" * 500, flipped(whole)):
        for path, remedy in ((second, f"by --resume_from_checkpoint {first}"), (first, "no older one")):
            (path / "net.pt").write_bytes(damaged)
            with pytest.raises(ValueError, match=f"{path}/net.pt is damaged.*{remedy}") as caught:
                read_module(path, "net")
            assert "weights_only=False" not in str(caught.value) and "\n" not in str(caught.value)
    (second / "complete.json").write_text('{"step"')
    with pytest.raises(ValueError, match=f"complete.json is damaged.*{first}"):
        read_marker(second)


def test_a_run_does_not_start_from_a_damaged_checkpoint(make_run, make_model, numbers):
    run = make_run(max_train_steps=4, checkpointing_steps=2)
    run.add("net", make_model())
    for batch in run.steps(run.loader(numbers())):
        run.backward(run.module("net")(batch["x"]).square().mean())
    first, second = complete_checkpoints(run.output_dir)
    (second / "net.pt").write_bytes((second / "net.pt").read_bytes()[:5000])
    with pytest.raises(ValueError, match=f"net.pt is damaged.*{first}"):
        make_run(resume_from_checkpoint="latest").add("net", make_model())
    resumed = make_run(resume_from_checkpoint=str(first))
    resumed.add("net", make_model())
    assert resumed.step == 2


def test_a_checkpoint_runs_no_code(tmp_path):
    class Command:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    def save(directory):
        torch.save({"module": Command()}, directory / "net.pt")

    path = write_checkpoint(tmp_path, step=5, write=save, facts=Ancestry(None, FACTS).record(skipped={}, best=None))
    with pytest.raises(ValueError, match="is damaged"):
        read_module(path, "net")
    assert not (tmp_path / "made").exists()
