"""Alignment with a teacher: the loss, the network, the frozen teacher, and the regularizer that joins them."""

from __future__ import annotations

import logging
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

from diffusers_eqvae.losses.alignment import alignment_loss
from diffusers_eqvae.models.alignment_network import AlignmentNetwork
from diffusers_eqvae.models.autoencoder_kl_aligned import AutoencoderKLAligned
from diffusers_eqvae.models.feature_teacher import FeatureTeacher
from diffusers_eqvae.regularizers.alignment import AlignmentRegularizer

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


@pytest.fixture
def regularizer(teacher) -> AlignmentRegularizer:
    return AlignmentRegularizer(AlignmentNetwork(latent_channels=4, hidden_size=16, feature_size=8), teacher)


def state_of(raw_latents, pixels):
    return SimpleNamespace(raw_latents=raw_latents, pixels=pixels)


def test_loss_is_zero_at_equality_and_its_formula_elsewhere():
    feature, prediction = torch.randn(2, 2, 5, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(alignment_loss(feature, feature), torch.zeros((), dtype=torch.float64))
    cosine = (feature * prediction).sum(1) / (feature.norm(dim=1) * prediction.norm(dim=1))
    difference = (feature - prediction).abs()
    smooth = torch.where(difference < 1, 0.5 * difference**2, difference - 0.5).mean()
    torch.testing.assert_close(alignment_loss(prediction, feature), 0.9 * (1 - cosine.mean()) + 0.1 * smooth)
    opposite = alignment_loss(-feature, feature, cosine_weight=1.0, smooth_l1_weight=0.0)
    torch.testing.assert_close(opposite, torch.tensor(2.0, dtype=torch.float64))


def test_loss_is_float32_and_refuses_unequal_shapes():
    half = torch.randn(2, 8, 3, 3).bfloat16()
    assert alignment_loss(half, half.float()).dtype == torch.float32
    with pytest.raises(ValueError, match="equal shapes"):
        alignment_loss(half, half[:1])


def test_network_treats_every_cell_alike_and_pools_the_global_feature():
    network = AlignmentNetwork(latent_channels=4, hidden_size=16, feature_size=6)
    latents = torch.randn(2, 4, 3, 5)
    output = network(latents)
    assert output.patch.shape == (2, 6, 3, 5) and output.cls.shape == (2, 6)
    turned = network(latents.rot90(1, (-2, -1)))
    torch.testing.assert_close(turned.patch, output.patch.rot90(1, (-2, -1)))
    torch.testing.assert_close(turned.cls, output.cls)
    torch.testing.assert_close(network(latents[:, :, 1:2, 2:3]).patch, output.patch[:, :, 1:2, 2:3])


def test_network_without_a_global_feature_and_with_wrong_channels():
    network = AlignmentNetwork(latent_channels=16, hidden_size=8, feature_size=6, global_feature=False)
    assert network(torch.zeros(1, 16, 2, 2)).cls is None
    with pytest.raises(ValueError, match="16, h, w"):
        network(torch.zeros(1, 4, 2, 2))


def test_network_of_the_paper_has_two_hidden_layers_of_2048():
    with torch.device("meta"):
        network = AlignmentNetwork()
    expected = 4 * 2048 + 2048 + 2048 * 2048 + 2048 + 2 * (2048 * 1024 + 1024)
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


def test_network_saves_and_loads(tmp_path):
    network = AlignmentNetwork(latent_channels=4, hidden_size=16, feature_size=6)
    network.save_pretrained(tmp_path)
    latents = torch.randn(1, 4, 2, 2)
    assert torch.equal(AlignmentNetwork.from_pretrained(tmp_path)(latents).patch, network(latents).patch)


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
    for module in (norm, getattr(teacher.model, "layernorm", None) or teacher.model.norm):
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


def test_teacher_shows_448_px_as_32_tokens_a_side():
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


def test_penalty_is_patch_plus_global_loss(regularizer):
    latents, pixels = torch.randn(2, 4, 4, 4), torch.rand(2, 3, 28, 28)
    patch, cls = regularizer.teacher(pixels)
    output = regularizer.network(latents)
    expected = alignment_loss(output.patch, patch) + alignment_loss(output.cls, cls)
    torch.testing.assert_close(regularizer.penalty(state_of(latents, pixels), {}, None), expected)


@pytest.mark.parametrize("part", ["patch", "cls"])
def test_patch_and_global_features_each_move_network_and_latents(regularizer, part):
    latents, pixels = torch.randn(2, 4, 4, 4, requires_grad=True), torch.rand(2, 3, 28, 28)
    patch, cls = regularizer.teacher(pixels)
    output = regularizer.network(latents)
    alignment_loss(getattr(output, part), patch if part == "patch" else cls).backward()
    assert latents.grad.any()
    own, other = ("patch_head", "cls_head") if part == "patch" else ("cls_head", "patch_head")
    grads = {name: parameter.grad for name, parameter in regularizer.network.named_parameters()}
    assert all(grads[name].any() for name in grads if name.startswith(("hidden", own)))
    assert all(grads[name] is None for name in grads if name.startswith(other))


def test_penalty_moves_everything_but_the_teacher(regularizer):
    latents, pixels = torch.randn(2, 4, 4, 4, requires_grad=True), torch.rand(2, 3, 28, 28)
    regularizer.penalty(state_of(latents, pixels), {}, None).backward()
    assert latents.grad.any()
    assert all(parameter.grad.any() for parameter in regularizer.parameters())
    assert all(parameter.grad is None for parameter in regularizer.teacher.parameters())


def test_teacher_is_in_no_list_but_moves_along(regularizer):
    names = {name.split(".")[0] for name in regularizer.state_dict()}
    assert names == {"network"}
    assert {name.split(".")[0] for name, _ in regularizer.named_parameters()} == {"network"}
    assert len(list(regularizer.buffers())) == 0
    torch.nn.Sequential(regularizer).to("meta")
    assert next(regularizer.teacher.parameters()).device.type == "meta"
    assert regularizer.teacher.mean.device.type == "meta"


@pytest.mark.parametrize("grid", [(2, 2), (8, 8), (2, 8)])
def test_features_are_resampled_to_the_latent_grid_and_said_once(regularizer, caplog, grid):
    latents, pixels = torch.randn(1, 4, *grid), torch.rand(1, 3, 28, 28)
    with caplog.at_level(logging.INFO, logger="diffusers_eqvae.regularizers.alignment"):
        first = regularizer.penalty(state_of(latents, pixels), {}, None)
        second = regularizer.penalty(state_of(latents, pixels), {}, None)
    assert torch.equal(first, second)
    assert [record.getMessage() for record in caplog.records] == [
        f"The teacher's 4x4 features are resampled to the {grid[0]}x{grid[1]} latent cells; said once."
    ]


def test_resampling_keeps_what_is_linear_and_averages():
    """A ramp stays a ramp on a finer grid's inside; on a coarser grid the mean is kept."""
    ramp = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    resample = AlignmentRegularizer._on_latent_grid
    told = SimpleNamespace(_told_about_grids=True)
    fine = resample(told, ramp, torch.zeros(1, 4, 8, 8))
    torch.testing.assert_close(fine[0, 0, 0, 1:7], torch.arange(6) * 0.5 + 0.25)
    coarse = resample(told, ramp, torch.zeros(1, 4, 2, 2))
    torch.testing.assert_close(coarse.mean(), ramp.mean())
    assert resample(told, ramp, torch.zeros(1, 4, 4, 4)) is ramp


def test_built_from_arguments(teacher_directory, tiny_autoencoder_kl):
    arguments = SimpleNamespace(
        alignment_teacher=teacher_directory,
        alignment_image_size=14,
        alignment_final_norm=True,
        alignment_hidden_size=12,
        alignment_weight=0.25,
        alignment_adaptive=False,
    )
    regularizer = AlignmentRegularizer.from_arguments(arguments, tiny_autoencoder_kl)
    assert (regularizer.weight, regularizer.adaptive) == (0.25, False)
    config = regularizer.network.config
    assert (config.latent_channels, config.hidden_size, config.feature_size) == (4, 12, 8)
    assert regularizer.teacher.image_size == 14
    vae = AutoencoderKLAligned.from_config(tiny_autoencoder_kl.config)
    vae.set_alignment_network(regularizer.network)
    assert AlignmentRegularizer.from_arguments(arguments, vae).network is regularizer.network
    vae.set_alignment_network(AlignmentNetwork(latent_channels=4, hidden_size=12, feature_size=6))
    with pytest.raises(ValueError, match="aligned with features of size 6"):
        AlignmentRegularizer.from_arguments(arguments, vae)


def test_network_and_teacher_must_agree(teacher):
    with pytest.raises(ValueError, match="feature_size=8"):
        AlignmentRegularizer(AlignmentNetwork(latent_channels=4, hidden_size=8, feature_size=6), teacher)
