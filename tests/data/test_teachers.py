"""Feature networks as teachers: their own map at every region, resampled to their stride, known by its weights."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from diffusers_eqvae.data.image_features import TeacherFeatures, feature_name, feature_networks
from diffusers_eqvae.data.teachers import NetworkTeacher, identity_of, load_teacher, network_name
from diffusers_eqvae.metrics.feature_networks import ModuleFeatures, load_feature_network
from diffusers_eqvae.models.alignment_network import AlignmentNetwork, AlignmentOutput
from diffusers_eqvae.models.feature_teacher import FeatureTeacher
from diffusers_eqvae.regularizers.alignment import AlignmentArguments, AlignmentRegularizer
from diffusers_eqvae.regularizers.vf import VFArguments, VFRegularizer


def network(stride: int = 4, *, kernel: int = 4, seed: int = 0) -> ModuleFeatures:
    torch.manual_seed(seed)
    return ModuleFeatures(nn.Conv2d(3, 5, kernel, 4), name="patches", stride=stride)


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory) -> str:
    """ "squeezenet=FILE" of random weights."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "squeezenet.safetensors"
    save_file(torchvision.models.squeezenet1_1(weights=None).state_dict(), path)
    return f"squeezenet={path}"


def test_a_region_has_what_the_network_makes_of_it():
    """Written out in float64: ImageNet's mean and std, the kernel on each 4 px patch; the global one is their mean."""
    given = network()
    pixels = torch.rand(2, 3, 8, 32) * 2 - 1
    patch, average = NetworkTeacher(given, image_size=16)(pixels)
    mean, std = (torch.tensor(each).double().view(3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    images = ((pixels.double() + 1) / 2 - mean) / std
    weight, bias = given.module.weight.double(), given.module.bias.double()
    assert patch.shape == (2, 5, 2, 8) and patch.dtype == torch.float32
    for row in range(2):
        for column in range(8):
            cell = images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            expected = torch.einsum("bchw,dchw->bd", cell, weight) + bias
            torch.testing.assert_close(patch[:, :, row, column].double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(average, patch.mean((2, 3)))


def test_the_global_feature_is_the_one_that_images_are_measured_by():
    given, images = network(kernel=6), torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    _, average = NetworkTeacher(given, image_size=16)(images.float() / 127.5 - 1)
    torch.testing.assert_close(average, given(images)["features"], atol=1e-5, rtol=1e-5)


def test_a_map_that_lost_its_border_is_stretched_to_the_stride():
    """A 6 px kernel of stride 4 leaves 3 x 3 positions of 16 px, which stand for 4 x 4."""
    given, pixels = network(kernel=6), torch.rand(1, 3, 16, 16) * 2 - 1
    teacher = NetworkTeacher(given, image_size=16)
    patch, _ = teacher(pixels)
    own = given.module(((pixels + 1) / 2 - teacher.mean) / teacher.std)
    assert own.shape[-2:] == (3, 3) and patch.shape[-2:] == (4, 4)
    across = torch.tensor([0.0, 0.625, 1.375, 2.0])  # centres of 4 cells in the coordinates of 3, held at the border
    for column, place in enumerate(across):
        left, share = int(place.clamp(max=1)), place - int(place.clamp(max=1))
        expected = (1 - share) * own[..., 0, left] + share * own[..., 0, left + 1]
        torch.testing.assert_close(patch[..., 0, column], expected)


def test_it_is_frozen_and_moves_along():
    teacher = NetworkTeacher(network(), image_size=8)
    nn.Sequential(teacher).train()
    assert isinstance(teacher, FeatureTeacher) and not any(module.training for module in teacher.modules())
    patch, _ = teacher(torch.rand(1, 3, 8, 8, requires_grad=True))
    assert not patch.requires_grad and not any(each.requires_grad for each in teacher.parameters())
    assert {each.device.type for each in teacher.to("meta").parameters()} == {"meta"}


def test_its_identity_is_the_one_that_cards_state_and_holds_no_path(squeezenet, tmp_path):
    teacher, measured = load_teacher(squeezenet, image_size=64), load_feature_network(squeezenet)
    assert teacher.metadata["teacher_hash"] == measured.weights_hash == identity_of(squeezenet)["files"]
    assert (teacher.metadata["teacher"], teacher.metadata["norm_eps"]) == ("squeezenet1_1", None)
    assert str(squeezenet).partition("=")[2] not in json.dumps(teacher.metadata)
    other = NetworkTeacher(network(seed=1), image_size=8).metadata
    changed = {key for key, value in NetworkTeacher(network(), image_size=8).metadata.items() if other[key] != value}
    assert changed == {"teacher_hash"}


def test_names_of_networks_and_of_vision_models(tmp_path, monkeypatch):
    assert network_name("squeezenet") == network_name("squeezenet=x.pth") == feature_name("squeezenet=x/y.pth")
    assert network_name("facebook/dinov2-base") is None and network_name("./squeezenet") is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "squeezenet").mkdir()  # a vision model of the same name is in a directory here
    assert network_name("squeezenet") is None and feature_name("squeezenet") == "squeezenet"
    with pytest.raises(
        ValueError, match=r"There is no feature network 'resnet'; there are cifar_resnet, dinov2, incep"
    ):
        load_teacher("resnet=weights.pth")
    with pytest.raises(FileNotFoundError, match=r"absent\.pth does not exist\. Name a copy \(squeezenet=FILE\)"):
        load_teacher("squeezenet=absent.pth")


def test_what_is_no_teacher_is_refused():
    vector = ModuleFeatures(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), name="vector")
    with pytest.raises(ValueError, match=r"vector gives one feature of an image.* has a feature map \(its `stride`\)"):
        NetworkTeacher(vector)
    vector.stride = 4
    with pytest.raises(ValueError, match=r"vector states a stride of 4, .* about 2 positions .* got a map \(1, 3\)"):
        NetworkTeacher(vector, image_size=8)
    with pytest.raises(
        ValueError, match=r"patches states a stride of 16, .* about 4 pos.* got a map \(1, 5, 16, 16\)"
    ):
        NetworkTeacher(network(16), image_size=64)
    with pytest.raises(ValueError, match="must be a positive multiple of the stride 4 of patches; got 30"):
        NetworkTeacher(network(), image_size=30)
    with pytest.raises(ValueError, match="patches cannot see images of 4 px; show it larger ones: "):
        NetworkTeacher(network(kernel=6), image_size=4)


def test_alignment_compares_its_features_as_they_are(tiny_autoencoder_kl, squeezenet):
    """No LayerNorm: the cosine is of the features themselves, and the network's config says so (norm_eps None)."""
    options = {"alignment_teacher": squeezenet, "alignment_image_size": 64, "alignment_hidden_size": 8}
    regularizer = AlignmentRegularizer.from_arguments(AlignmentArguments(**options), tiny_autoencoder_kl)
    raw_latents, pixels = torch.randn(2, 4, 4, 4, requires_grad=True), torch.rand(2, 3, 32, 32) * 2 - 1
    predicted, (patch, average) = regularizer.network(raw_latents), regularizer.teacher(pixels)
    expected = 0.0
    for ours, theirs in ((predicted.patch, patch), (predicted.cls, average)):
        cosine = (ours * theirs).sum(1) / (ours.norm(dim=1) * theirs.norm(dim=1)).clamp(min=1e-8)
        distance = (ours - theirs).abs()
        smooth = torch.where(distance < 1, distance.square() / 2, distance - 0.5).mean()
        expected = expected + 0.9 * (1 - cosine.mean()) + 0.1 * smooth
    loss = regularizer.loss(raw_latents, pixels)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert raw_latents.grad.any() and all(each.grad.any() for each in regularizer.parameters())
    config = regularizer.network.config
    assert (config.teacher, config.teacher_type, config.norm_eps) == ("squeezenet1_1", "squeezenet1_1", None)
    features = AlignmentOutput(patch, average)
    assert torch.equal(AlignmentNetwork(feature_size=512, norm_eps=None).normalize(features).patch, patch)


def test_vf_is_of_its_map_and_its_projection_knows_the_teacher(tiny_autoencoder_kl, squeezenet, tmp_path):
    options = {"vf_teacher": squeezenet, "vf_image_size": 64}
    regularizer = VFRegularizer.from_arguments(VFArguments(**options), tiny_autoencoder_kl)
    config = regularizer.projection.config
    assert (config.teacher, config.feature_size) == ("squeezenet1_1", 512) and len(config.teacher_hash) == 16
    tiny_autoencoder_kl.save_pretrained(tmp_path / "run")
    regularizer.projection.save_pretrained(tmp_path / "run" / "vf_projection")
    beside = type(tiny_autoencoder_kl).from_pretrained(tmp_path / "run")
    again = VFRegularizer.from_arguments(VFArguments(**options), beside)
    assert torch.equal(again.projection.projection.weight, regularizer.projection.projection.weight)
    regularizer.projection.register_to_config(teacher_hash="0" * 16)
    regularizer.projection.save_pretrained(tmp_path / "run" / "vf_projection")
    with pytest.raises(ValueError, match=rf"has teacher_hash={'0' * 16}, and {config.teacher_hash} is needed"):
        VFRegularizer.from_arguments(VFArguments(**options), beside)


def test_its_features_are_stored_with_their_average_whichever_norm_is_asked_for(tiny_autoencoder_kl, squeezenet):
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    patch, average = load_teacher(squeezenet, grid=(4, 4))(pixels)
    for before_norm in (False, True):
        stored = TeacherFeatures(squeezenet, (4, 4), dtype="float16", before_norm=before_norm)
        given = stored(pixels, [])
        assert torch.equal(given["features.squeezenet"], patch)
        assert torch.equal(given["features.squeezenet.global"], average) and len(given) == 2
        settings = stored.features["squeezenet"]
        assert (settings.shape, settings.identity["final_norm"]) == ((512, 4, 4), None)
        assert settings.identity["teacher_image_size"] == 64
    with pytest.raises(ValueError, match="squeezenet is given twice"):
        feature_networks([squeezenet, "squeezenet"], tiny_autoencoder_kl, resolution=32)
    assert F.cosine_similarity(patch[0].flatten(), patch[1].flatten(), dim=0) < 1  # of the images, not a constant
