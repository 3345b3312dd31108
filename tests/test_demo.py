"""The demo's stages: run once, side by side where they may be, and never taken for done when they failed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from diffusers_eqvae.demo.stages import DemoArguments, Stage, plan, read_arguments, run_lanes, wall_seconds

WRITES = """
import os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1]); folder.mkdir()
started = time.time(); time.sleep(float(sys.argv[2]))
(folder / "note").write_text(f"{started} {time.time()} {os.environ['OMP_NUM_THREADS']}")
sys.exit(int(sys.argv[3]))
"""


def stage(folder: Path, name: str, *, seconds: float = 0.0, status: int = 0) -> Stage:
    return Stage(name, "A stage.", ["-c", WRITES, str(folder / name), str(seconds), str(status)], folder / name)


def note(stage: Stage) -> list[float]:
    return [float(word) for word in (stage.directory / "note").read_text().split()]


def test_lanes_run_side_by_side_and_their_stages_in_order(tmp_path):
    first, second, other = stage(tmp_path, "a", seconds=0.5), stage(tmp_path, "b"), stage(tmp_path, "c", seconds=0.5)
    done = []
    run_lanes([[first, second], [other]], advance=lambda: done.append(1))
    assert len(done) == 3
    assert note(second)[0] > note(first)[1]
    assert note(other)[0] < note(first)[1] and note(first)[0] < note(other)[1]
    assert [note(each)[2] for each in (first, second, other)] == [1, 1, 1]
    alone = stage(tmp_path, "d")
    run_lanes([[alone]], advance=lambda: None)
    assert note(alone)[2] == 2
    longest = max(first.seconds + second.seconds, other.seconds)
    assert wall_seconds([[[first, second], [other]], [[alone]]]) == pytest.approx(longest + alone.seconds)


def test_a_stage_runs_again_only_with_other_words(tmp_path):
    once = stage(tmp_path, "a")
    once.run()
    before = note(once)
    once.run()
    assert note(once) == before
    changed = Stage("a", "A stage.", [*once.command, "more"], once.directory)
    changed.run()
    assert note(changed) != before

    follower = Stage("b", "A stage.", stage(tmp_path, "b").command, tmp_path / "b", after=once)
    follower.run()
    before = note(follower)
    follower.run()
    assert note(follower) == before
    Stage("b", "A stage.", follower.command, follower.directory, after=changed).run()
    assert note(follower) != before


def test_a_failing_stage_ends_the_demo_and_keeps_the_other_lane(tmp_path):
    failing, never, fine = stage(tmp_path, "a", status=3), stage(tmp_path, "b"), stage(tmp_path, "c")
    with pytest.raises(SystemExit, match="stage a failed"):
        run_lanes([[failing, never], [fine]], advance=lambda: None)
    assert not never.directory.exists() and not (failing.directory / "stage.json").exists()
    assert fine.seconds > 0


def test_the_branches_differ_in_the_regularizer_alone(tmp_path):
    waves = plan(DemoArguments(output_dir=str(tmp_path), train_data_dir="images"), tmp_path)
    _, (plain, eq), _ = waves
    flags = [dict(zip(lane[0].command[1::2], lane[0].command[2::2], strict=True)) for lane in (plain, eq)]
    differing = {flag for flag in flags[0].keys() | flags[1].keys() if flags[0].get(flag) != flags[1].get(flag)}
    assert differing == {"--output_dir", "--regularizers", "--p_equivariance", "--p_low_resolution"}
    assert len({json.dumps(stage.command) for lanes in waves for lane in lanes for stage in lane}) == 10


def test_help_names_the_command_and_speaks_to_its_user(capsys):
    program = sys.argv[0]
    with pytest.raises(SystemExit):
        read_arguments(["--help"])
    said = capsys.readouterr().out
    assert said.startswith("usage: eqvae demo [PRESET.yaml] [--flag value ...]\n\nRuns the whole line")
    assert "lane" not in said and sys.argv[0] == program


@pytest.mark.parametrize("flag", ["--dataset_name", "--dataset"])
def test_a_dataset_goes_to_every_stage_that_reads_images(flag, tmp_path):
    waves = plan(read_arguments([flag, "me/pets"]), tmp_path)
    commands = [stage.command for lanes in waves for lane in lanes for stage in lane]
    given = [command[command.index("--dataset_name") + 1] for command in commands if "--dataset_name" in command]
    assert given == ["me/pets"] * 5


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
