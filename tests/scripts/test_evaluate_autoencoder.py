"""training/evaluate_autoencoder.py: exactly N images, noise of their own, the same figures from any batches."""

from __future__ import annotations

import json
import runpy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from diffusers_eqvae import cli
from diffusers_eqvae.autoencoders import decode, encode
from diffusers_eqvae.images import adm_center_crop, to_pixels
from diffusers_eqvae.metrics.autoencoder import measure_autoencoder
from diffusers_eqvae.metrics.cifar_resnet import CifarResNet
from diffusers_eqvae.metrics.feature_networks import ModuleFeatures, cifar_resnet_features
from diffusers_eqvae.metrics.generation import evaluate_reconstruction
from diffusers_eqvae.metrics.image_sets import collect, to_levels
from diffusers_eqvae.metrics.result_card import PROTOCOL, ResultCard

COUNT = 13


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(COUNT):
        levels = np.random.default_rng(index).integers(0, 256, (36, 48, 3), dtype=np.uint8)
        Image.fromarray(levels).save(folder / f"{index:02d}.png")
    return folder


@pytest.fixture
def vae(tmp_path, tiny_autoencoder_kl) -> Path:
    tiny_autoencoder_kl.save_pretrained(tmp_path / "kl")
    return tmp_path / "kl"


def script(repository: Path) -> Path:
    return repository / "training" / "evaluate_autoencoder.py"


def run(repository: Path, vae: Path, images: Path, output: Path, *more: str) -> dict:
    flags = ["--vae", str(vae), "--train_data_dir", str(images), "--output", str(output), "--resolution", "32"]
    runpy.run_path(str(script(repository)))["main"]([*flags, *more])
    return json.loads(output.read_text())


def test_figures_are_those_of_the_library(repository, vae, images, tmp_path, tiny_autoencoder_kl):
    content = run(repository, vae, images, tmp_path / "deep" / "all.json", "--batch_size", "5")
    images = [Image.open(path).convert("RGB") for path in sorted(images.iterdir())]
    pixels = torch.stack([to_pixels(adm_center_crop(image, 32)) for image in images])
    expected = measure_autoencoder(tiny_autoencoder_kl, [pixels])
    measured = content["metrics"] | content["details"]
    assert set(measured) == set(expected) and measured["num_images"] == COUNT
    for name, value in expected.items():
        if isinstance(value, float):
            assert measured[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert len(measured["channels"]["mean"]) == 4 and measured["spectrum"]["power"]
    protocol = content["protocol"]
    assert protocol["posterior"] == "mean" and protocol["num_images"] == COUNT and "lpips_net" not in protocol
    assert content["provenance"]["data"] == "images" and content["settings"]["model_class"] == "AutoencoderKL"


def test_samples_depend_on_the_seed_and_not_on_the_batch(repository, vae, images, tmp_path):
    def psnr(*more: str) -> float:
        content = run(repository, vae, images, tmp_path / "x.json", "--sample_posterior", "--num_images", "7", *more)
        assert content["protocol"]["num_images"] == 7 and content["protocol"]["posterior"] == "sample"
        return content["metrics"]["psnr"]

    reference = psnr("--batch_size", "7")
    assert psnr("--batch_size", "2") == pytest.approx(reference, abs=1e-5)
    assert abs(psnr("--seed", "1") - reference) > 1e-5


def test_what_cannot_be_measured_is_refused(repository, vae, images, tmp_path, tiny_autoencoder_tiny):
    for more, message in (
        (["--num_images", "14"], "holds 13 images; 14 are to be measured"),
        (["--resolution", "30"], "a multiple of the autoencoder.s stride 4; got 30"),
        (["--output", str(images)], "it is a folder"),
        (["--output", str(vae / "config.json" / "card.json")], "cannot be written"),
    ):
        with pytest.raises(ValueError, match=message):
            run(repository, vae, images, tmp_path / "x.json", *more)
    tiny_autoencoder_tiny.save_pretrained(tmp_path / "tiny")
    with pytest.raises(ValueError, match="posterior of AutoencoderTiny is a point"):
        run(repository, tmp_path / "tiny", images, tmp_path / "x.json", "--sample_posterior")
    broken = sorted(images.iterdir())[4]
    broken.write_bytes(broken.read_bytes()[:900])
    with pytest.raises(ValueError, match=f"{broken.name} of images cannot be read"):
        run(repository, vae, images, tmp_path / "x.json")


def test_flags_without_effect_are_named(repository, vae, images, tmp_path, caplog):
    flags = ["--evaluator", "cifar_resnet", "--weights", "x.pth", "--lpips_net", "alex", "--seed", "3"]
    run(repository, vae, images, tmp_path / "x.json", "--num_images", "2", *flags, "--lpips_linear_weights", "y.pth")
    assert "since --rfid is not given: --evaluator, --weights." in caplog.text
    assert "--lpips_backbone_weights is not given: --lpips_net, --lpips_linear_weights." in caplog.text
    assert "mean is reconstructed: --seed." in caplog.text
    caplog.clear()
    run(repository, vae, images, tmp_path / "x.json", "--num_images", "2", "--sample_posterior", "--seed", "3")
    assert "Without effect" not in caplog.text


@pytest.fixture(scope="module")
def resnet(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet.pth"
    torch.save({key.removeprefix("features."): value for key, value in CifarResNet(1).state_dict().items()}, path)
    return path


def test_rfid_comes_from_the_same_pass(repository, vae, images, resnet, tmp_path, monkeypatch):
    """Three batches, two forwards of the network each, and not one more of the autoencoder."""
    calls = Counter()
    for owner, name in ((ModuleFeatures, "extract"), (AutoencoderKL, "encode"), (AutoencoderKL, "decode")):
        real = getattr(owner, name)

        def counted(self, *arguments, real=real, name=name):
            calls[name] += 1
            return real(self, *arguments)

        monkeypatch.setattr(owner, name, counted)
    plain = run(repository, vae, images, tmp_path / "plain.json", "--batch_size", "5")
    without, calls_without = plain["metrics"], calls.copy()
    flags = ["--rfid", "--evaluator", "cifar_resnet", "--weights", str(resnet), "--batch_size", "5"]
    content = run(repository, vae, images, tmp_path / "rfid.json", *flags)
    assert calls["extract"] == 2 * 3 and calls_without["extract"] == 0
    assert all(calls[name] == 2 * calls_without[name] for name in ("encode", "decode"))
    measured = content["metrics"].pop("rfd_cifar10_resnet8")
    assert content["metrics"] == without
    extractor = cifar_resnet_features(resnet)
    images = [adm_center_crop(Image.open(path).convert("RGB"), 32) for path in sorted(images.iterdir())]
    levels = np.stack([np.asarray(image) for image in images])
    model = AutoencoderKL.from_pretrained(vae).eval()
    with torch.no_grad():
        decoded = decode(model, encode(model, torch.stack([to_pixels(image) for image in images])).mode())
    parts = [collect(extractor, [each]) for each in (to_levels(decoded), levels)]
    expected = evaluate_reconstruction(*parts, extractor=extractor)
    assert measured == pytest.approx(expected.metrics["rfd_cifar10_resnet8"], rel=1e-3) and measured > 0
    assert "13 samples for 64 dimensions" in content["marks"]["rfd_cifar10_resnet8"]
    assert content["protocol"]["data_hash"] == parts[1].hash and content["protocol"]["evaluator"] == "cifar10_resnet8"


def test_cards_are_compared_by_what_they_share(repository, vae, images, resnet, tmp_path, capsys):
    """rFID's network matters only where both have an rFID; another posterior or data set always does."""
    a, b, c = (tmp_path / f"{name}.json" for name in "abc")
    run(repository, vae, images, a)
    run(repository, vae, images, b, "--rfid", "--evaluator", "cifar_resnet", "--weights", str(resnet))
    assert cli.main(["compare", str(a), str(b)]) == 0
    assert "psnr" in capsys.readouterr().out
    run(repository, vae, images, c, "--sample_posterior", "--num_images", "12")
    assert cli.main(["compare", str(a), str(c)]) == 1
    text = capsys.readouterr().out
    assert "posterior differs (mean, sample)" in text and "data_hash differs" in text and "evaluator" not in text
    generation = ResultCard({"psnr": 1.0}, dict.fromkeys(PROTOCOL, "x"))
    generation.save(c)
    assert cli.main(["compare", str(a), str(c)]) == 1
    assert "task differs (reconstruction, generation)" in capsys.readouterr().out


def test_nan_is_no_image(repository, vae, images, tmp_path):
    model = AutoencoderKL.from_pretrained(vae)
    model.decoder.conv_out.bias.data[0] = float("nan")
    model.save_pretrained(vae)
    with pytest.raises(ValueError, match="must be finite"):
        run(repository, vae, images, tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()
