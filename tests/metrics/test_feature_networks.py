"""Feature networks: what they give, that one forward gives all of it, and that none can be mistaken for another."""

from __future__ import annotations

import pickle
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffusers_eqvae.metrics import feature_networks as features
from diffusers_eqvae.metrics.feature_networks import (
    ModuleFeatures,
    load_feature_network,
)
from diffusers_eqvae.metrics.networks.dinov2 import DINOv2Features
from diffusers_eqvae.metrics.networks.inception import InceptionFID
from diffusers_eqvae.provenance import weights_hash


def images(count: int = 2, side: int = 40) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(0)).byte()


@pytest.fixture(scope="module")
def inception() -> InceptionFID:
    pytest.importorskip("torch_fidelity", reason="FID's Inception comes with the eval extra")
    return InceptionFID()


def test_inception_gives_what_the_adm_protocol_reads(inception):
    """Against the network walked through by hand: pool_3, mixed_6/conv channels-last, logits without bias."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    net, batch = inception.network, images()
    nn.init.normal_(net.fc.bias)
    nn.init.constant_(net.Mixed_6d.branch1x1.bn.bias, 3.0)  # after the ReLU few cells are 0, which would look alike
    outputs = inception(batch)
    x = interpolate_bilinear_2d_like_tensorflow1x(batch.float(), size=(299, 299), align_corners=False)
    x = (x - 128) / 128
    for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3"):
        x = getattr(net, name)(x)
    for name in ("MaxPool_2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d"):
        x = getattr(net, name)(x)
    spatial = x[:, :7]  # Mixed_6d's first branch comes first in the concatenation
    assert spatial.shape == (2, 7, 17, 17) and (spatial > 0).float().mean() > 0.9
    torch.testing.assert_close(outputs["spatial"], spatial.permute(0, 2, 3, 1).flatten(1), rtol=1e-4, atol=1e-4)
    assert (outputs["spatial"] - spatial.flatten(1)).abs().max() > 0.1
    for name in ("Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c", "AvgPool"):
        x = getattr(net, name)(x)
    torch.testing.assert_close(outputs["features"], x.flatten(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs["logits"], x.flatten(1) @ net.fc.weight.T, rtol=1e-3, atol=1e-3)
    assert {name: value.shape[1] for name, value in outputs.items()} == {
        "features": 2048,
        "spatial": 2023,
        "logits": 1008,
    }


def test_only_the_genuine_weights_are_called_fid(inception):
    assert inception.suffix is not None and "other weights" in inception.name
    assert inception.metric_name("fid") == f"fd_inception_{inception.weights_hash[:8]}"
    assert not any(parameter.requires_grad for parameter in inception.parameters())
    genuine = InceptionFID(inception.network.state_dict(), genuine=True)
    assert genuine.name == "inception-v3-compat" and genuine.metric_name("fid") == "fid"


def test_inception_from_a_file(inception, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(inception.network.state_dict(), path)
    loaded = InceptionFID.from_file(path)
    assert loaded.weights_hash == weights_hash(inception.network) and loaded.suffix is not None
    batch = images(1)
    assert torch.equal(loaded(batch)["features"], inception(batch)["features"])
    for missing in (None, tmp_path / "absent.pth"):
        with pytest.raises(FileNotFoundError, match=r"weights-inception-2015-12-05-6726825d\.pth.*inception=FILE"):
            InceptionFID.from_file(missing)


def test_a_weights_file_cannot_run_code(inception, tmp_path):
    torch.save({"payload": print}, tmp_path / "hostile.pth")
    with pytest.raises(ValueError, match=r"hostile\.pth is not read: it needs code") as refused:
        InceptionFID.from_file(tmp_path / "hostile.pth")
    assert isinstance(refused.value.__cause__, pickle.UnpicklingError)


@pytest.mark.parametrize("name", ["inception", "squeezenet", "cifar_resnet"])
def test_files_of_other_weights_are_named(name, tmp_path):
    """One line each, whatever torch and safetensors make of them."""
    pytest.importorskip("torch_fidelity" if name == "inception" else "torchvision")
    module = nn.Conv2d(3, 4, 1)
    torch.save(module.state_dict(), tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 3, "state_dict": 7}, tmp_path / "numbers.pth")
    torch.save(module.weight.data, tmp_path / "tensor.pth")
    for file in ("garbage.pth", "garbage.safetensors"):
        (tmp_path / file).write_bytes(b"<html>not found</html>")
    (tmp_path / "short.pth").write_bytes((tmp_path / "other.pth").read_bytes()[:300])
    (tmp_path / "empty.pth").write_bytes(b"")
    save_file(module.state_dict(), tmp_path / "other.safetensors")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(ValueError, match=path.name) as refused:
            load_feature_network(name, path)
        assert "\n" not in str(refused.value), path.name


def test_a_name_may_carry_its_weights(tmp_path):
    """As in --feature_networks NAME=WEIGHTS."""
    torchvision = pytest.importorskip("torchvision")
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "a=b.pth")
    found = load_feature_network(f"squeezenet={tmp_path / 'a=b.pth'}")
    save_file(torch.load(tmp_path / "a=b.pth"), tmp_path / "c.safetensors")
    assert found.weights_hash == load_feature_network("squeezenet", tmp_path / "c.safetensors").weights_hash
    with pytest.raises(
        ValueError, match="no feature network 'resnet'; there are cifar_resnet, dinov2, inception, squeezenet"
    ):
        load_feature_network("resnet=x.pth")


def test_torch_fidelity_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ModuleNotFoundError, match=r"diffusers_eqvae\[eval\]"):
        InceptionFID()


@pytest.mark.parametrize("name", ["", "Inception", "inception-v3-compat", "--"])
def test_a_users_network_needs_a_name_of_its_own(name):
    with pytest.raises(ValueError, match="a name of its own"):
        ModuleFeatures(nn.Conv2d(3, 4, 1), name=name)


def test_a_users_network_leaves_its_name_everywhere():
    network = ModuleFeatures(nn.Conv2d(3, 4, 1), name="My Net/v2", image_size=16)
    names = [network.metric_name(metric) for metric in ("fid", "sfid", "kid", "precision", "recall")]
    assert names == ["fd_my_net_v2", "sfd_my_net_v2", "kd_my_net_v2", "precision_my_net_v2", "recall_my_net_v2"]
    assert "16 px" in network.input_rule and network(images())["features"].shape == (2, 4)
    assert network.weights_hash == weights_hash(network.module)
    assert network.train().training is False


def test_normalisation_and_average_of_a_users_network():
    module = nn.Conv2d(3, 3, 1, bias=False)
    module.weight.data = torch.eye(3).view(3, 3, 1, 1)
    network = ModuleFeatures(module, name="mean colour", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    batch = images()
    expected = (batch.float() / 127.5 - 1).mean((2, 3))
    torch.testing.assert_close(network(batch)["features"], expected)


def test_the_hash_sees_every_value():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    before = weights_hash(module)
    module[1].running_var[3] += 1e-6
    assert weights_hash(module) != before


@pytest.mark.parametrize(
    "wrong", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8, 3).byte(), torch.zeros(3, 8, 8).byte()]
)
def test_images_must_be_uint8_nchw(wrong):
    with pytest.raises(ValueError, match="uint8 images"):
        ModuleFeatures(nn.Conv2d(3, 4, 1), name="x")(wrong)


def test_features_of_a_wrong_shape_are_named():
    network = ModuleFeatures(nn.Conv2d(3, 4, 1), name="x", select=lambda output: output.mean(0))
    with pytest.raises(ValueError, match=r"must give \(B, D\)"):
        network(images())


def test_dinov2_gives_its_global_feature(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=14, image_size=28)
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path / "dinov2-tiny")
    network = DINOv2Features.from_file(str(tmp_path / "dinov2-tiny"), image_size=28)
    assert network.metric_name("fid") == "fd_dinov2_tiny"
    batch = images(2, 28)
    normalized = (batch.float() / 255 - torch.tensor(features.IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(
        features.IMAGENET_STD
    ).view(3, 1, 1)
    expected = model(pixel_values=normalized).pooler_output
    torch.testing.assert_close(network(batch)["features"], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="multiple of the patch size 14"):
        DINOv2Features.from_file(str(tmp_path / "dinov2-tiny"), image_size=30)
    weights = tmp_path / "dinov2-tiny" / "model.safetensors"
    save_file({"other.weight": torch.zeros(3)}, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"dinov2-tiny must hold all weights of a dinov2; it lacks \d+ tensors"):
        DINOv2Features.from_file(str(tmp_path / "dinov2-tiny"), image_size=28)
    weights.write_bytes(b"garbage")
    with pytest.raises(ValueError, match=r"model\.safetensors of .*dinov2-tiny are not those of a model"):
        DINOv2Features.from_file(str(tmp_path / "dinov2-tiny"), image_size=28)


def test_dinov2_that_is_nowhere_says_how_to_get_it(tmp_path):
    for name in (str(tmp_path / "absent"), "facebook/dinov2-large"):
        with pytest.raises(FileNotFoundError, match=rf"{name}, which .* `hf download` to a directory"):
            DINOv2Features.from_file(name)


def test_squeezenet_from_a_file(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    network = torchvision.models.squeezenet1_1(weights=None)
    torch.save(network.state_dict(), tmp_path / "squeezenet.pth")
    network = load_feature_network("squeezenet", tmp_path / "squeezenet.pth")
    outputs = network(images(1))
    assert outputs["features"].shape == (1, 512) and network.metric_name("fid") == "fd_squeezenet1_1"
    # torchvision's own size for these weights, reached without leaving [0, 1].
    seen = []
    network.module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    edges = (torch.rand(1, 3, 40, 40) > 0.5).byte() * 255
    network(edges)
    assert seen[0].shape == (1, 3, 224, 224)
    levels = seen[0] * network.std + network.mean
    assert levels.min() > -1e-6 and levels.max() < 1 + 1e-6
    with pytest.raises(FileNotFoundError, match=r"squeezenet1_1-b8a52dc0.pth, and .* does not exist.*squeezenet=FILE"):
        load_feature_network("squeezenet", tmp_path / "absent.pth")


def test_a_network_without_parameters_serves_too():
    network = ModuleFeatures(nn.AdaptiveAvgPool2d(2), name="means")
    assert network(images(2))["features"].shape == (2, 3)
