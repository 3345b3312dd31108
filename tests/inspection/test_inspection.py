"""`eqvae inspect` end to end on tiny autoencoders, and what its verdict makes of known numbers."""

from __future__ import annotations

import json
import math
import runpy
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image

import eqvae_command
from diffusers_eqvae.autoencoders import decode, encode
from diffusers_eqvae.equivariance import rotation
from diffusers_eqvae.inspection.card import COLUMNS, _draw_findings, pyplot, strips, table_rows
from diffusers_eqvae.inspection.health import Inspection, findings, inspect_autoencoder
from diffusers_eqvae.inspection.run import InspectArguments, _card_names, load_images, run_inspection
from diffusers_eqvae.metrics.reconstruction import psnr
from diffusers_eqvae.metrics.result_card import ResultCard
from diffusers_eqvae.provenance import weights_hash

pytest.importorskip("matplotlib")


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(12):
        array = np.random.default_rng(index).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(array).save(folder / f"{index:02d}.png")
    return folder


def figures(**changed):
    plain = {
        "psnr": 25.0,
        "ssim": 0.7,
        "sec": 0.2,
        "lds": 0.3,
        "high_frequency": 0.4,
        "equivariance_rotation": 0.9,
        "equivariance_rotation_centred": 0.9,
        "equivariance_scale": 0.7,
        "equivariance_scale_centred": 0.7,
        "gap_rotated": 4.0,
        "gap_halved": 2.0,
        "channels": {"std": [1.0, 0.5]},
    }
    return plain | changed


def found(**changed):
    errors, caveats = {"gap_rotated": 0.1}, {"viv": "undefined: too few"}
    return {each.name: each for each in findings(figures(**changed), {"errors": errors, "caveats": caveats})}


@pytest.mark.parametrize(
    ("changed", "name", "level", "evidence"),
    [
        ({}, "equivariance", "poor", "decoding rotated latents loses 4.0 +- 0.1 dB"),
        ({"gap_rotated": 2.9}, "equivariance", "mixed", "rotation error 0.90, around"),
        ({"gap_rotated": 0.9, "gap_halved": 0.2}, "equivariance", "good", "v3: SD-VAE 0.89, EQ-VAE 0.56"),
        ({"gap_rotated": 0.9, "gap_halved": 0.2}, "equivariance", "good", "v1: SD-VAE 0.8, EQ-VAE 0.15"),
        ({}, "equivariance", "poor", "looked at on 4 tokenizers, provisional"),
        ({"gap_rotated": 0.0, "gap_halved": 0.0, "psnr": 12.0}, "equivariance", None, "halved latents loses 0.0"),
        ({"psnr": 12.0}, "reconstruction", "poor", "PSNR 12.00 dB"),
        ({}, "reconstruction", None, "limit 20 dB: own choice, looked at on 4 tokenizers, provisional"),
        ({}, "channels", "good", "below 1% of the largest: own choice, looked at on 4 tokenizers, provisional"),
        ({}, "reconstruction", None, "PSNR 25.00 dB"),
        ({"channels": {"std": [1.0, 0.001]}}, "channels", "poor", "standard deviations 0.001 to 1"),
        ({}, "diffusability", None, "undefined: too few"),
        ({"viv_per_dimension": 0.8}, "diffusability", None, "no limits: nobody has measured"),
    ],
)
def test_each_property_is_found_by_itself_with_its_evidence(changed, name, level, evidence):
    finding = found(**changed)[name]
    assert finding.level == level
    assert any(evidence in each for each in finding.evidence)


def test_no_text_of_the_card_lies_on_another():
    figure = pyplot().figure(figsize=(15.5, 2.7))
    collapsed = {"std": [1.0, *[1e-4] * 15]}
    kinds = ({}, {"psnr": 12.0, "channels": collapsed})
    inspections = [Inspection("vae", {}, {}, tuple(found(**changed).values())) for changed in kinds]
    _draw_findings(figure, inspections)
    figure.canvas.draw()
    boxes = [(text.get_text(), text.get_window_extent()) for text in figure.texts]
    assert any("too poor to judge" in text for text, _ in boxes) and any("PSNR 25.00" in text for text, _ in boxes)
    for number, (text, box) in enumerate(boxes):
        assert not [other for other, its in boxes[number + 1 :] if box.overlaps(its)], text
        assert box.x1 < figure.bbox.x1
    pyplot().close(figure)


def test_a_finding_claims_what_was_measured():
    """No word for all of them; VIV without a covariance is undefined, and equivariance beside noise says nothing."""
    assert list(found()) == ["reconstruction", "equivariance", "diffusability", "channels"]
    assert found()["diffusability"].says == "VIV is undefined for so few images"
    assert found(viv_per_dimension=0.8)["diffusability"].says == "VIV 0.800 a dimension"
    assert "says nothing" in found(psnr=12.0)["equivariance"].says
    assert "below 20 dB" in found(psnr=12.0)["reconstruction"].says
    assert found(channels={"std": [1.0, 0.001]})["channels"].says == "channels 1 have collapsed"


def test_two_families_side_by_side(tmp_path, images, tiny_autoencoder_kl, tiny_autoencoder_tiny, capsys):
    """A plain model and one inside a pipeline's vae/ folder, whose names need escaping."""
    tiny_autoencoder_kl.save_pretrained(tmp_path / "plain & <old>")
    tiny_autoencoder_tiny.save_pretrained(tmp_path / "pipe" / "vae")
    command = ["inspect", str(tmp_path / "plain & <old>"), "--compare", str(tmp_path / "pipe")]
    command += ["--compare_subfolder", "vae", "--data_dir", str(images), "--output_dir", str(tmp_path / "out")]
    assert eqvae_command.main([*command, "--resolution", "32", "--num_images", "11"]) == 0

    paths = [tmp_path / "out" / name for name in ("card.plain_old_.json", "card.pipe.json")]
    plain, tiny = (ResultCard.load(path) for path in paths)
    assert [card.settings["model_class"] for card in (plain, tiny)] == ["AutoencoderKL", "AutoencoderTiny"]
    assert tiny.settings["model"] == "pipe/vae"
    for card in (plain, tiny):
        assert card.protocol["num_images"] == card.protocol["intrinsic_dimension_points"] == 11
        assert card.metrics["intrinsic_dimension"] > 0 and "lpips" not in card.metrics
        assert len(card.details["channels"]["kurtosis"]) == 4 and len(card.details["spectrum"]["power"]) == 4
        gap = card.metrics["psnr_rotated_pixels"] - card.metrics["psnr_rotated_latent"]
        assert card.metrics["gap_rotated"] == pytest.approx(gap)
    page = (tmp_path / "out" / "card.html").read_text()
    assert not any(str(tmp_path) in each for each in (page, *(path.read_text() for path in paths)))
    assert "plain &amp; &lt;old&gt;" in page and "<old>" not in page and 'src="card.png"' in page
    row = f"<td>{plain.metrics['psnr']:.2f}</td><td>{tiny.metrics['psnr']:.2f}</td><td>higher</td>"
    assert f"<tr><td>reconstruction, PSNR in dB</td>{row}</tr>" in page
    with Image.open(tmp_path / "out" / "card.png") as card:
        assert card.width > 1000 and len(np.unique(np.asarray(card.convert("L")))) > 50
    said = capsys.readouterr()
    assert f"The card: {tmp_path}/out/card.html" in said.out
    assert "plain & <old>: 100%" in said.err and "pipe: 100%" in said.err  # and how long it will take


def test_the_card_says_what_was_measured_where_and_when(tmp_path, images, tiny_autoencoder_kl):
    tiny_autoencoder_kl.save_pretrained(tmp_path / "vae")
    with torch.no_grad():
        tiny_autoencoder_kl.decoder.conv_out.bias.add_(0.1)
    tiny_autoencoder_kl.save_pretrained(tmp_path / "tuned")

    def cards(*more) -> list[ResultCard]:
        words = ["inspect", tmp_path / "vae", "--compare", tmp_path / "tuned", "--data_dir", images]
        words += ["--resolution", 16, "--output_dir", tmp_path / "out", *more]
        assert eqvae_command.main([str(word) for word in words]) == 0
        return [ResultCard.load(tmp_path / "out" / f"card.{name}.json") for name in ("vae", "tuned")]

    first, second = cards()
    page = (tmp_path / "out" / "card.html").read_text()
    one, other = (card.settings["autoencoder"] for card in (first, second))
    assert one["encoder"] == other["encoder"] and one["decoder"] != other["decoder"]
    assert second.provenance["hub_commit"] is None and one["decoder"]["float32"] in page
    assert first.provenance["data"] == "images" and first.provenance["hardware"] and first.provenance["date"]
    assert {"diffusers_eqvae", "diffusers", "torch", "python"} <= set(first.provenance["versions"])
    assert first.protocol["data_hash"] in page and first.provenance["date"] in page

    assert cards()[0].protocol == first.protocol
    assert cards("--num_images", 11)[0].protocol["data_hash"] != first.protocol["data_hash"]
    changed = np.asarray(Image.open(images / "03.png")).copy()
    changed[4:36, 4:36] ^= 128
    Image.fromarray(changed).save(images / "03.png")
    assert cards()[0].protocol["data_hash"] != first.protocol["data_hash"]


def test_eqvae_compare_reads_the_cards_of_models(repository, tmp_path, images, tiny_autoencoder_kl, capsys):
    """The same numbers on the same images as training/evaluate_autoencoder.py, in a card that agrees with its."""
    for name in ("a", "b"):
        tiny_autoencoder_kl.save_pretrained(tmp_path / name / "my vae")
    words = ["--compare", tmp_path / "b" / "my vae", "--data_dir", images, "--output_dir", tmp_path / "out"]
    assert (
        eqvae_command.main([str(word) for word in ("inspect", tmp_path / "a" / "my vae", "--resolution", 32, *words)])
        == 0
    )
    paths = sorted((tmp_path / "out").glob("card.*.json"))
    assert [path.name.split("_")[-3] for path in paths] == ["a", "b"]

    words = ["--vae", tmp_path / "a" / "my vae", "--data_dir", images, "--resolution", 32]
    script = runpy.run_path(str(repository / "training" / "evaluate_autoencoder.py"))["main"]
    script([str(word) for word in (*words, "--output", tmp_path / "exact.json")])
    card, exact = ResultCard.load(paths[0]), ResultCard.load(tmp_path / "exact.json")
    assert (card.protocol, card.settings) == (exact.protocol, exact.settings)
    assert card.metrics == pytest.approx(exact.metrics, rel=1e-3)
    assert card.caveats == exact.caveats and set(card.details) == set(exact.details)
    assert eqvae_command.main(["compare", *map(str, paths), str(tmp_path / "exact.json")]) == 0


@pytest.mark.parametrize("names", [["a b", "a_b"], ["SIT", "sit"], ["plain & <old>", "pipe"], ["/x/y", "../z"]])
def test_every_model_has_a_file_of_its_own(names):
    files = _card_names(names)
    assert len({file.lower() for file in files}) == 2
    assert all(file.startswith("card.") and file.endswith(".json") and not set(file) & set("/<> ") for file in files)


def test_what_is_undefined_is_not_a_number_on_the_card(tmp_path, images, tiny_autoencoder_kl):
    """Of 4x4 latent positions scaled to a quarter one is left, which cannot deviate from its mean."""
    tiny_autoencoder_kl.save_pretrained(tmp_path / "vae")
    words = ["--data_dir", str(images), "--output_dir", str(tmp_path / "out"), "--resolution", "16"]
    assert eqvae_command.main(["inspect", str(tmp_path / "vae"), "--compare", str(tmp_path / "vae"), *words]) == 0
    paths = sorted((tmp_path / "out").glob("card.*.json"))
    json.loads(paths[0].read_text(), parse_constant=pytest.fail)
    assert "equivariance_scale_centred" not in ResultCard.load(paths[0]).metrics
    page = (tmp_path / "out" / "card.html").read_text()
    assert page.count("around the channel means undefined") == 2
    assert "<tr><td>S around the channel means</td>" not in page
    assert "nan<" not in page


def test_the_strip_shows_what_it_says(tiny_autoencoder_tiny):
    pixels = torch.rand(2, 3, 48, 48) * 2 - 1
    tiles = strips([tiny_autoencoder_tiny] * 2, pixels)
    assert [len(models) for models in tiles] == [2, 2] and all(len(row) == len(COLUMNS) for row in tiles[0])
    row, twin = tiles[1]
    turned = rotation((12, 12), 1).apply_to_pixels(pixels, 4)
    bound = decode(tiny_autoencoder_tiny, encode(tiny_autoencoder_tiny, turned).mode()).rot90(-1, (-2, -1))
    assert row[2].caption == f"{psnr(bound, pixels)[1].item():.1f} dB"
    drawn = torch.from_numpy(np.asarray(row[2].image).copy()).permute(2, 0, 1) / 127.5 - 1
    assert torch.allclose(drawn, bound[1].clamp(-1, 1), atol=0.01) and row[2].image != row[3].image
    shown = torch.from_numpy(np.asarray(row[0].image).copy()).permute(2, 0, 1) / 127.5 - 1
    assert torch.allclose(shown, pixels[1], atol=0.01)
    sizes = [tile.image.size[0] for tile in row]
    assert sizes == [48, 48, 48, 48, 48, 16, 48, 24, 12, 12]
    assert [tile.caption for tile in row] == [tile.caption for tile in twin]
    assert [bool(tile.caption) for tile in row] == [False, True, True, True, True, False, False, True, True, False]


def test_cards_say_which_lpips_they_hold(tmp_path, images, tiny_autoencoder_kl, monkeypatch):
    from diffusers_eqvae.losses.perceptual import LPIPS

    perceptual = LPIPS.random("squeeze")
    monkeypatch.setattr(LPIPS, "from_pretrained", lambda *_, **__: perceptual)
    tiny_autoencoder_kl.save_pretrained(tmp_path / "vae")
    words = ["--vae", str(tmp_path / "vae"), "--data_dir", str(images), "--output_dir", str(tmp_path / "out")]
    words += ["--resolution", "32", "--num_images", "2", "--lpips_backbone_weights", "squeezenet.pth"]
    assert eqvae_command.main(["inspect", *words]) == 0
    card = ResultCard.load(tmp_path / "out" / "card.vae.json")
    assert card.metrics["lpips"] > 0 and card.protocol["lpips_net"] == "squeeze"
    assert card.protocol["lpips_weights_hash"] == weights_hash(perceptual)


def test_lpips_is_asked_for_in_the_words_of_training_and_evaluation():
    from diffusers_eqvae.metrics.members.lpips import PerceptualDistance
    from diffusers_eqvae.training_utils.autoencoder.arguments import AutoencoderLossArguments

    asking = (InspectArguments, PerceptualDistance.Arguments, AutoencoderLossArguments)
    words = [{each.name for each in fields(options) if each.name.startswith("lpips_")} for options in asking]
    assert words[0] == words[1] == words[2] == {"lpips_net", "lpips_backbone_weights", "lpips_linear_weights"}


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
        (["--data_dir", "nowhere"], "does not exist"),
        (["--device", "cuda:77"], "The device cuda:77 cannot be used"),
        (["--data", "nowhere"], "the nearest flag is --data_dir"),
        (["--output_dir", "FOLDER/vae/config.json/x", "--data_dir", "nowhere"], "which is read here"),
        (["--lpips_linear_weights", "squeeze.pth"], "needs lpips_backbone_weights"),
    ],
)
def test_wrong_arguments_end_with_a_sentence(more, message, tmp_path, images, tiny_autoencoder_tiny, capsys):
    tiny_autoencoder_tiny.save_pretrained(tmp_path / "vae")
    command = ["inspect", str(tmp_path / "vae"), "--data_dir", str(images), "--output_dir", str(tmp_path / "out")]
    try:
        status = eqvae_command.main([*command, *(word.replace("FOLDER", str(tmp_path)) for word in more)])
    except SystemExit as stop:  # argparse's own
        status = stop.code
    assert status == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


def test_no_model_is_measured_where_another_does_not_fit(tmp_path, images, tiny_autoencoder_tiny, monkeypatch):
    """The first has stride 4, and 16 px have a quarter; the second, of stride 8, has none."""
    widths = {f"{part}_block_out_channels": (8, 8, 8, 8) for part in ("encoder", "decoder")}
    blocks = {f"num_{part}_blocks": (1, 1, 1, 1) for part in ("encoder", "decoder")}
    tiny_autoencoder_tiny.save_pretrained(tmp_path / "vae")
    type(tiny_autoencoder_tiny)(latent_channels=4, **widths, **blocks).save_pretrained(tmp_path / "other")
    monkeypatch.setattr("diffusers_eqvae.inspection.run.inspect_autoencoder", pytest.fail)
    names = {"vae": str(tmp_path / "vae"), "compare": str(tmp_path / "other"), "output_dir": str(tmp_path / "out")}
    arguments = InspectArguments(data_dir=str(images), resolution=16, **names)
    with pytest.raises(ValueError, match="stride 8 and at least 32; got 16"):
        run_inspection(arguments)


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


def test_classes_and_masks_reach_the_card(tmp_path, tiny_autoencoder_kl, capsys):
    """Class folders: VIV over classes and LNC; masks of the same names: SRSS. Without them clusters are named."""
    tiny_autoencoder_kl.save_pretrained(tmp_path / "vae")
    mask = np.zeros((40, 48), dtype=np.uint8)
    mask[:, 20:] = 7
    for index in range(12):
        array = np.random.default_rng(index).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        for name, image in (("images", array), ("masks", mask)):
            (tmp_path / name / f"class {index % 2}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(tmp_path / name / f"class {index % 2}" / f"{index}.png")
    (tmp_path / "plain").mkdir()
    for index in range(12):
        array = np.random.default_rng(index).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / "plain" / f"{index:02d}.png")

    def card(data: str, *more: str) -> ResultCard:
        words = ["inspect", "--vae", tmp_path / "vae", "--data_dir", tmp_path / data, "--resolution", 32]
        assert (
            eqvae_command.main([str(word) for word in [*words, "--output_dir", tmp_path / f"{data} out", *more]]) == 0
        )
        return ResultCard.load(tmp_path / f"{data} out" / "card.vae.json")

    known = card("images", "--masks", str(tmp_path / "masks"))
    said = capsys.readouterr().out
    assert known.protocol["viv.groups"] == "2 classes" and 0 <= known.metrics["lnc"] <= 1
    assert -2 <= known.metrics["srss"] <= 2 and "VIV over 2 classes" in said and "SRSS" in said
    unknown = card("plain")
    assert "k-means cluster" in unknown.protocol["viv.groups"] and not {"lnc", "srss"} & set(unknown.metrics)
    assert "k-means cluster" in capsys.readouterr().out
