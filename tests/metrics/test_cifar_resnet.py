"""The CIFAR-10 ResNets: the published layout of weights, the shortcut, their names, and their accuracy."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_eqvae.metrics.cifar_resnet import CifarBlock, CifarResNet
from diffusers_eqvae.metrics.feature_networks import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    load_feature_network,
)


def published(network: CifarResNet) -> dict[str, torch.Tensor]:
    """The tensors under the names of the published files, which lack the batch counters."""
    state = {f"module.{key.removeprefix('features.')}": value for key, value in network.state_dict().items()}
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


def images(count: int = 3, side: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(0)).byte()


@pytest.mark.parametrize(("blocks", "depth", "parameters"), [(3, 20, 269_722), (9, 56, 853_018)])
def test_depth_and_size_are_the_papers(blocks, depth, parameters):
    """Table 6 of the paper: 0.27 and 0.85 million parameters."""
    network = CifarResNet(blocks)
    assert sum(p.numel() for p in network.parameters()) == parameters
    convolutions = [m for m in network.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(convolutions) == depth


def test_a_block_without_its_convolutions_is_the_padded_identity():
    block = CifarBlock(4, 8, stride=2).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    states = torch.rand(1, 4, 6, 6)
    outputs = block(states)
    assert torch.equal(outputs[:, 2:6], states[:, :, ::2, ::2]) and not outputs[:, [0, 1, 6, 7]].any()


@pytest.mark.parametrize("wrapped", [False, True])
def test_features_and_logits_from_a_file(wrapped, tmp_path):
    torch.manual_seed(0)
    network = CifarResNet(2).eval()
    state = published(network)
    torch.save({"state_dict": state, "best_prec1": 91.7} if wrapped else state, tmp_path / "weights.th")
    loaded = load_feature_network("cifar_resnet", tmp_path / "weights.th")
    outputs = loaded(images())
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    expected = (images() / 255 - mean) / std
    torch.testing.assert_close(outputs["logits"], network(expected))
    torch.testing.assert_close(outputs["features"], network.features(expected).mean((2, 3)))
    # No number by this network can be taken for FID, precision or an Inception score.
    assert loaded.name == "cifar10_resnet14" and "32 px" in loaded.input_rule
    for metric in ("fid", "kid", "inception_score", "precision"):
        assert loaded.metric_name(metric).endswith("_cifar10_resnet14")
    assert loaded(images(side=64))["features"].shape == (3, 64)


def test_other_weights_are_refused(tmp_path):
    state = published(CifarResNet(1))
    for name, wrong in (
        ("missing", {key: value for key, value in state.items() if "layer2" not in key}),
        ("unknown", {**state, "module.layer4.0.conv1.weight": torch.zeros(1)}),
        ("shape", {**state, "module.linear.weight": torch.zeros(100, 64)}),
    ):
        torch.save(wrong, tmp_path / name)
        with pytest.raises(ValueError, match="must hold the weights of a ResNet for CIFAR-10"):
            load_feature_network("cifar_resnet", tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"resnet56-4bfd9763\.th, which is not.* https.*cifar_resnet=FILE"):
        load_feature_network("cifar_resnet", None)
    with pytest.raises(ValueError, match="there are cifar_resnet, dinov2, inception, squeezenet"):
        load_feature_network("resnet")


@pytest.mark.parametrize(("file", "accuracy"), [("resnet20-12fca82f.th", 0.81), ("resnet56-4bfd9763.th", 0.833)])
def test_published_weights_know_their_classes(shared_data, file, accuracy):
    """Accuracy on 8000 images of the test split; 400 of them give it within four standard errors."""
    parquet = pytest.importorskip("pyarrow.parquet")
    loaded = load_feature_network("cifar_resnet", shared_data / "weights" / "cifar10_resnet" / file)
    table = parquet.read_table(shared_data / "cifar10" / "test-00000-of-00001.parquet").to_pydict()
    chosen = range(0, 8000, 20)
    images_uint8 = [np.asarray(Image.open(io.BytesIO(table["image"][k]["bytes"])).convert("RGB")) for k in chosen]
    logits = loaded(torch.from_numpy(np.stack(images_uint8)).permute(0, 3, 1, 2))["logits"]
    right = logits.argmax(1) == torch.tensor([table["label"][k] for k in chosen])
    assert right.double().mean().item() == pytest.approx(accuracy, abs=4 * 0.4 / 20)
