"""The frozen teacher: its features against transformers' own, before and after the last norm."""

from __future__ import annotations

import math
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
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
)

from diffusers_eqvae.data.buckets import bucket_shapes
from diffusers_eqvae.models.feature_teacher import FeatureTeacher, teacher_difference, teacher_identity

SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 7, "image_size": 28}


@pytest.fixture(scope="module", params=["dinov2", "dinov2_with_registers", "dinov3", "siglip"])
def teacher_directory(request, tmp_path_factory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "dinov2":
        model = Dinov2Model(Dinov2Config(**SMALL, hidden_dropout_prob=0.5, drop_path_rate=0.5))
    elif request.param == "dinov3":
        model = DINOv3ViTModel(DINOv3ViTConfig(**SMALL, intermediate_size=16, num_register_tokens=3))
    elif request.param == "siglip":
        model = SiglipVisionModel(SiglipVisionConfig(**SMALL, intermediate_size=16))
    else:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL, num_register_tokens=3))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def teacher(teacher_directory) -> FeatureTeacher:
    return FeatureTeacher.from_pretrained(teacher_directory, image_size=28)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (28, 28), (20, 30)])
def test_teacher_is_the_model_on_normalised_bicubic_images(teacher, teacher_directory, height, width):
    """Against a computation by hand: ImageNet's numbers, bicubic to 28 x 28 px or as many, registers dropped.

    SigLIP's images have mean and deviation .5, its patches no token before them, and it gives no global feature.
    """
    pixels = torch.rand(2, 3, height, width) * 2 - 1
    siglip = teacher_directory.rpartition("/")[2].startswith("siglip")
    mean, std = (0.5,) * 3 if siglip else (0.485, 0.456, 0.406), (0.5,) * 3 if siglip else (0.229, 0.224, 0.225)
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (mean, std))
    size = (28, 28) if height == width else (21, 35)
    images = (F.interpolate((pixels + 1) / 2, size=size, mode="bicubic", align_corners=False) - mean) / std
    model = AutoModel.from_pretrained(teacher_directory).eval()
    with torch.no_grad():
        tokens = model(images, **({"interpolate_pos_encoding": True} if siglip else {})).last_hidden_state
    rows, columns = size[0] // 7, size[1] // 7
    registers = tokens.shape[1] - 1 - rows * columns
    assert registers == (-1 if siglip else 0 if type(model) is Dinov2Model else 3)

    patch, global_feature = teacher(pixels)
    assert patch.shape == (2, 8, rows, columns) and patch.dtype == torch.float32
    if siglip:
        assert global_feature is None
    else:
        torch.testing.assert_close(global_feature, tokens[:, 0], rtol=1e-4, atol=1e-5)
    for row in range(rows):
        for column in range(columns):
            token = tokens[:, 1 + registers + row * columns + column]
            torch.testing.assert_close(patch[:, :, row, column], token, rtol=1e-4, atol=1e-5)


def test_teacher_gives_its_features_before_the_last_norm_too(teacher, teacher_directory):
    raw = FeatureTeacher.from_pretrained(teacher_directory, image_size=28, final_norm=False)
    norm = raw.last_norm
    for module in (norm, teacher.last_norm):
        module.weight.data.copy_(torch.arange(8) / 4)
    pixels = torch.rand(2, 3, 28, 28) * 2 - 1
    for normed, before in zip(teacher(pixels), raw(pixels), strict=True):
        if before is None:
            continue
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


def test_teacher_sees_rectangles_as_large_as_squares(teacher):
    """Of as many pixels, so that a latent cell is as large to it; stretched by no more than whole patches ask for."""
    teacher = FeatureTeacher(teacher.model, image_size=448)
    side = teacher.patch_size
    for height, width in bucket_shapes(256, 8):
        sizes = teacher.input_size(height, width)
        assert all(size % side == 0 for size in sizes)
        for size, shown in zip((height, width), sizes, strict=True):
            assert abs(shown - size * 448 / math.sqrt(height * width)) <= side / 2
    assert teacher.input_size(64, 192) == (259, 777)
    pixels = torch.rand(1, 3, 64, 192)
    assert FeatureTeacher(teacher.model, image_size=28)(pixels)[0].shape[-2:] == (2, 7)


def test_unfit_teachers_are_refused(teacher):
    with pytest.raises(ValueError, match="multiple of its patch size 7; got 30"):
        FeatureTeacher(teacher.model, image_size=30)
    foreign = SimpleNamespace(config=ViTConfig())
    with pytest.raises(ValueError, match="type 'vit'"):
        FeatureTeacher(foreign)


def test_the_image_tower_of_a_whole_siglip_is_the_teacher(tmp_path):
    vision = SiglipVisionConfig(**SMALL, intermediate_size=16).to_dict()
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    tokens = {"vocab_size": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    whole = SiglipModel(SiglipConfig(vision_config=vision, text_config={**text, **tokens}))
    whole.save_pretrained(tmp_path / "siglip")
    teacher = FeatureTeacher.from_pretrained(tmp_path / "siglip", image_size=28)
    pixels = torch.rand(1, 3, 28, 28) * 2 - 1
    torch.testing.assert_close(teacher(pixels)[0], FeatureTeacher(whole.vision_model, image_size=28)(pixels)[0])


def test_files_tell_teachers_apart_without_loading_them(teacher_directory, tmp_path):
    identity = teacher_identity(teacher_directory)
    assert identity["teacher"] == teacher_directory.rpartition("/")[2] and len(identity["files"]) == 16
    named = {"teacher": "facebook/dinov2-base", "files": None}  # not to be had here
    assert teacher_identity("facebook/dinov2-base") == named
    assert teacher_difference(identity, {"teacher": "moved", "files": identity["files"]}) is None
    assert teacher_difference(identity | {"teacher": "facebook/dinov2-base"}, named) is None
    assert "is not facebook/dinov2-base (None)" in (teacher_difference(identity, named) or "")
    assert "is not" in (teacher_difference(identity, identity | {"files": "0" * 16}) or "")


def test_metadata_tell_teachers_apart(teacher, teacher_directory):
    again = FeatureTeacher.from_pretrained(teacher_directory, image_size=28, final_norm=False)
    assert again.metadata == teacher.metadata
    assert teacher.metadata["teacher"] == teacher_directory.rpartition("/")[2]  # no path of this machine
    next(iter(teacher.model.parameters())).data.mul_(1.001)
    changed = FeatureTeacher(teacher.model, image_size=56)
    differing = {key for key, value in changed.metadata.items() if value != again.metadata[key]}
    assert differing == {"teacher_hash", "teacher_image_size"}
