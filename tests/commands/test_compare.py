"""`eqvae compare` through its command line: what it takes, and what it writes."""

from __future__ import annotations

import pytest
from PIL import Image

import eqvae_command
from diffusers_eqvae.metrics.result_card import PROTOCOLS, ResultCard


@pytest.fixture
def arms(tmp_path):
    """The words of two arms of two cards each."""
    protocol = dict.fromkeys(PROTOCOLS["reconstruction"], "same")
    words = []
    for arm, base in (("plain", 24.0), ("eq", 25.0)):
        words += ["--arm", arm]
        for seed in range(2):
            card = ResultCard({"psnr": base + seed / 10}, protocol, {"model": arm}, task="reconstruction")
            card.save(tmp_path / f"{arm}.{seed}.json")
            words.append(str(tmp_path / f"{arm}.{seed}.json"))
    return words


def test_the_intervals_are_drawn_where_they_are_wanted(arms, tmp_path):
    output = tmp_path / "new" / "x.png"
    for _ in range(2):  # the second time over its own
        assert eqvae_command.main(["compare", *arms, "--output", str(output)]) == 0
    with Image.open(output) as image:
        assert image.format == "PNG"
    assert [path.name for path in output.parent.iterdir()] == ["x.png"]


@pytest.mark.parametrize(
    ("repeated", "named"), [((2, 3), "plain.0.json"), ((2, 6), "plain.0.json")], ids=["in an arm", "in both"]
)
def test_a_card_is_one_seed_of_one_arm(arms, repeated, named, capsys):
    there, here = repeated
    words = [*arms[:here], arms[there], *arms[here + 1 :]]
    assert eqvae_command.main(["compare", *words]) == 2
    assert f"Each card is of one training seed of one arm; {named} is given twice." in capsys.readouterr().err


def test_another_kind_of_file_is_not_promised(arms, tmp_path, capsys):
    with pytest.raises(SystemExit):
        eqvae_command.main(["compare", *arms, "--output", str(tmp_path / "x.gif")])
    said = capsys.readouterr().err
    assert "--output names a .png file; got " in said and said.rstrip().endswith("x.gif")
