"""The frozen teacher: its features against transformers' own, before and after the last norm."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ViTConfig,
)

from diffusers_eqvae.models.feature_teacher import FeatureTeacher

SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 7, "image_size": 28}


@pytest.fixture(scope="module", params=["dinov2", "dinov2_with_registers", "dinov3"])
def teacher_directory(request, tmp_path_factory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "dinov2":
        model = Dinov2Model(Dinov2Config(**SMALL, hidden_dropout_prob=0.5, drop_path_rate=0.5))
    elif request.param == "dinov3":
        model = DINOv3ViTModel(DINOv3ViTConfig(**SMALL, intermediate_size=16, num_register_tokens=3))
    else:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL, num_register_tokens=3))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def teacher(teacher_directory) -> FeatureTeacher:
    return FeatureTeacher.from_pretrained(teacher_directory, image_size=28)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (28, 28), (20, 30)])
def test_teacher_is_the_model_on_normalised_bicubic_images(teacher, teacher_directory, height, width):
    """Against a computation by hand: ImageNet's numbers, bicubic to 28 px on the short side, registers dropped."""
    pixels = torch.rand(2, 3, height, width) * 2 - 1
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    size = (28, 28) if height == width else (28, 42)
    images = (F.interpolate((pixels + 1) / 2, size=size, mode="bicubic", align_corners=False) - mean) / std
    model = AutoModel.from_pretrained(teacher_directory).eval()
    with torch.no_grad():
        tokens = model(images).last_hidden_state
    rows, columns = size[0] // 7, size[1] // 7
    registers = tokens.shape[1] - 1 - rows * columns
    assert registers == (0 if type(model) is Dinov2Model else 3)

    patch, global_feature = teacher(pixels)
    assert patch.shape == (2, 8, rows, columns) and patch.dtype == torch.float32
    torch.testing.assert_close(global_feature, tokens[:, 0], rtol=1e-4, atol=1e-5)
    for row in range(rows):
        for column in range(columns):
            token = tokens[:, 1 + registers + row * columns + column]
            torch.testing.assert_close(patch[:, :, row, column], token, rtol=1e-4, atol=1e-5)


def test_teacher_gives_its_features_before_the_last_norm_too(teacher, teacher_directory):
    raw = FeatureTeacher.from_pretrained(teacher_directory, image_size=28, final_norm=False)
    norm = getattr(raw.model, "layernorm", None) or raw.model.norm
    assert raw.last_norm is norm
    for module in (norm, teacher.last_norm):
        module.weight.data.copy_(torch.arange(8) / 4)
    pixels = torch.rand(2, 3, 28, 28) * 2 - 1
    for normed, before in zip(teacher(pixels), raw(pixels), strict=True):
        assert not torch.allclose(before, normed)
        torch.testing.assert_close(norm(before.movedim(1, -1)).movedim(-1, 1), normed)


def test_teacher_never_trains(teacher):
    torch.nn.Sequential(teacher).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    pixels = torch.rand(1, 3, 28, 28, requires_grad=True)
    assert torch.equal(teacher(pixels)[0], teacher(pixels)[0])
    assert not teacher(pixels)[0].requires_grad


def test_teacher_shows_448_px_as_32_tokens_per_side():
    with torch.device("meta"):
        teacher = FeatureTeacher(Dinov2Model(Dinov2Config(**(SMALL | {"patch_size": 14, "image_size": 518}))))
    assert teacher.input_size(256, 256) == (448, 448)
    assert teacher.input_size(256, 384) == (448, 672)


def test_unfit_teachers_are_refused(teacher):
    with pytest.raises(ValueError, match="multiple of its patch size 7; got 30"):
        FeatureTeacher(teacher.model, image_size=30)
    foreign = SimpleNamespace(config=ViTConfig())
    with pytest.raises(ValueError, match="type 'vit'"):
        FeatureTeacher(foreign)


def test_metadata_tell_teachers_apart(teacher, teacher_directory):
    again = FeatureTeacher.from_pretrained(teacher_directory, image_size=28, final_norm=False)
    assert again.metadata == teacher.metadata
    assert teacher.metadata["teacher"] == teacher_directory.rpartition("/")[2]  # no path of this machine
    next(iter(teacher.model.parameters())).data.mul_(1.001)
    changed = FeatureTeacher(teacher.model, image_size=56)
    differing = {key for key, value in changed.metadata.items() if value != again.metadata[key]}
    assert differing == {"teacher_hash", "teacher_image_size"}
