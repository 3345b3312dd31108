"""Alignment with a teacher: the penalty, what its gradient moves, and where its network comes from."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from transformers import Dinov2Config, Dinov2Model

from diffusers_eqvae.autoencoders import Posterior
from diffusers_eqvae.models.alignment_network import AlignmentNetwork
from diffusers_eqvae.models.autoencoder_kl_eq import AutoencoderKLEQ
from diffusers_eqvae.models.feature_teacher import FeatureTeacher
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
