"""`eqvae inspect` end to end on tiny autoencoders, and what its verdict makes of known figures."""

from __future__ import annotations

import json
import math
import runpy

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_eqvae import cli
from diffusers_eqvae.autoencoders import load_autoencoder
from diffusers_eqvae.inspection.card import COLUMNS, strips, table_rows
from diffusers_eqvae.inspection.health import inspect_autoencoder, judge
from diffusers_eqvae.inspection.run import _card_names, load_images, run_inspection
from diffusers_eqvae.metrics.result_card import ResultCard
from diffusers_eqvae.provenance import weights_hash

pytest.importorskip("matplotlib")


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(12):
        levels = np.random.default_rng(index).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(levels).save(folder / f"{index:02d}.png")
    return folder


def figures(**changed):
    plain = {
        "psnr": 25.0,
        "equivariance_rotation": 0.9,
        "equivariance_rotation_centred": 0.9,
        "equivariance_scale": 0.7,
        "equivariance_scale_centred": 0.7,
        "gap_rotated": 4.0,
        "gap_halved": 2.0,
        "channels": {"std": [1.0, 0.5]},
    }
    return plain | changed


@pytest.mark.parametrize(
    ("changed", "level", "reason"),
    [
        ({}, "poor", "turned latents is 4.0 dB worse"),
        ({"gap_rotated": 2.9}, "mixed", "rotation error 0.90"),
        ({"gap_rotated": 0.9, "gap_halved": 0.2}, "good", "SD-VAE 0.89, EQ-VAE 0.56"),
        ({"gap_rotated": 0.0, "gap_halved": 0.0, "psnr": 12.0}, "poor", "12.0 dB, below 20 dB"),
        ({"gap_rotated": 0.0, "gap_halved": 0.0, "channels": {"std": [1.0, 0.001]}}, "poor", "channels 1 vary"),
    ],
)
def test_the_verdict_follows_the_gaps_and_refuses_a_collapse(changed, level, reason):
    verdict = judge(figures(**changed))
    assert verdict.level == level
    assert any(reason in each for each in verdict.reasons)


def test_two_families_side_by_side(tmp_path, images, tiny_autoencoder_kl, tiny_autoencoder_tiny, capsys):
    """A plain model and one inside a pipeline's vae/ folder, whose names need escaping."""
    tiny_autoencoder_kl.save_pretrained(tmp_path / "plain & <old>")
    tiny_autoencoder_tiny.save_pretrained(tmp_path / "pipe" / "vae")
    command = ["inspect", str(tmp_path / "plain & <old>"), "--compare", str(tmp_path / "pipe")]
    command += ["--compare_subfolder", "vae", "--data", str(images), "--output_dir", str(tmp_path / "out")]
    assert cli.main([*command, "--resolution", "32", "--num_images", "11"]) == 0

    content = json.loads((tmp_path / "out" / "card.json").read_text())
    assert [model["name"] for model in content["models"]] == ["plain & <old>", "pipe"]
    assert [model["description"]["class"] for model in content["models"]] == ["AutoencoderKL", "AutoencoderTiny"]
    assert len(content["comparison"]) >= 5 and content["settings"]["images"] == 11
    for model in content["models"]:
        measured = model["figures"]
        assert measured["num_images"] == measured["intrinsic_dimension_points"] == 11
        assert measured["intrinsic_dimension"] > 0 and "lpips" not in measured
        assert len(measured["channels"]["kurtosis"]) == 4 and len(measured["spectrum"]["power"]) == 4
        gap = measured["psnr_rotated_pixels"] - measured["psnr_rotated_latent"]
        assert measured["gap_rotated"] == pytest.approx(gap)
    page = (tmp_path / "out" / "card.html").read_text()
    assert "plain &amp; &lt;old&gt;" in page and "<old>" not in page and 'src="card.png"' in page
    with Image.open(tmp_path / "out" / "card.png") as card:
        assert card.width > 1000 and len(np.unique(np.asarray(card.convert("L")))) > 50
    assert f"The card: {tmp_path}/out/card.html" in capsys.readouterr().out


def test_the_card_says_what_was_measured_where_and_when(tmp_path, images, tiny_autoencoder_kl):
    tiny_autoencoder_kl.save_pretrained(tmp_path / "vae")
    with torch.no_grad():
        tiny_autoencoder_kl.decoder.conv_out.bias.add_(0.1)
    tiny_autoencoder_kl.save_pretrained(tmp_path / "tuned")

    def contents(*more) -> dict:
        words = ["inspect", tmp_path / "vae", "--compare", tmp_path / "tuned", "--data", images, "--resolution", 16]
        assert cli.main([str(word) for word in (*words, "--output_dir", tmp_path / "out", *more)]) == 0
        return json.loads((tmp_path / "out" / "card.json").read_text())

    content = contents()
    first, second = (model["description"] for model in content["models"])
    assert first["autoencoder"]["encoder"] == second["autoencoder"]["encoder"]
    assert first["autoencoder"]["decoder"] != second["autoencoder"]["decoder"]
    assert second["revision"] == f"weights {weights_hash(load_autoencoder(str(tmp_path / 'tuned')))}"
    provenance = content["provenance"]
    assert provenance["data"] == "images" and provenance["hardware"] and provenance["date"]
    assert set(provenance["versions"]) == {"diffusers_eqvae", "diffusers", "torch", "python"}
    page = (tmp_path / "out" / "card.html").read_text()
    assert content["settings"]["data_hash"] in page and provenance["date"] in page

    assert contents()["settings"] == content["settings"]
    assert contents("--num_images", 11)["settings"]["data_hash"] != content["settings"]["data_hash"]
    changed = np.asarray(Image.open(images / "03.png")).copy()
    changed[4:36, 4:36] ^= 128
    Image.fromarray(changed).save(images / "03.png")
    assert contents()["settings"]["data_hash"] != content["settings"]["data_hash"]


def test_eqvae_compare_reads_the_cards_of_models(repository, tmp_path, images, tiny_autoencoder_kl, capsys):
    """The same numbers on the same images as training/evaluate_autoencoder.py, in a card that agrees with its."""
    for name in ("a", "b"):
        tiny_autoencoder_kl.save_pretrained(tmp_path / name / "my vae")
    words = ["--compare", tmp_path / "b" / "my vae", "--data", images, "--output_dir", tmp_path / "out"]
    assert cli.main([str(word) for word in ("inspect", tmp_path / "a" / "my vae", "--resolution", 32, *words)]) == 0
    paths = sorted((tmp_path / "out").glob("card.*.json"))
    assert [path.name.split("_")[-3] for path in paths] == ["a", "b"]

    words = ["--vae", tmp_path / "a" / "my vae", "--data_dir", images, "--resolution", 32]
    script = runpy.run_path(str(repository / "training" / "evaluate_autoencoder.py"))["main"]
    script([str(word) for word in (*words, "--output", tmp_path / "exact.json")])
    card, exact = ResultCard.load(paths[0]), ResultCard.load(tmp_path / "exact.json")
    assert (card.protocol, card.settings) == (exact.protocol, exact.settings)
    assert card.metrics == pytest.approx(exact.metrics, rel=1e-3)
    assert card.caveats == exact.caveats and set(card.details) == set(exact.details)
    assert cli.main(["compare", *map(str, paths), str(tmp_path / "exact.json")]) == 0
    with pytest.raises(SystemExit):
        cli.main(["compare", str(paths[0]), str(tmp_path / "out" / "card.json")])
    assert "is a health card of eqvae inspect; compare the result cards beside it" in capsys.readouterr().err


@pytest.mark.parametrize("names", [["a b", "a_b"], ["SIT", "sit"], ["plain & <old>", "pipe"], ["/x/y", "../z"]])
def test_every_model_has_a_file_of_its_own(names):
    files = _card_names(names)
    assert len({file.lower() for file in files}) == 2
    assert all(file.startswith("card.") and file.endswith(".json") and not set(file) & set("/<> ") for file in files)


def test_what_is_undefined_is_null_and_no_nan(tmp_path, images, tiny_autoencoder_kl):
    """Of 4x4 cells scaled to a quarter one is left, which cannot deviate from its mean."""
    tiny_autoencoder_kl.save_pretrained(tmp_path / "vae")
    words = ["--data", str(images), "--output_dir", str(tmp_path / "out"), "--resolution", "16"]
    assert cli.main(["inspect", str(tmp_path / "vae"), "--compare", str(tmp_path / "vae"), *words]) == 0
    content = json.loads((tmp_path / "out" / "card.json").read_text(), parse_constant=pytest.fail)
    (model, _) = content["models"]
    assert model["figures"]["equivariance_scale_centred"] is None
    assert any("around the channel means undefined" in reason for reason in model["verdict"]["reasons"])
    assert ">nan<" not in (tmp_path / "out" / "card.html").read_text()


def test_the_strip_shows_what_it_says(tiny_autoencoder_tiny):
    pixels = torch.rand(2, 3, 48, 48) * 2 - 1
    tiles = strips([tiny_autoencoder_tiny] * 2, pixels)
    assert [len(models) for models in tiles] == [2, 2] and all(len(row) == len(COLUMNS) for row in tiles[0])
    row, twin = tiles[1]
    levels = torch.from_numpy(np.asarray(row[0].image).copy()).permute(2, 0, 1) / 127.5 - 1
    assert torch.allclose(levels, pixels[1], atol=0.01)
    sizes = [tile.image.size[0] for tile in row]
    assert sizes == [48, 48, 48, 16, 48, 24, 12, 12]
    assert [tile.caption for tile in row] == [tile.caption for tile in twin]
    assert [bool(tile.caption) for tile in row] == [False, True, True, False, False, True, True, False]


def test_cards_say_which_lpips_they_hold(tmp_path, images, tiny_autoencoder_kl, monkeypatch):
    from diffusers_eqvae.losses.perceptual import LPIPS

    perceptual = LPIPS.random("squeeze")
    monkeypatch.setattr(LPIPS, "from_pretrained", lambda *_, **__: perceptual)
    tiny_autoencoder_kl.save_pretrained(tmp_path / "vae")
    words = ["--data", str(images), "--output_dir", str(tmp_path / "out"), "--resolution", "32", "--num_images", "2"]
    assert cli.main(["inspect", str(tmp_path / "vae"), *words, "--lpips_backbone_weights", "squeezenet.pth"]) == 0
    card = ResultCard.load(tmp_path / "out" / "card.vae.json")
    assert card.metrics["lpips"] > 0 and card.protocol["lpips_net"] == "squeeze"
    assert card.protocol["lpips_weights_hash"] == weights_hash(perceptual)


def test_lpips_is_measured_where_given(tiny_autoencoder_kl):
    from diffusers_eqvae.losses.perceptual import LPIPS

    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    inspection = inspect_autoencoder(tiny_autoencoder_kl, pixels, name="x", perceptual=LPIPS.random("squeeze"))
    assert inspection.figures["lpips"] > 0
    assert math.isnan(inspection.figures["intrinsic_dimension"])  # two points have none
    labels = [row[0] for row in table_rows([inspection])]
    assert "reconstruction, LPIPS" in labels and "intrinsic dimension (TwoNN)" not in labels


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--resolution", "34"], "multiple of the autoencoder's stride 4"),
        (["--resolution", "8"], "at least 16"),
        (["--num_images", "0"], "must be positive"),
        (["--data", "nowhere"], "does not exist"),
        (["--output_dir", "FOLDER/vae/config.json/x", "--data", "nowhere"], "card.json cannot be written"),
        (["--lpips_linear_weights", "squeeze.pth"], "needs --lpips_backbone_weights"),
    ],
)
def test_wrong_arguments_end_with_a_sentence(more, message, tmp_path, images, tiny_autoencoder_tiny, capsys):
    tiny_autoencoder_tiny.save_pretrained(tmp_path / "vae")
    command = ["inspect", str(tmp_path / "vae"), "--data", str(images), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, *(word.replace("FOLDER", str(tmp_path)) for word in more)])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


def test_no_model_is_measured_where_another_does_not_fit(tmp_path, images, tiny_autoencoder_tiny, monkeypatch):
    """The first has stride 4; the second, of stride 8, has no quarter of 16 px."""
    tiny_autoencoder_tiny.save_pretrained(tmp_path / "vae")
    factors = [4, 8]
    monkeypatch.setattr("diffusers_eqvae.inspection.run.inspect_autoencoder", pytest.fail)
    monkeypatch.setattr("diffusers_eqvae.inspection.health.downsampling_factor", lambda _: factors.pop(0))
    options = {"model": str(tmp_path / "vae"), "compare": str(tmp_path / "vae"), "data": str(images)}
    with pytest.raises(ValueError, match="stride 8 and at least 32; got 16"):
        run_inspection(**options, output_dir=str(tmp_path / "out"), resolution=16)


def test_images_are_evenly_spaced_and_none_is_replaced(images, caplog):
    assert torch.equal(
        load_images(images, resolution=16, num_images=2),
        load_images(images, resolution=16, num_images=12)[[0, 11]],
    )
    assert len(load_images(images, resolution=16, num_images=99)) == 12
    assert "12 images, fewer than the 99" in caplog.text
    broken = sorted(images.iterdir())[5]
    broken.write_bytes(broken.read_bytes()[:900])
    with pytest.raises(ValueError, match=f"{broken.name} cannot be read"):
        load_images(images, resolution=16, num_images=12)
