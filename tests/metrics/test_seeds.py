"""Two arms over training seeds: the paired interval, and what is not ranked."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

import eqvae_command
from diffusers_eqvae.commands.compare import _draw
from diffusers_eqvae.metrics.result_card import PROTOCOLS, ResultCard
from diffusers_eqvae.metrics.seeds import compare_arms

PROTOCOL = dict.fromkeys(PROTOCOLS["generation"], "same")
BETTER = {"fid": "lower", "recall": "higher"}


def card(fid: float, recall: float = 0.5, *, model: str = "a", seed: int = 0, **protocol) -> ResultCard:
    settings = {"model": model, "seed": seed, "guidance_scale": 1.0}
    numbers = {"fid": fid, "recall": recall, "kid_std": fid}
    return ResultCard(numbers, PROTOCOL | protocol, settings, better=BETTER)


def arms(first: list[float], second: list[float], **options) -> dict[str, list[ResultCard]]:
    return {
        "plain": [card(fid, seed=seed) for seed, fid in enumerate(first)],
        "eq": [card(fid, model="b", seed=seed, **options) for seed, fid in enumerate(second)],
    }


def test_the_interval_is_students_on_the_pairs():
    """Differences -1, -2, -3: mean -2, std 1, t(.975, 2) = 4.3027; the spread of the seeds themselves cancels."""
    fid, recall, kid_std = compare_arms(arms([10.0, 50.0, 90.0], [9.0, 48.0, 87.0]))
    assert fid.mean == pytest.approx(-2) and fid.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert (fid.n, fid.verdict, recall.verdict) == (3, "inconclusive", "inconclusive")
    fid, _, kid_std = compare_arms(arms([10.0, 50.0, 90.0], [8.0, 48.0, 87.5]))
    assert (fid.verdict, kid_std.verdict) == ("better", "lower")  # of a spread neither is better
    assert compare_arms(arms([8.0, 48.0, 87.5], [10.0, 50.0, 90.0]))[0].verdict == "worse"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (arms([1.0], [2.0]), r"one card for each training seed, two or more.*got plain: 1, eq: 1"),
        (arms([1.0, 2.0], [2.0]), "equally many cards.*got plain: 2, eq: 1"),
        (arms([1.0, 2.0], [2.0, 3.0], reference_hash="other"), "reference_hash differs"),
        (arms([1.0, 2.0], [2.0, 3.0], feature_network_weights="other"), "feature_network_weights differs"),
    ],
)
def test_what_is_not_ranked(given, message):
    with pytest.raises(ValueError, match=message):
        compare_arms(given)


def test_pairs_have_the_same_noise():
    given = arms([1.0, 2.0], [2.0, 3.0])
    given["eq"][1].settings["seed"] = 7
    with pytest.raises(ValueError, match="Pair 2 of plain and eq differs in seed as well"):
        compare_arms(given)


def test_the_command_prints_a_table_and_draws_it(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    words = ["compare"]
    for name, cards in arms([10.0, 50.0, 90.0], [8.0, 48.0, 87.5]).items():
        words += ["--arm", name]
        for index, each in enumerate(cards):
            each.save(tmp_path / f"{name}.{index}.json")
            words.append(str(tmp_path / f"{name}.{index}.json"))
    assert eqvae_command.main([*words, "--output", str(tmp_path / "x.png")]) == 0
    shown = capsys.readouterr().out
    assert "fid      50     47.833  -2.17 +- 0.72  3  better" in shown
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    assert eqvae_command.main([*words[:4], "--arm", *words[-4:]]) == 1
    assert "got plain: 1, eq: 3" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        eqvae_command.main(["compare", words[3], words[4], "--output", "x.png"])
    assert "draws intervals, which only --arm has" in capsys.readouterr().err


def test_a_figure_that_the_first_arm_has_at_zero_keeps_its_row_in_the_drawing(monkeypatch, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    differences = compare_arms(arms([10.0, 50.0, 90.0], [8.0, 48.0, 87.5]))
    differences[1] = replace(differences[1], values=(0.0, 0.5), mean=0.5)
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    _draw(tmp_path / "x.png", ["plain", "eq"], differences)
    (axes,) = pyplot.gcf().axes
    rows = [label.get_text() for label in axes.get_yticklabels()]
    monkeypatch.undo()
    pyplot.close("all")
    assert [row.split(":")[0] for row in rows] == ["kid_std", "recall", "fid"]
    assert rows[1].endswith("(+0.5; plain is 0)") and "is 0" not in rows[0] + rows[2]
