"""Result cards: what a file must hold, what is read beside samples, and which differences forbid to compare."""

from __future__ import annotations

import json
import math

import pytest

import eqvae_command
from diffusers_eqvae.metrics.result_card import (
    CONCERNS,
    PROTOCOLS,
    SETTINGS,
    ResultCard,
    compare_cards,
    is_card_of,
    sampling_settings,
)
from diffusers_eqvae.provenance import hardware

PROTOCOL, RECONSTRUCTION_PROTOCOL = PROTOCOLS["generation"], PROTOCOLS["reconstruction"]


def card(**changes) -> ResultCard:
    protocol = {key: f"some {key}" for key in PROTOCOL} | {
        key: value for key, value in changes.items() if key in PROTOCOL
    }
    settings = {key: value for key, value in changes.items() if key in SETTINGS}
    return ResultCard(changes.get("metrics", {"fid": 2.5}), protocol, settings, changes.get("caveats", {}), hardware())


def test_a_card_survives_its_file(tmp_path):
    original = card(seed=3, guidance_interval=[0.0, 0.75], caveats={"fid": "too few images"})
    original.save(tmp_path / "deep" / "card.json")
    assert ResultCard.load(tmp_path / "deep" / "card.json") == original
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["card.json"]
    assert {"hardware", "versions", "date", "threads"} <= set(original.provenance)


def test_what_is_not_finite_is_null(tmp_path):
    """NaN is not a word of JSON, and most readers refuse it."""
    details = {"list": [1.0, math.nan, {"deep": math.inf}], "pair": (2, -math.inf)}
    ResultCard({"psnr": 1.0}, {}, task="reconstruction", details=details).save(tmp_path / "card.json")
    loaded = ResultCard.load(tmp_path / "card.json")
    assert loaded.details == {"list": [1.0, None, {"deep": None}], "pair": [2, None]}


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "card.json"
    for text, complaint in (
        ("{", "is not a whole JSON file"),
        ("[]", "must hold a JSON object"),
        ("{}", "must hold .metrics."),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=complaint):
            ResultCard.load(path)
    for version, complaint in (
        ({"format_version": 99}, "format_version 99, newer than 4: update diffusers_eqvae"),
        ({"format": 1}, "format_version 1, older than 4.*: measure again"),
        ({}, "format_version None, older than 4"),
    ):
        path.write_text(json.dumps({**version, "metrics": {}, "protocol": {}}))
        with pytest.raises(ValueError, match=complaint):
            ResultCard.load(path)
    for part, value, complaint in (
        ("metrics", [1], "its metrics is a list"),
        ("metrics", {"fid": "low"}, "names to numbers"),
        ("metrics", {"fid": 1e999}, "its metrics must map names to numbers, finite ones"),
        ("errors", {"fid": "low"}, "its errors must map names to numbers"),
        ("task", ["generation"], "its task is a list"),
        ("settings", None, "its settings is a NoneType"),
    ):
        path.write_text(json.dumps({"format_version": 4, "metrics": {}, "protocol": {}, part: value}))
        with pytest.raises(ValueError, match=complaint):
            ResultCard.load(path)
    path.write_text(json.dumps({"format_version": 4, "metrics": {}, "protocol": {}, "colour": 1}))
    with pytest.raises(ValueError, match="holds colour"):
        ResultCard.load(path)
    with pytest.raises(ValueError, match="got colour"):
        ResultCard({}, {"colour": 1})
    with pytest.raises(ValueError, match="got 'psnr'"):
        ResultCard({}, {}, task="psnr")


def test_settings_may_differ_and_are_listed():
    found = compare_cards(
        ["a", "b"], [card(guidance_scale=1.0, seed=1), card(guidance_scale=1.8, seed=1, metrics={"fid": 1.75})]
    )
    assert not found.incomparable
    assert found.table[1].split() == ["fid", "2.5", "1.75"]
    assert found.table[2].split() == ["guidance_scale", "1.0", "1.8"] and len(found.table) == 3


@pytest.mark.parametrize("key", list(PROTOCOL))
def test_every_part_of_the_protocol_forbids_to_compare(key):
    (sentence,) = compare_cards(["a", "b"], [card(), card(**{key: "other"})]).incomparable
    assert sentence == f"{key} differs (some {key}, other): {PROTOCOL[key]}"
    (sentence,) = compare_cards(["a", "b", "c"], [card(), card(**{key: None}), card()]).incomparable
    assert sentence.startswith(f"{key} is not stated by b: ")


def reconstruction(*, metrics=("psnr", "lpips", "rfid", "intrinsic_dimension"), **changes) -> ResultCard:
    protocol = {key: f"some {key}" for key in RECONSTRUCTION_PROTOCOL} | changes
    return ResultCard(dict.fromkeys(metrics, 1.0), protocol, task="reconstruction")


@pytest.mark.parametrize("key", list(RECONSTRUCTION_PROTOCOL))
def test_every_part_of_a_reconstructions_protocol_forbids_to_compare(key):
    (sentence,) = compare_cards(["a", "b"], [reconstruction(), reconstruction(**{key: "other"})]).incomparable
    assert sentence == f"{key} differs (some {key}, other): {RECONSTRUCTION_PROTOCOL[key]}"
    # What a network or a number of points is about concerns nobody who has no such number.
    psnr = [reconstruction(), reconstruction(metrics=("psnr",), **{key: None})]
    assert bool(compare_cards(["a", "b"], psnr).incomparable) == (key not in CONCERNS["reconstruction"])


def test_protocol_of_a_metric_of_ones_own_forbids_where_both_have_it():
    cards = [reconstruction(metrics=("sharpness",), **{"sharpness.scale": scale}) for scale in (1, 2)]
    (sentence,) = compare_cards(["a", "b"], cards).incomparable
    assert sentence.startswith("sharpness.scale differs (1, 2): ")
    others = [reconstruction(metrics=("psnr",), **{"sharpness.scale": scale}) for scale in (1, 2)]
    assert not compare_cards(["a", "b"], others).incomparable
    with pytest.raises(ValueError, match="got sharpness_scale"):
        reconstruction(sharpness_scale=1)


def test_a_summary_shows_errors_and_caveats():
    shown = ResultCard({"psnr": 20.0, "fid": 3.0}, {}, caveats={"fid": "too few"}, errors={"psnr": 0.123}).summary()
    assert shown.splitlines() == ["psnr = 20 +- 0.12", "fid = 3 (too few)"]


def test_of_two_autoencoders_the_parts_that_differ_are_shown():
    identity = {
        "class": "AutoencoderKL",
        "encoder": {"float32": "aaaa", "float16": "bbbb"},
        "decoder": {"float32": "c"},
    }
    others = (
        {**identity, "encoder": {"float32": "dddd", "float16": "bbbb"}},
        {**identity, "codebook": {"float32": "e"}},
    )
    table = compare_cards("xyz", [card(autoencoder=each) for each in (identity, *others)]).table
    assert [line.split(None, 1)[1] for line in table if line.startswith("autoencoder")] == [
        "encoder aaaa, codebook None  encoder dddd, codebook None  encoder aaaa, codebook e"
    ]


def test_a_reconstruction_is_not_compared_with_a_sample():
    found = compare_cards(["a", "b"], [reconstruction(metrics=("fid",)), card()])
    (sentence,) = found.incomparable
    assert sentence.startswith("task differs (reconstruction, generation): ")


def test_caveats_and_missing_numbers_are_shown():
    cards = [card(caveats={"fid": "too few images"}), card(metrics={"fid": 3.0, "kid": 0.1})]
    table = compare_cards(["a", "b"], cards).table
    assert table[1].split() == ["fid", "2.5*", "3"] and table[2].split() == ["kid", "-", "0.1"]
    assert table[3] == "* fid of a: too few images"
    assert "no number" in compare_cards(["a", "b"], [card(), card(metrics={"fd_x": 1.0})]).incomparable[0]
    with pytest.raises(ValueError, match="Two or more"):
        compare_cards(["a"], [card()])


def test_what_sampling_json_says(tmp_path):
    record = {
        "settings": {
            "num_samples": 8,
            "seed": 7,
            "label_policy": "balanced",
            "guidance_scale": 1.8,
            "guidance_interval": [0.0, 0.75],
            "guided_channels": None,
            "num_inference_steps": 50,
            "scheduler": "saved",
            "dtype": "float32",
            "scheduler_config": {"solver": "heun"},
            "weights": "abc",
        },
        "nfe": 87.0,
        "model": str(tmp_path / "model"),
    }
    (tmp_path / "png").mkdir()
    record |= {"uint8_rule": "truncated", "autoencoder": {"encoder": "1"}, "transformer": "2"}
    (tmp_path / "sampling.json").write_text(json.dumps(record))
    settings, rules, _ = sampling_settings(tmp_path / "samples.npz")
    assert rules == {"label_policy": "balanced", "uint8_rule": "truncated"}
    assert (settings["autoencoder"], settings["transformer"]) == ({"encoder": "1"}, "2")
    assert settings["scheduler"] == {"solver": "heun"}
    assert settings["seed"] == 7 and settings["nfe"] == 87.0 and not {"ema", "weights"} & set(settings)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "resolved_arguments.json").write_text('{"use_ema": true}')
    assert sampling_settings(tmp_path / "png")[0]["ema"] is True
    card(**settings)
    # Nothing is known of files that sampling.json does not describe, even beside it.
    (tmp_path / "images").mkdir()
    nothing = ({}, {"label_policy": None, "uint8_rule": None}, None)
    for stranger in ("others.npz", "images", "model/samples.npz"):
        assert sampling_settings(tmp_path / stranger) == nothing


def test_the_command_prints_and_judges(tmp_path, capsys):
    card().save(tmp_path / "a.json")
    card(num_samples=10_000).save(tmp_path / "b.json")
    paths = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert eqvae_command.main(["compare", *paths]) == 1
    text = capsys.readouterr().out
    assert "a.json" in text and "num_samples differs" in text and PROTOCOL["num_samples"] in text
    assert eqvae_command.main(["compare", paths[0], paths[0]]) == 0
    assert "may be compared" in capsys.readouterr().out
    for wrong in ([paths[0]], [paths[0], str(tmp_path / "absent.json")]):
        assert eqvae_command.main(["compare", *wrong]) == 2


def test_a_card_holds_no_path_of_this_machine_and_is_still_found(tmp_path):
    """Whoever commits or sends a card shows names, and hashes that say what they were."""
    given = ResultCard(
        {"psnr": 20.0},
        {"num_images": 3},
        settings={"model": str(tmp_path / "vae"), "head": {"name": str(tmp_path / "heads" / "ade.pth")}},
        provenance={"samples": str(tmp_path / "samples.npz")},
        details={"arguments": {"masks": str(tmp_path / "masks")}},
        task="reconstruction",
    )
    given.save(tmp_path / "card.json")
    assert str(tmp_path) not in (tmp_path / "card.json").read_text()
    loaded = ResultCard.load(tmp_path / "card.json")
    assert loaded == given and loaded.settings["model"] == "vae" and loaded.details["arguments"]["masks"] == "masks"
    assert is_card_of(tmp_path / "card.json", model=str(tmp_path / "vae"), samples=str(tmp_path / "samples.npz"))
    assert not is_card_of(tmp_path / "card.json", model=str(tmp_path / "other"))
