"""rfid and gfid through `evaluate`, offline: what the functions give, whatever the batches, processes and dtype."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_eqvae.metrics.cifar_resnet import CifarResNet
from diffusers_eqvae.metrics.evaluate_modules import module_path
from diffusers_eqvae.metrics.feature_networks import ModuleFeatures, load_feature_network
from diffusers_eqvae.metrics.generation import evaluate_generation, evaluate_reconstruction, load_reference
from diffusers_eqvae.metrics.image_sets import extract

evaluate = pytest.importorskip("evaluate")
ADDED = {"num_samples", "feature_network", "feature_network_weights", "caveats"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet.pth"
    torch.save({key.removeprefix("features."): value for key, value in CifarResNet(1).state_dict().items()}, path)
    return path


@pytest.fixture
def load(tmp_path, weights):
    def load_module(name, **options):
        options = {"weights": str(weights), "cache_dir": str(tmp_path), **options}
        return evaluate.load(module_path(name), options.pop("config", "cifar_resnet"), **options)

    return load_module


def images_uint8(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)


def blurred(array: np.ndarray) -> np.ndarray:
    return array // 2 + 64


def test_rfid_in_batches_of_uint8_or_of_pixels(load, weights):
    images, metric = images_uint8(70), load("rfid")
    network = load_feature_network("cifar_resnet", weights)
    collected = [extract(network, np.split(each, [30, 50])) for each in (blurred(images), images)]
    expected = evaluate_reconstruction(*collected, network).values()
    for part in np.split(images, [30, 50]):
        metric.add_batch(predictions=blurred(part), references=part)
    result = metric.compute()
    assert {name: result[name] for name in expected} == expected
    assert set(result) == {"rfd_cifar10_resnet8"} | ADDED and not result["caveats"]
    assert result["num_samples"] == 70 and result["feature_network"] == "cifar10_resnet8"
    # A training loop has pixels, and asks again after the next epoch.
    pixels = [torch.from_numpy(each).permute(0, 3, 1, 2) / 127.5 - 1 for each in (blurred(images), images)]
    for reconstruction, target in zip(pixels[0].split([30, 20, 20]), pixels[1].split([30, 20, 20]), strict=True):
        metric.add_batch(predictions=reconstruction.requires_grad_(), references=target)
    assert metric.compute() == result
    assert metric.compute(predictions=images, references=images)["rfd_cifar10_resnet8"] == pytest.approx(0, abs=1e-9)


def test_processes_join_their_images(load):
    """`evaluate` lets processes wait for each other through locked files, so two threads stand for them."""
    images, alone = images_uint8(70), load("rfid")
    parts = np.split(images, [40])
    for part in parts:
        alone.add_batch(predictions=blurred(part), references=part)

    def run(rank: int):
        metric = load("rfid", num_process=2, process_id=rank, experiment_id="two", timeout=30)
        metric.add_batch(predictions=blurred(parts[rank]), references=parts[rank])
        return metric.compute()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(run, range(2))) == [alone.compute(), None]


def test_gfid_gives_all_that_the_network_and_the_reference_allow(load, weights, tmp_path):
    np.savez(tmp_path / "reference.npz", images_uint8(80, 1))
    metric = load("gfid", reference=str(tmp_path / "reference.npz"))
    for part in np.split(images_uint8(70), [30, 50]):
        metric.add_batch(predictions=part)
    result = metric.compute()
    network = load_feature_network("cifar_resnet", weights)
    samples, reference = extract(network, np.split(images_uint8(70), [30, 50])), tmp_path / "reference.npz"
    expected = evaluate_generation(samples, load_reference(reference, network), network).values()
    assert {name: result[name] for name in expected} == expected
    assert set(result) == set(expected) | ADDED | {"reference", "reference_hash"}
    assert result["reference"] == "reference.npz" and len(result["caveats"]) == 0
    few = metric.compute(predictions=np.concatenate([images_uint8(20), images_uint8(20)]))
    assert "only 20 of 40" in few["caveats"]["kd_cifar10_resnet8"] and few["num_samples"] == 40


def test_images_one_by_one(load):
    """`add` is a batch of one, of uint8 or pixels."""
    metric, images = load("rfid"), images_uint8(5)
    for image in images:
        metric.add_batch(predictions=blurred(image)[None], references=image[None])
    expected = metric.compute()
    for image in images:
        metric.add(prediction=blurred(image), reference=image)
    assert metric.compute() == expected
    for image in images:
        sides = [torch.from_numpy(each).permute(2, 0, 1) / 127.5 - 1 for each in (blurred(image), image)]
        metric.add(prediction=sides[0], reference=sides[1])
    assert metric.compute() == expected
    with pytest.raises(ValueError, match="takes predictions and references; got predictions"):
        metric.add(prediction=images[0])


def test_all_images_have_one_size(load):
    metric, small, large = load("rfid"), images_uint8(4), images_uint8(4).repeat(2, 1).repeat(2, 2)
    metric.add_batch(predictions=blurred(small), references=small)
    with pytest.raises(ValueError, match="must have one size; got 8x8 and 16x16 px"):
        metric.add_batch(predictions=blurred(large), references=large)
    assert metric.compute()["num_samples"] == 4
    metric.add_batch(predictions=blurred(large), references=large)  # compute began anew
    assert metric.compute()["num_samples"] == 4


def test_gfid_crops_its_reference_and_takes_the_network_by_name(load, weights, tmp_path):
    torchvision = pytest.importorskip("torchvision")
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "squeezenet.pth")
    (tmp_path / "images").mkdir()
    for index, each in enumerate(np.random.default_rng(1).integers(0, 256, (9, 20, 24, 3)).astype(np.uint8)):
        Image.fromarray(each).save(tmp_path / "images" / f"{index}.png")
    options = {"reference": str(tmp_path / "images"), "resolution": 8}
    result = load("gfid", **options).compute(predictions=images_uint8(9))
    expected = load_reference(tmp_path / "images", load_feature_network("cifar_resnet", weights), resolution=8)
    assert result["reference_hash"] == expected.hash and result["feature_network"] == "cifar10_resnet8"
    named = load("rfid", config="squeezenet", weights=str(tmp_path / "squeezenet.pth"))
    assert named.compute(predictions=images_uint8(2), references=images_uint8(2))["feature_network"] == "squeezenet1_1"


def test_a_network_of_ones_own(load):
    network = ModuleFeatures(torch.nn.Conv2d(3, 4, 1), name="colours")
    metric = load("rfid", weights=None, network=network)
    assert metric.compute(predictions=blurred(images_uint8(9)), references=images_uint8(9))["rfd_colours"] > 0


def test_what_is_no_batch_of_images_is_refused(load, tmp_path):
    metric, good = load("rfid"), images_uint8(4)
    pixels = torch.zeros(4, 3, 8, 8)
    for wrong, complaint in (
        (pixels * float("nan"), "gave NaN or infinity"),
        (pixels + 255, "floats up to 255"),
        (pixels + 4, "floats up to 4"),
        (pixels.permute(0, 2, 3, 1), r"uint8 \(B, H, W, 3\) or floats"),
        (good.astype(np.int64), "got torch.int64"),
        (good[:3], "equally large"),
        (None, "uint8|got"),
    ):
        with pytest.raises((ValueError, TypeError), match=complaint):
            metric.add_batch(predictions=wrong, references=good)
    with pytest.raises(ValueError, match="takes predictions and references; got predictions"):
        metric.add_batch(predictions=good)
    with pytest.raises(ValueError, match="call add_batch first"):
        metric.compute()
    np.savez(tmp_path / "reference.npz", images_uint8(8, 1))
    with pytest.raises(ValueError, match="takes predictions; got predictions, references"):
        load("gfid", reference=str(tmp_path / "reference.npz")).add_batch(predictions=good, references=good)
    with pytest.raises(FileNotFoundError, match=r"download https://.*inception=FILE"):
        load("rfid", config=None, weights=None)
