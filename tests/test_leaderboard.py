"""eqvae leaderboard: cards of one protocol share a table, with errors and provenance."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import eqvae_command
from diffusers_eqvae.metrics.result_card import PROTOCOLS, ResultCard

DOCS = Path(__file__).parents[1] / "docs"


def card(psnr: float, **protocol) -> ResultCard:
    autoencoder = {
        "class": "AutoencoderTiny",
        "latent_channels": 4,
        "downsampling_factor": 8,
        "encoder": {"float32": "e" * 16},
        "decoder": {"float32": "d" * 16},
    }
    return ResultCard(
        {"psnr": psnr, "mine": 3.0, "note": 1.0, "sec": 0.2},
        dict.fromkeys(PROTOCOLS["reconstruction"], "same") | {"num_images": 500} | protocol,
        {"model": "x", "autoencoder": autoencoder},
        {"sec": "few", "viv_per_dimension": "undefined: too few"},
        {"data": "a < b", "date": "2026-11-29T00:00:00"},
        task="reconstruction",
        errors={"psnr": 0.051},
        better={"psnr": "higher", "sec": "lower", "mine": "lower"},
    )


def write(tmp_path, output: str, **protocol) -> tuple[int, str]:
    card(24.0).save(tmp_path / "plain.json")
    card(23.5, **protocol).save(tmp_path / "eq.json")
    words = ["leaderboard", str(tmp_path / "plain.json"), str(tmp_path / "eq.json")]
    status = eqvae_command.main([*words, "--output", str(tmp_path / output)])
    return status, (tmp_path / output).read_text()


def test_cards_of_one_protocol_share_a_table(tmp_path):
    status, text = write(tmp_path, "x.md")
    assert status == 0 and text.count("## reconstruction: 500 images of a &lt; b") == 1
    assert "|  | psnr (more) | sec (less) | mine (less) |" in text
    assert r"| plain | 24 ± 0.051 | 0.2\* | 3 |" in text and r"| eq | 23.5 ± 0.051 | 0.2\* | 3 |" in text
    assert f"| eq | AutoencoderTiny | 4 | 8 | {'e' * 16} | {'d' * 16} | 500 | 2026-11-29 |" in text
    assert write(tmp_path, "x.md")[1] == text  # over its own


def test_cards_of_other_images_have_a_table_of_their_own(tmp_path):
    status, text = write(tmp_path, "x.html", data_hash="other")
    assert status == 0 and text.count("<h2>") == 2 and "a &lt; b" in text and "<td>24 ± 0.051</td>" in text
    assert text.count("<th>psnr (more)</th>") == 2 and "<td>psnr" not in text


def test_no_other_file_is_replaced(tmp_path, capsys):
    (tmp_path / "x.md").write_text("# Mine")
    card(24.0).save(tmp_path / "a.json")
    assert eqvae_command.main(["leaderboard", str(tmp_path / "a.json"), "--output", str(tmp_path / "x.md")]) == 2
    assert "exists, and is not what this command wrote before" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        eqvae_command.main(["leaderboard", str(tmp_path / "a.json"), "--output", str(tmp_path / "x.txt")])
    assert "a .md or a .html file; got x.txt" in capsys.readouterr().err


def test_the_table_of_the_documents_is_that_of_its_cards(tmp_path):
    cards = sorted(map(str, (DOCS / "leaderboard").glob("*.json")))
    assert eqvae_command.main(["leaderboard", *cards, "--output", str(tmp_path / "x.md")]) == 0
    assert (tmp_path / "x.md").read_text() == (DOCS / "leaderboard.md").read_text()


@pytest.mark.parametrize("output", ["x.md", "x.html"])
def test_what_a_card_says_is_text_in_the_table(output, tmp_path):
    hostile = "a|b<img src=x onerror=alert(1)>"
    shown = card(24.0)
    shown.provenance["data"] = "[x](javascript:alert(1)) | <script>\n# heading"
    shown.settings["autoencoder"] = {"class": "<b>", "encoder": "no mapping"}
    shown.save(tmp_path / f"{hostile}.json")
    assert (
        eqvae_command.main(["leaderboard", str(tmp_path / f"{hostile}.json"), "--output", str(tmp_path / output)]) == 0
    )
    text = (tmp_path / output).read_text()
    assert "<img" not in text and "<script>" not in text and "<b>" not in text
    if output == "x.md":
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows[:3]}) == 1 and not re.search(
            r"(?<!\\)\]\(", text
        )
        assert "\n# heading" not in text
