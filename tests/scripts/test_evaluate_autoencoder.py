"""training/evaluate_autoencoder.py: exactly N images, noise of their own, the same metrics from any batches."""

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

import eqvae_command
from diffusers_eqvae.autoencoders import decode, encode
from diffusers_eqvae.images import adm_center_crop, to_pixels, to_uint8
from diffusers_eqvae.metrics.autoencoder import measure_autoencoder
from diffusers_eqvae.metrics.cifar_resnet import CifarResNet
from diffusers_eqvae.metrics.feature_networks import ModuleFeatures, load_feature_network
from diffusers_eqvae.metrics.generation import evaluate_reconstruction
from diffusers_eqvae.metrics.image_sets import extract
from diffusers_eqvae.metrics.result_card import PROTOCOLS, ResultCard
from diffusers_eqvae.provenance import autoencoder_identity, hash_file

COUNT = 13


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(COUNT):
        array = np.random.default_rng(index).integers(0, 256, (36, 48, 3), dtype=np.uint8)
        Image.fromarray(array).save(folder / f"{index:02d}.png")
    return folder


@pytest.fixture
def vae(tmp_path, tiny_autoencoder_kl) -> Path:
    tiny_autoencoder_kl.save_pretrained(tmp_path / "kl")
    return tmp_path / "kl"


def script(repository: Path) -> Path:
    return repository / "training" / "evaluate_autoencoder.py"


def run(repository: Path, vae: Path, images: Path, output: Path, *more: str) -> dict:
    flags = ["--vae", str(vae), "--data_dir", str(images), "--output", str(output), "--resolution", "32"]
    runpy.run_path(str(script(repository)))["main"]([*flags, *more])
    return json.loads(output.read_text())


def test_figures_are_those_of_the_library(repository, vae, images, tmp_path, tiny_autoencoder_kl):
    content = run(repository, vae, images, tmp_path / "deep" / "all.json", "--batch_size", "5")
    images = [Image.open(path).convert("RGB") for path in sorted(images.iterdir())]
    pixels = torch.stack([to_pixels(adm_center_crop(image, 32)) for image in images])
    expected = measure_autoencoder(tiny_autoencoder_kl, [pixels])
    assert content["metrics"] == pytest.approx(expected.card_parts()["metrics"], rel=1e-4, abs=1e-5)
    errors = {name: figure.error for name, figure in expected.figures.items() if figure.error is not None}
    assert content["errors"] == pytest.approx(errors, rel=1e-3, abs=1e-5) and "psnr" in errors
    details = content["details"]
    assert set(details) == {"num_images", *expected.details} and details["num_images"] == COUNT
    assert len(details["channels"]["mean"]) == 4 and details["spectrum"]["power"]
    protocol = content["protocol"]
    assert protocol["posterior"] == "mean" and protocol["num_images"] == COUNT and "lpips_net" not in protocol
    assert content["provenance"]["data"] == "images" and content["settings"]["model_class"] == "AutoencoderKL"
    assert content["settings"]["autoencoder"] == autoencoder_identity(tiny_autoencoder_kl)


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
    flags = ["--lpips_net", "alex", "--seed", "3", "--lpips_linear_weights", "y.pth"]
    run(repository, vae, images, tmp_path / "x.json", "--num_images", "2", *flags)
    assert "--lpips_backbone_weights is not given: --lpips_net, --lpips_linear_weights." in caplog.text
    assert "mean is reconstructed: --seed." in caplog.text
    caplog.clear()
    sampled = ["--num_images", "2", "--sample_posterior", "--seed", "3"]
    before = (tmp_path / "x.json").read_bytes()
    with pytest.raises(ValueError, match=r"x\.json exists, and is not what this command wrote before"):
        run(repository, vae, images, tmp_path / "x.json", *sampled)
    assert (tmp_path / "x.json").read_bytes() == before
    run(repository, vae, images, tmp_path / "y.json", *sampled)
    run(repository, vae, images, tmp_path / "y.json", *sampled)
    assert "Without effect" not in caplog.text


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_a_model_is_not_replaced_by_its_card(repository, vae, images, name):
    before = (vae / name).read_bytes()
    with pytest.raises(ValueError, match=rf"{name} exists, and is not what this command wrote"):
        run(repository, vae, images, vae / name)
    assert (vae / name).read_bytes() == before


def test_metrics_are_chosen_by_name(repository, vae, images, tmp_path):
    chosen = run(repository, vae, images, tmp_path / "some.json", "--metrics", "ssim", "psnr")
    everything = run(repository, vae, images, tmp_path / "all.json")
    assert list(chosen["metrics"]) == ["ssim", "psnr"] and set(chosen["details"]) == {"num_images"}
    assert chosen["metrics"]["psnr"] == everything["metrics"]["psnr"]
    for names, message in (
        (["blur"], "There is no metric 'blur'"),
        (["rfid"], "RFID needs a feature network"),
        (["fid"], "The metric fid does not fit here; --metrics takes .*latent_statistics, .*rfid, .*transformed_rfid"),
    ):
        with pytest.raises(ValueError, match=message):
            run(repository, vae, images, tmp_path / "x.json", "--metrics", *names)
    with pytest.raises(ValueError, match=r"x\.squeezenet\.json would be written twice"):
        run(repository, vae, images, tmp_path / "x.json", "--feature_networks", "squeezenet=a", "squeezenet=b")


def test_help_offers_the_metrics_that_can_be_measured_here(capsys):
    with pytest.raises(SystemExit):
        eqvae_command.main(["evaluate-autoencoder", "--help"])
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Other choices of --metrics: ")]
    offered = set(line.rstrip(".").partition(": ")[2].split(", "))
    assert "transformed_rfid" in offered and not offered & {"fid", "kid", "precision_recall"}
    assert "inception_score" not in offered  # it would be that of the originals


EXTENSION = """
from dataclasses import dataclass, field

from diffusers_eqvae.metrics.base import PerImageMetric, register_metric


@register_metric("clipped")
class Clipped(PerImageMetric):
    needs = frozenset({"images", "reconstructions"})
    better = "lower"

    @dataclass
    class Arguments:
        clipped_above: float = field(default=0.99, metadata={"help": "From where on a value counts as clipped."})

    def __init__(self, above):
        super().__init__()
        self.above = above

    @classmethod
    def from_arguments(cls, arguments=None, **others):
        return cls(arguments.clipped_above)

    def rows(self, batch):
        return {"clipped": (batch["images"].abs() > self.above).float().mean((1, 2, 3))}

    def protocol(self):
        return {"clipped.above": self.above}
"""


def test_a_metric_from_a_file_of_ones_own(repository, vae, images, tmp_path, capsys):
    """Its option, its numbers, its protocol and its hash go through the command line onto the card."""
    file = tmp_path / "clipped_metric.py"
    file.write_text(EXTENSION)
    flags = ["--extension", str(file), "--metrics", "psnr", "clipped", "--clipped_above", "0.5"]
    content = run(repository, vae, images, tmp_path / "half.json", *flags)
    pixels = [to_pixels(adm_center_crop(Image.open(path).convert("RGB"), 32)) for path in sorted(images.iterdir())]
    expected = (torch.stack(pixels).abs() > 0.5).float().mean().item()
    assert content["metrics"]["clipped"] == pytest.approx(expected, rel=1e-6) and "clipped" in content["errors"]
    assert content["protocol"]["clipped.above"] == 0.5
    assert content["provenance"]["extensions"]["diffusers_eqvae.extensions.clipped_metric"] == hash_file(file)
    run(repository, vae, images, tmp_path / "most.json", *flags[:-1], "0.9")
    assert eqvae_command.main(["compare", str(tmp_path / "half.json"), str(tmp_path / "most.json")]) == 1
    assert "clipped.above differs (0.5, 0.9)" in capsys.readouterr().out
    (tmp_path / "preset.yaml").write_text(f"extension: {file}\n")
    with pytest.raises(ValueError, match="code is loaded from the command line only"):
        runpy.run_path(str(script(repository)))["main"]([str(tmp_path / "preset.yaml"), "--vae", str(vae)])


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
    flags = ["--feature_networks", f"cifar_resnet={resnet}", "--batch_size", "5"]
    content = run(repository, vae, images, tmp_path / "rfid.json", *flags)
    assert calls["extract"] == 2 * 3 and calls_without["extract"] == 0
    assert all(calls[name] == 2 * calls_without[name] for name in ("encode", "decode"))
    measured = content["metrics"].pop("rfd_cifar10_resnet8")
    assert content["metrics"] == without
    network = load_feature_network("cifar_resnet", resnet)
    images = [adm_center_crop(Image.open(path).convert("RGB"), 32) for path in sorted(images.iterdir())]
    images_uint8 = np.stack([np.asarray(image) for image in images])
    model = AutoencoderKL.from_pretrained(vae).eval()
    with torch.no_grad():
        decoded = decode(model, encode(model, torch.stack([to_pixels(image) for image in images])).mode())
    decoded = to_uint8(decoded).permute(0, 2, 3, 1).numpy()
    parts = [extract(network, [each]) for each in (decoded, images_uint8)]
    expected = evaluate_reconstruction(*parts, network)
    assert measured == pytest.approx(expected.values()["rfd_cifar10_resnet8"], rel=1e-3) and measured > 0
    assert "13 samples for 64 dimensions" in content["caveats"]["rfd_cifar10_resnet8"]
    protocol = content["protocol"]
    assert protocol["data_hash"] == parts[1].hash and protocol["feature_network"] == "cifar10_resnet8"


def test_several_networks_have_a_card_each_from_one_pass(repository, vae, images, resnet, tmp_path, monkeypatch):
    torchvision = pytest.importorskip("torchvision")
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "squeezenet.pth")
    networks = [f"cifar_resnet={resnet}", f"squeezenet={tmp_path / 'squeezenet.pth'}"]
    more = ["--metrics", "psnr", "rfid", "--num_images", "7", "--feature_networks"]
    calls, real = Counter(), AutoencoderKL.decode
    monkeypatch.setattr(AutoencoderKL, "decode", lambda *given: calls.update(decode=1) or real(*given))
    main = runpy.run_path(str(script(repository)))["main"]
    flags = [
        "--vae",
        str(vae),
        "--data_dir",
        str(images),
        "--output",
        str(tmp_path / "card.json"),
        "--resolution",
        "32",
    ]
    cards = main([*flags, *more, *networks])
    assert calls["decode"] == 1 and not (tmp_path / "card.json").exists()
    for card, name, network in zip(cards, ("cifar_resnet", "squeezenet"), networks, strict=True):
        written = ResultCard.load(tmp_path / f"card.{name}.json")
        alone = run(repository, vae, images, tmp_path / "alone.json", *more, network)
        assert written == card and len(card.metrics) == 2
        assert (card.metrics, card.errors, card.protocol) == (alone["metrics"], alone["errors"], alone["protocol"])
    assert cards[0].protocol["feature_network_weights"] != cards[1].protocol["feature_network_weights"]


def test_cards_are_compared_by_what_they_share(repository, vae, images, resnet, tmp_path, capsys):
    """rFID's network matters only where both have an rFID; another posterior or data set always does."""
    a, b, c = (tmp_path / f"{name}.json" for name in "abc")
    run(repository, vae, images, a)
    run(repository, vae, images, b, "--feature_networks", f"cifar_resnet={resnet}")
    assert eqvae_command.main(["compare", str(a), str(b)]) == 0
    assert "psnr" in capsys.readouterr().out
    run(repository, vae, images, c, "--sample_posterior", "--num_images", "12")
    assert eqvae_command.main(["compare", str(a), str(c)]) == 1
    text = capsys.readouterr().out
    assert "posterior differs (mean, sample)" in text and "data_hash differs" in text and "feature_network" not in text
    generation = ResultCard({"psnr": 1.0}, dict.fromkeys(PROTOCOLS["generation"], "x"))
    generation.save(c)
    assert eqvae_command.main(["compare", str(a), str(c)]) == 1
    assert "task differs (reconstruction, generation)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), r"NaN or infinite \(decoder\.conv_out\.weight"), (3e38, "gave NaN or infinity")],
)
def test_nan_is_refused(repository, vae, images, tmp_path, value, message):
    model = AutoencoderKL.from_pretrained(vae)
    model.decoder.conv_out.weight.data.fill_(value)
    model.save_pretrained(vae)
    with pytest.raises(ValueError, match=message):
        run(repository, vae, images, tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


def test_masks_give_srss_and_are_refused_by_name(repository, vae, images, tmp_path, caplog):
    (tmp_path / "masks").mkdir()
    for path in sorted(images.iterdir()):
        mask = np.zeros((36, 48), dtype=np.uint8)
        mask[: 10 + int(path.stem)] = 1
        Image.fromarray(mask).save(tmp_path / "masks" / path.name)
    wanted = ("--metrics", "diffusability", "--masks", str(tmp_path / "masks"))
    card = run(repository, vae, images, tmp_path / "a.json", *wanted, "--batch_size", "3")
    again = run(repository, vae, images, tmp_path / "b.json", *wanted, "--batch_size", "13")
    assert card["metrics"]["srss"] == pytest.approx(again["metrics"]["srss"], abs=1e-5)
    assert card["protocol"]["srss.masks_hash"] == again["protocol"]["srss.masks_hash"]
    run(repository, vae, images, tmp_path / "c.json", "--metrics", "psnr", *wanted[2:])
    assert "masks" in caplog.text and "none of --metrics uses masks" in caplog.text

    (tmp_path / "masks" / "03.png").rename(tmp_path / "masks" / "x.png")
    with pytest.raises(ValueError, match=r"one mask of the same name.* for 1 of 13: 03.png"):
        run(repository, vae, images, tmp_path / "d.json", *wanted)
    run(repository, vae, images, tmp_path / "e.json", *wanted, "--num_images", "3")  # the first three have theirs
    Image.fromarray(np.zeros((48, 36), dtype=np.uint8)).save(tmp_path / "masks" / "03.png")
    with pytest.raises(ValueError, match=r"03.png has 36x48 px.* 48x36 px. Crop or rotate it"):
        run(repository, vae, images, tmp_path / "d.json", *wanted)
