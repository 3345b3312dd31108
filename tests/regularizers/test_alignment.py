"""Alignment with a teacher: the penalty, what its gradient moves, and where its network comes from."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from transformers import Dinov2Config, Dinov2Model, SiglipVisionConfig, SiglipVisionModel

from diffusers_eqvae.autoencoders import Posterior
from diffusers_eqvae.models.alignment_network import AlignmentNetwork
from diffusers_eqvae.models.autoencoder_kl_eq import AutoencoderKLEQ
from diffusers_eqvae.models.feature_teacher import FeatureTeacher
from diffusers_eqvae.perception.features import latent_features
from diffusers_eqvae.perception.heads import LinearSegmentationHead
from diffusers_eqvae.regularizers.alignment import AlignmentArguments, AlignmentRegularizer
from diffusers_eqvae.regularizers.base import AutoencoderState

SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 7, "image_size": 28}


@pytest.fixture
def teacher() -> FeatureTeacher:
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**SMALL))
    model.layernorm.weight.data.normal_()
    return FeatureTeacher(model, image_size=28, final_norm=False)


@pytest.fixture
def regularizer(teacher) -> AlignmentRegularizer:
    return AlignmentRegularizer(AlignmentNetwork.for_teacher(teacher, latent_channels=4, hidden_size=16), teacher)


def state_of(raw_latents, pixels) -> AutoencoderState:
    return AutoencoderState(Posterior(raw_latents), raw_latents, pixels, None, None)


def penalty(regularizer, raw_latents, pixels) -> torch.Tensor:
    return regularizer.penalty(state_of(raw_latents, pixels), {}, None)


def normed(teacher, tokens):
    """The teacher's last LayerNorm, written out."""
    norm = teacher.model.layernorm
    centred = tokens - tokens.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def test_its_weight_counts_once_per_element_of_a_summed_reconstruction(regularizer):
    assert regularizer.mean_over_elements, "a mean over positions beside a sum over pixels would be inert"


def test_penalty_is_cosine_after_the_norm_and_smooth_l1_before_it_of_patches_and_cls(regularizer, teacher):
    raw_latents, pixels = torch.randn(2, 4, 4, 4), torch.rand(2, 3, 28, 28)
    with torch.no_grad():
        tokens = teacher.model(
            pixel_values=((pixels + 1) / 2 - teacher.mean) / teacher.std, output_hidden_states=True
        ).hidden_states[-1]
    cells = raw_latents.permute(0, 2, 3, 1).reshape(2, 16, 4)
    hidden = regularizer.network.hidden(cells)
    pairs = (
        (regularizer.network.patch_head(hidden), tokens[:, 1:]),
        (regularizer.network.cls_head(hidden.mean(1)), tokens[:, 0]),
    )
    expected = 0.0
    for prediction, feature in pairs:
        n, m = normed(teacher, prediction), normed(teacher, feature)
        cosine = (n * m).sum(-1) / (n.norm(dim=-1) * m.norm(dim=-1))
        distance = (prediction - feature).abs()
        smooth = torch.where(distance < 1, distance.square() / 2, distance - 0.5)
        expected = expected + 0.9 * (1 - cosine.mean()) + 0.1 * smooth.mean()
    torch.testing.assert_close(penalty(regularizer, raw_latents, pixels), expected)


def test_a_network_may_leave_the_global_feature_out(teacher):
    options = {"latent_channels": 4, "hidden_size": 16}
    network = AlignmentNetwork.for_teacher(teacher, **options)
    patches_only = AlignmentNetwork.for_teacher(teacher, **options, global_feature=False)
    patches_only.load_state_dict(network.state_dict(), strict=False)
    raw_latents, pixels = torch.randn(2, 4, 4, 4), torch.rand(2, 3, 28, 28)
    both, one = (penalty(AlignmentRegularizer(each, teacher), raw_latents, pixels) for each in (network, patches_only))
    assert 0 < one < both


def test_penalty_moves_latents_and_the_whole_network_but_not_the_teacher(regularizer):
    raw_latents, pixels = torch.randn(2, 4, 4, 4, requires_grad=True), torch.rand(2, 3, 28, 28)
    penalty(regularizer, raw_latents, pixels).backward()
    assert raw_latents.grad.any()
    assert all(parameter.grad.any() for parameter in regularizer.parameters())
    assert all(parameter.grad is None for parameter in regularizer.teacher.parameters())


def test_latents_can_learn_both_kinds_of_features(regularizer, teacher):
    """Gradient descent on latents and network brings normalised and un-normalised features to the teacher's."""
    torch.manual_seed(0)
    raw_latents, pixels = torch.randn(1, 4, 4, 4, requires_grad=True), torch.rand(1, 3, 28, 28)
    optimizer = torch.optim.Adam([raw_latents, *regularizer.parameters()], lr=0.02)
    for _ in range(400):
        loss = penalty(regularizer, raw_latents, pixels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    predicted, (patch, _) = regularizer.network(raw_latents), teacher(pixels)
    unexplained = (predicted.patch - patch).square().mean() / patch.var(1).mean()
    directions = regularizer.network.normalize(predicted).patch, normed(teacher, patch.movedim(1, -1)).movedim(-1, 1)
    assert unexplained < 0.1 and F.cosine_similarity(*directions, dim=1).mean() > 0.95


def test_teacher_is_in_no_list_but_moves_along_and_is_shared_by_copies(regularizer):
    names = {name.split(".")[0] for name in regularizer.state_dict()}
    assert names == {"network"}
    assert {name.split(".")[0] for name, _ in regularizer.named_parameters()} == {"network"}
    assert {name for name, _ in regularizer.named_buffers()} == {"network.norm_weight", "network.norm_bias"}
    copied = copy.deepcopy(regularizer)
    assert copied.teacher is regularizer.teacher and copied.network is not regularizer.network
    assert regularizer.frozen_modules() == [regularizer.teacher] and not regularizer.train().teacher.training
    torch.nn.Sequential(regularizer).to("meta")
    assert next(regularizer.teacher.parameters()).device.type == "meta"
    assert regularizer.teacher.mean.device.type == "meta"


@pytest.mark.parametrize("grid", [(2, 2), (8, 8), (2, 8)])
def test_resampling_to_the_latent_grid_is_logged_once(regularizer, caplog, grid):
    raw_latents, pixels = torch.randn(1, 4, *grid), torch.rand(1, 3, 28, 28)
    with caplog.at_level(logging.INFO, logger="diffusers_eqvae.regularizers.alignment"):
        first = penalty(regularizer, raw_latents, pixels)
        second = penalty(regularizer, raw_latents, pixels)
    assert torch.equal(first, second)
    assert [record.getMessage() for record in caplog.records] == [
        f"The teacher's 4x4 features are resampled to the {grid[0]}x{grid[1]} latent positions."
    ]


class Ramp(FeatureTeacher):
    """A teacher whose first channel rises from left to right, 0 .. 3 on a 4x4 grid; the other alternates."""

    def forward(self, pixels):
        ramp = torch.arange(4.0).expand(len(pixels), 4, 4)
        channels = [ramp, *(torch.full_like(ramp, float(number)) for number in range(1, 8))]
        return torch.stack(channels, 1), torch.ones(len(pixels), 8)


@pytest.mark.parametrize(
    ("width", "expected"), [(8, [0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0]), (4, [0.0, 1.0, 2.0, 3.0])]
)
def test_resampled_features_stay_linear_between_positions(teacher, width, expected):
    """The penalty is least, zero but for the cosine's rounding, where the prediction is the resampled ramp."""
    ramp = Ramp(teacher.model, image_size=28, final_norm=False)
    network = AlignmentNetwork.for_teacher(ramp, latent_channels=8, hidden_size=16, global_feature=False)
    network.hidden, network.patch_head = torch.nn.Identity(), torch.nn.Identity()
    fixed = [float(number) for number in range(1, 8)]
    raw_latents = torch.tensor([[value, *fixed] for value in expected]).T.view(1, 8, 1, width)
    raw_latents = raw_latents.expand(1, 8, 8, width).contiguous()
    at = penalty(AlignmentRegularizer(network, ramp), raw_latents, torch.zeros(1, 3, 28, 28))
    assert at.abs() < 1e-5
    raw_latents[:, 0, :, 1] += 0.3
    assert penalty(AlignmentRegularizer(network, ramp), raw_latents, torch.zeros(1, 3, 28, 28)) > 1e-4


def test_a_coarser_grid_averages(teacher):
    ramp = Ramp(teacher.model, image_size=28, final_norm=False)
    network = AlignmentNetwork.for_teacher(ramp, latent_channels=8, hidden_size=16, global_feature=False)
    network.hidden, network.patch_head = torch.nn.Identity(), torch.nn.Identity()
    mean = torch.tensor([1.5, *range(1, 8)]).view(1, 8, 1, 1)
    assert penalty(AlignmentRegularizer(network, ramp), mean, torch.zeros(1, 3, 28, 28)).abs() < 1e-5


def test_features_of_a_rectangle_lie_where_its_latents_do(regularizer):
    """What the teacher says of a place, as how far down and to the right that is, is met by the latents there."""

    def places(height: int, width: int) -> torch.Tensor:
        sides = ((torch.arange(side) + 0.5) / side for side in (height, width))
        return torch.stack(torch.meshgrid(*sides, indexing="ij"))

    found = regularizer._on_latent_grid(places(12, 21)[None], torch.zeros(1, 4, 6, 10))[0]
    assert found.shape == (2, 6, 10)
    assert (found - places(6, 10))[:, 1:-1, 1:-1].abs().max() < 0.005


@pytest.fixture
def arguments(teacher, tmp_path) -> AlignmentArguments:
    teacher.model.save_pretrained(tmp_path / "teacher")
    return AlignmentArguments(
        alignment_teacher=str(tmp_path / "teacher"),
        alignment_image_size=14,
        alignment_hidden_size=12,
        alignment_weight=0.25,
        alignment_adaptive=False,
    )


def test_a_new_network_is_built_from_arguments(arguments, tiny_autoencoder_kl):
    regularizer = AlignmentRegularizer.from_arguments(arguments, tiny_autoencoder_kl)
    assert (regularizer.weight, regularizer.adaptive) == (0.25, False)
    config = regularizer.network.config
    assert (config.latent_channels, config.hidden_size, config.feature_size) == (4, 12, 8)
    assert (config.teacher, config.teacher_image_size) == ("teacher", 14)
    assert regularizer.teacher.image_size == 14 and regularizer.components() == {
        "alignment_network": regularizer.network
    }


def test_training_goes_on_with_the_network_beside_the_autoencoder(arguments, tiny_autoencoder_kl, tmp_path):
    first = AlignmentRegularizer.from_arguments(arguments, tiny_autoencoder_kl)
    first.network.patch_head.bias.data.fill_(3.0)
    tiny_autoencoder_kl.save_pretrained(tmp_path / "run")
    for folder, network in first.components().items():
        network.save_pretrained(tmp_path / "run" / folder)
    vae = AutoencoderKLEQ.from_pretrained(tmp_path / "run")
    again = AlignmentRegularizer.from_arguments(arguments, vae)
    assert all(map(torch.equal, again.network.state_dict().values(), first.network.state_dict().values()))
    arguments.alignment_image_size = 28
    with pytest.raises(ValueError, match=r"teacher_image_size=14 .* has teacher_image_size=28"):
        AlignmentRegularizer.from_arguments(arguments, vae)


def test_network_and_teacher_must_agree(teacher):
    with pytest.raises(ValueError, match="feature_size=6"):
        AlignmentRegularizer(AlignmentNetwork(latent_channels=4, hidden_size=8, feature_size=6), teacher)
    after_norm = FeatureTeacher(teacher.model, image_size=28)
    with pytest.raises(ValueError, match="final_norm=False"):
        AlignmentRegularizer(AlignmentNetwork.for_teacher(teacher, latent_channels=4, hidden_size=8), after_norm)


def test_each_part_has_its_weight_and_one_of_no_weight_is_not_there(arguments, tiny_autoencoder_kl):
    """L = a (c (1 - cos) + s smooth) of patches + b of the global feature, against the two parts computed alone."""

    def term(**options):
        torch.manual_seed(0)
        given = AlignmentArguments(**{**vars(arguments), **options})
        regularizer = AlignmentRegularizer.from_arguments(given, tiny_autoencoder_kl)
        generator = torch.Generator().manual_seed(1)
        raw_latents, pixels = (
            torch.randn(2, 4, 2, 2, generator=generator),
            torch.rand(2, 3, 28, 28, generator=generator),
        )
        return regularizer, penalty(regularizer, raw_latents, pixels).item()

    def part(name, **options):  # the network is drawn in the same order, whatever takes part
        both = {"alignment_patch_weight": 1e-12, "alignment_global_weight": 1e-12}
        return term(**{**both, f"alignment_{name}_weight": 1.0}, **options)[1]

    cosine, smooth = {"alignment_smooth_l1_weight": 0.0}, {"alignment_cosine_weight": 0.0}
    unit = {"alignment_cosine_weight": 1.0, "alignment_smooth_l1_weight": 1.0}
    parts = [part(name, **(unit | only)) for name in ("patch", "global") for only in (cosine, smooth)]
    weights = {"alignment_patch_weight": 2.0, "alignment_global_weight": 3.0, "alignment_cosine_weight": 0.5}
    _, given = term(**weights, alignment_smooth_l1_weight=0.25)
    expected = 2 * (0.5 * parts[0] + 0.25 * parts[1]) + 3 * (0.5 * parts[2] + 0.25 * parts[3])
    assert given == pytest.approx(expected, rel=1e-5) and min(parts) > 0

    patches, _ = term(alignment_global_weight=0.0)
    assert patches.network.cls_head is None and patches.features_of(arguments) == ("teacher", "teacher.global")
    whole, _ = term(alignment_patch_weight=0.0)
    assert not whole.network.config.patch_feature
    raw_latents = torch.randn(1, 4, 2, 2)
    penalty(whole, raw_latents, torch.rand(1, 3, 28, 28)).backward()
    assert whole.network.patch_head.weight.grad is None and whole.network.cls_head.weight.grad.any()
    with pytest.raises(ValueError, match="trained to predict the global feature of an image alone"):
        latent_features(raw_latents, whole.network)


def test_depth_and_a_convolution_are_choices_of_the_network(arguments, tiny_autoencoder_kl):
    def network(**options):
        given = AlignmentArguments(**{**vars(arguments), **options})
        return AlignmentRegularizer.from_arguments(given, tiny_autoencoder_kl).network

    deep = network(alignment_depth=4)
    assert [layer.weight.shape[0] for layer in deep.hidden if hasattr(layer, "weight")] == [12] * 4
    conv = network(alignment_projector="conv", alignment_global_weight=0.0, alignment_hidden_size=2048)
    latents = torch.randn(1, 4, 5, 5, requires_grad=True)
    assert conv(latents).patch.shape == (1, 8, 5, 5) and conv(latents).cls is None
    (gradient,) = torch.autograd.grad(conv(latents).patch[0, :, 0, 0].sum(), latents)
    assert int(gradient.abs().sum(1).bool().sum()) == 4  # the corner and what is beside it
    for options, message in (
        ({"alignment_projector": "conv"}, "conv gives no global feature; set alignment_global_weight to 0"),
        ({"alignment_patch_weight": 0.0, "alignment_global_weight": 0.0}, "are both 0: nothing is aligned"),
        ({"alignment_cosine_weight": 0.0, "alignment_smooth_l1_weight": 0.0}, "are both 0: nothing is compared"),
        ({"alignment_patch_weight": 0.0, "alignment_spatial_norm": 1.0}, "spatial_norm is of patch features"),
        (
            {"alignment_projector": "conv", "alignment_global_weight": 0.0, "alignment_depth": 3},
            "alignment_depth are of the mlp",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            AlignmentArguments(**options)


def test_spatially_normalised_targets_are_irepas_and_no_heads(teacher):
    """Written out in float64: the LayerNorm, then (f - gamma mean) / std over the positions; cosine and smooth L1."""
    network = AlignmentNetwork.for_teacher(
        teacher, latent_channels=4, hidden_size=16, global_feature=False, spatial_norm=0.6
    )
    raw_latents, pixels = torch.randn(2, 4, 4, 4), torch.rand(2, 3, 28, 28)
    term = penalty(AlignmentRegularizer(network, teacher), raw_latents, pixels)
    tokens = normed(teacher, teacher(pixels)[0].flatten(2).transpose(1, 2)).double()
    target = (tokens - 0.6 * tokens.mean(1, keepdim=True)) / tokens.std(1, keepdim=True)
    predicted = network(raw_latents).patch.flatten(2).transpose(1, 2).double()
    distance = (predicted - target).abs()
    smooth = torch.where(distance < 1, distance.square() / 2, distance - 0.5).mean()
    expected = 0.9 * (1 - F.cosine_similarity(predicted, target, dim=2).mean()) + 0.1 * smooth
    torch.testing.assert_close(term.double(), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"normalised over the positions of an image \(spatial_norm\)"):
        LinearSegmentationHead(8, 3).check_network(network)


def test_siglip_has_no_global_feature_to_align_with(tmp_path, arguments, tiny_autoencoder_kl):
    vision = SiglipVisionModel(SiglipVisionConfig(**SMALL, intermediate_size=16))
    vision.save_pretrained(tmp_path / "siglip")
    options = {**vars(arguments), "alignment_teacher": str(tmp_path / "siglip")}
    with pytest.raises(ValueError, match=r"siglip_vision_model has no global .* \(alignment_global_weight 0\)"):
        AlignmentRegularizer.from_arguments(AlignmentArguments(**options), tiny_autoencoder_kl)
    given = AlignmentArguments(**options | {"alignment_global_weight": 0.0})
    regularizer = AlignmentRegularizer.from_arguments(given, tiny_autoencoder_kl)
    raw_latents = torch.randn(1, 4, 2, 2, requires_grad=True)
    penalty(regularizer, raw_latents, torch.rand(1, 3, 28, 28)).backward()
    assert raw_latents.grad.any()


def test_the_saved_network_is_what_is_asked_for_or_refused(arguments, tiny_autoencoder_kl, tmp_path):
    first = AlignmentRegularizer.from_arguments(arguments, tiny_autoencoder_kl)
    tiny_autoencoder_kl.save_pretrained(tmp_path / "run")
    first.network.save_pretrained(tmp_path / "run" / "alignment_network")
    vae = AutoencoderKLEQ.from_pretrained(tmp_path / "run")
    arguments.alignment_hidden_size = 16
    with pytest.raises(ValueError, match=r"beside the autoencoder has hidden_size=12, not 16; ask for what it has"):
        AlignmentRegularizer.from_arguments(arguments, vae)
