"""The demo's stages: run once, side by side where they may be, and never taken for done when they failed."""

from __future__ import annotations

from pathlib import Path

import pytest

import eqvae_command
from diffusers_eqvae.demo.stages import DemoArguments, Stage, image_flags, plan, run_branches, wall_seconds

WRITES = """
import os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1]); folder.mkdir()
started = time.time(); time.sleep(float(sys.argv[2]))
(folder / "note").write_text(f"{started} {time.time()} {os.environ['OMP_NUM_THREADS']}")
sys.exit(int(sys.argv[3]))
"""


def stage(folder: Path, name: str, *, seconds: float = 0.0, status: int = 0) -> Stage:
    return Stage(name, ["-c", WRITES, str(folder / name), str(seconds), str(status)], folder / name)


def note(stage: Stage) -> list[float]:
    return [float(word) for word in (stage.directory / "note").read_text().split()]


def test_branches_run_side_by_side_and_their_stages_in_order(tmp_path):
    start, first, second = stage(tmp_path, "s"), stage(tmp_path, "a", seconds=0.5), stage(tmp_path, "b")
    other, done = stage(tmp_path, "c", seconds=0.5), []
    start.run()
    run_branches(start, [[first, second], [other]], advance=lambda: done.append(1))
    assert len(done) == 3
    assert note(second)[0] > note(first)[1]
    assert note(other)[0] < note(first)[1] and note(first)[0] < note(other)[1]
    assert [note(each)[2] for each in (start, first, second, other)] == [2, 1, 1, 1]
    seconds = {each.name: each.record["seconds"] for each in (start, first, second, other)}
    expected = seconds["s"] + max(seconds["a"] + seconds["b"], seconds["c"])
    assert wall_seconds(start, [[first, second], [other]]) == pytest.approx(expected)


def test_a_stage_runs_again_only_with_other_words_of_its_own_or_before_it(tmp_path):
    once, follower = stage(tmp_path, "a"), stage(tmp_path, "b")
    changed = Stage("a", [*once.command, "more"], once.directory)

    def runs(stage: Stage, *before: Stage) -> bool:
        earlier = note(stage) if stage.record else None
        stage.run(before)
        return note(stage) != earlier

    assert runs(once) and not runs(once)
    assert runs(follower, once) and not runs(follower, once)
    assert runs(changed) and not runs(changed)
    assert runs(follower, changed)


def test_a_failing_stage_ends_the_demo_and_keeps_the_other_branch(tmp_path):
    start, failing, never = stage(tmp_path, "s"), stage(tmp_path, "a", status=3), stage(tmp_path, "b")
    fine = stage(tmp_path, "c")
    with pytest.raises(SystemExit, match="stage a failed"):
        run_branches(start, [[failing, never], [fine]], advance=lambda: None)
    assert not never.directory.exists() and not failing.record
    assert fine.record["seconds"] > 0


def test_the_branches_differ_in_the_regularizer_alone(tmp_path):
    arguments = DemoArguments(output_dir=str(tmp_path), train_data_dir="images")
    first, (plain, eq) = plan(arguments, *image_flags(arguments))
    flags = [dict(zip(each[0].command[1::2], each[0].command[2::2], strict=True)) for each in (plain, eq)]
    differing = {flag for flag in flags[0].keys() | flags[1].keys() if flags[0].get(flag) != flags[1].get(flag)}
    assert differing == {"--output_dir", "--regularizers", "--p_equivariance", "--p_low_resolution"}
    assert len({tuple(stage.command) for stage in (first, *plain, *eq)}) == 10


def test_help_names_the_command_and_speaks_to_its_user(capsys):
    with pytest.raises(SystemExit):
        eqvae_command.main(["demo", "--help"])
    said = capsys.readouterr().out
    assert said.startswith("usage: eqvae demo [PRESET] [--flag value ...]\n\nRuns the whole line")
    assert "branch" not in said


@pytest.mark.parametrize("flag", ["--dataset_name", "--dataset"])
def test_a_dataset_goes_to_every_stage_that_reads_images(flag, monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(Stage, "run", lambda stage, *_, **__: commands.append(stage.command))
    monkeypatch.setattr("diffusers_eqvae.demo.stages.write_report", lambda *_, **__: None)
    monkeypatch.setattr("diffusers_eqvae.demo.stages.wall_seconds", lambda *_: 0.0)
    assert eqvae_command.main(["demo", flag, "me/pets", "--output_dir", str(tmp_path)]) == 0
    given = [command[command.index("--dataset_name") + 1] for command in commands if "--dataset_name" in command]
    assert given == ["me/pets"] * 5 and len(commands) == 10


def test_images_interrupted_halfway_are_written_again(tmp_path, monkeypatch):
    pytest.importorskip("skimage")
    from PIL import Image

    from diffusers_eqvae.demo.photographs import PHOTOGRAPHS, write_photographs

    def write() -> Path:
        return write_photographs(tmp_path / "train", per_class=1, side_px=8, seed=0)

    save, saved = Image.Image.save, []

    def save_two(image, path):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(path)
        save(image, path)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", save_two)
        with pytest.raises(KeyboardInterrupt):
            write()
    assert not (tmp_path / "train").exists()
    assert len(list(write().rglob("*.png"))) == len(PHOTOGRAPHS)
    assert [path.name for path in tmp_path.iterdir()] == ["train"]
