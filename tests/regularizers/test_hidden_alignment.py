"""REPA and VAE-REPA: what is compared with what, whom it moves, when it stops, and which data it needs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import Dinov2Config, Dinov2Model

from diffusers_eqvae.autoencoders import encode, encoder_features
from diffusers_eqvae.data.latent_format import FeatureSettings
from diffusers_eqvae.models.feature_projector import FeatureProjector
from diffusers_eqvae.objectives.flow_matching import FlowMatchingObjective
from diffusers_eqvae.objectives.masked_tokens import MaskedTokensObjective
from diffusers_eqvae.randomness import StepRandomness
from diffusers_eqvae.regularizers import build_regularizers
from diffusers_eqvae.regularizers.contrastive_flow import ContrastiveFlowRegularizer
from diffusers_eqvae.regularizers.repa import REPAArguments, REPARegularizer
from diffusers_eqvae.regularizers.vae_repa import VAEREPAArguments, VAEREPARegularizer
from diffusers_eqvae.regularizers.velocity_direction import VelocityDirectionRegularizer

from ..objectives.test_flow_matching import make_batch, make_model


@pytest.fixture
def teacher_directory(tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, patch_size=4, image_size=8
    )
    Dinov2Model(config).save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


def step(regularizer, batch, at: int = 0):
    model = make_model()
    objective = FlowMatchingObjective(model, {"it": regularizer})
    draw = objective.draw(batch, StepRandomness(0).at(at, 0))
    return model, objective(batch, draw)["terms"], objective, draw


def moved(model, loss) -> list[int]:
    """Blocks, counted from 1, that the loss has a gradient in."""
    loss.backward()
    return [n for n, block in enumerate(model.transformer_blocks, 1) if block.ff.linear_1.weight.grad is not None]


@pytest.fixture
def repa(teacher_directory):
    arguments = REPAArguments(repa_teacher=teacher_directory, repa_layer=2, repa_projector_size=8, repa_stop_at=7)
    return REPARegularizer.from_arguments(arguments, make_model())


def image_batch():
    return make_batch() | {
        "pixel_values": torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    }


def test_repa_is_the_cosine_to_the_teachers_patches_at_the_tokens(repa):
    """Written out: teacher images of 2 x 2 patches for 2 x 2 tokens, ImageNet's normalisation, the last LayerNorm."""
    batch = image_batch()
    model, terms, _, draw = step(repa, batch)
    teacher = repa.frozen_modules()[0]
    images = ((batch["pixel_values"] + 1) / 2 - teacher.mean) / teacher.std
    images = F.interpolate(images, size=(8, 8), mode="bicubic", align_corners=False)
    tokens = teacher.model(pixel_values=images).last_hidden_state[:, 1:]  # (B, 4, 12)
    sigmas = draw["sigmas"].view(-1, 1, 1, 1)
    noisy = (1 - sigmas) * batch["latents"] + sigmas * draw["noise"]
    hidden = model(
        noisy, 1000 * draw["sigmas"], batch["class_labels"], drop_labels=draw["drop_labels"], hidden_layers=(2,)
    ).hidden_states[2]
    layers = repa.projector.layers
    predicted = layers[4](F.silu(layers[2](F.silu(layers[0](hidden)))))
    expected = -F.cosine_similarity(predicted, tokens, dim=2).mean()
    torch.testing.assert_close(terms["it"], expected)


def test_repa_moves_the_projector_and_the_blocks_before_it(repa):
    model, terms, *_ = step(repa, image_batch())
    assert moved(model, terms["it"]) == [1, 2]
    after = [*model.transformer_blocks[2:].parameters(), *model.norm_out.parameters(), *model.proj_out.parameters()]
    assert after and all(weight.grad is None for weight in after)
    rows = model.modulation.weight.grad.view(26, -1).abs().sum(1)  # 6 vectors of each of 4 blocks, and the last 2
    assert rows[:12].all() and not rows[12:].any()
    for module in (model.patch_embed, model.time_embedder, model.class_embedder):
        assert all(weight.grad.any() for weight in module.parameters())
    assert all(weight.grad.abs().sum() > 0 for weight in repa.projector.parameters())
    assert all(weight.grad is None for weight in repa.frozen_modules()[0].parameters())
    assert list(repa.components()) == ["repa_projector"]


def test_repa_stops(repa):
    assert "it" in step(repa, image_batch(), at=6)[1]
    _, terms, objective, draw = step(repa, image_batch(), at=7)
    loss, _ = objective.total(objective(image_batch(), draw))
    assert "it" not in terms
    loss.backward()  # and its projector, idle now, still has a gradient: of zeros
    assert all(weight.grad is not None and not weight.grad.any() for weight in repa.projector.parameters())


def test_spatial_norm_takes_out_what_all_tokens_share(repa, teacher_directory):
    batch = image_batch()
    plain = repa.target(batch)
    repa.spatial_norm = 1.0
    normed = repa.target(batch)
    torch.testing.assert_close(normed.mean((2, 3)), torch.zeros(3, 12), atol=1e-5, rtol=0)
    torch.testing.assert_close(normed.std((2, 3)), torch.ones(3, 12), atol=1e-3, rtol=0)
    repa.spatial_norm = 0.5
    half = (plain - 0.5 * plain.mean((2, 3), keepdim=True)) / (plain.std((2, 3), keepdim=True) + 1e-6)
    torch.testing.assert_close(repa.target(batch), half)


def test_a_convolution_sees_neighbours_and_an_mlp_does_not():
    hidden = torch.randn(1, 9, 6, requires_grad=True)
    for kind, reached in (("mlp", 1), ("conv", 4)):
        projector = FeatureProjector(hidden_size=6, feature_size=5, kind=kind, projector_size=7)
        corner = projector(hidden, grid=(3, 3))[0, :, 0, 0].sum()
        (gradient,) = torch.autograd.grad(corner, hidden)
        assert int((gradient.abs().sum(2) > 0).sum()) == reached
    with pytest.raises(ValueError, match="must be mlp or conv; got 'linear'"):
        FeatureProjector(kind="linear")


def test_vae_repa_meets_what_the_encoders_last_convolution_reads(tiny_autoencoder_kl):
    pixels = image_batch()["pixel_values"]
    with encoder_features(tiny_autoencoder_kl) as seen, torch.no_grad():
        posterior = encode(tiny_autoencoder_kl, pixels)
    moments = tiny_autoencoder_kl.quant_conv(tiny_autoencoder_kl.encoder.conv_out(seen[0]))
    torch.testing.assert_close(moments.chunk(2, dim=1)[0], posterior.mean)

    arguments = VAEREPAArguments(vae_repa_layer=3, vae_repa_projector_size=8)
    features = {"vae_encoder": FeatureSettings(seen[0].shape[1:])}
    regularizer = VAEREPARegularizer.from_arguments(arguments, make_model(), features=features)
    batch = make_batch() | {"features.vae_encoder": seen[0]}
    model, terms, *_ = step(regularizer, batch)
    averaged = seen[0].reshape(3, -1, 2, 2, 2, 2).mean((3, 5))  # 4 x 4 positions onto 2 x 2 tokens
    torch.testing.assert_close(F.adaptive_avg_pool2d(seen[0], (2, 2)), averaged)
    predicted = regularizer.projector(torch.zeros(3, 4, 16), grid=(2, 2))
    torch.testing.assert_close(
        regularizer.compare(predicted, averaged), F.smooth_l1_loss(predicted, averaged, beta=0.05)
    )
    assert moved(model, terms["it"]) == [1, 2, 3]


def test_a_partner_is_the_neighbour_in_the_global_batch():
    batch = {name: torch.cat([value, value])[:4] for name, value in make_batch().items()}
    regularizer = ContrastiveFlowRegularizer(0.05)
    model, terms, objective, draw = step(regularizer, batch)
    sigmas = draw["sigmas"].view(-1, 1, 1, 1)
    target = draw["noise"] - batch["latents"]
    noisy = (1 - sigmas) * batch["latents"] + sigmas * draw["noise"]
    prediction = model(noisy, 1000 * draw["sigmas"], batch["class_labels"], drop_labels=draw["drop_labels"]).sample
    expected = -(prediction - target[[1, 0, 3, 2]]).square().mean()
    torch.testing.assert_close(terms["it"], expected)
    loss, _ = objective.total(objective(batch, draw))
    torch.testing.assert_close(loss, terms["flow"] + 0.05 * expected)
    with pytest.raises(ValueError, match="must be even; got 3"):
        step(regularizer, make_batch())


def test_the_direction_of_a_velocity_is_its_cosine_over_channels():
    _, terms, objective, _ = step(VelocityDirectionRegularizer(), make_batch())
    state = type("State", (), {})()
    state.target = torch.randn(2, 4, 3, 3)
    for factor, expected in ((3.0, 0.0), (-1.0, 2.0)):
        state.prediction = factor * state.target
        assert objective.regularizers["it"].penalty(state, {}, ()).item() == pytest.approx(expected, abs=1e-6)
    assert 0 < terms["it"].item() < 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("repa", {}, "repa reads the features dinov2-base or images, which these data do not hold"),
        ("vae_repa", {}, "vae_repa reads the features vae_encoder, which these data do not hold"),
    ],
)
def test_what_cannot_be_is_refused_at_the_start(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_regularizers([name], {"vae_repa": VAEREPAArguments(), "repa": REPAArguments()}, make_model(), **options)


def test_a_block_that_the_model_lacks_and_predictions_of_other_data_are_refused_at_the_start(tiny_maskgit):
    features = {"vae_encoder": FeatureSettings((4, 4, 4))}
    deep = VAEREPARegularizer.from_arguments(VAEREPAArguments(vae_repa_layer=5), make_model(), features=features)
    with pytest.raises(ValueError, match=r"deep reads the hidden states after block 5, and the model has .* 1 .. 4;"):
        FlowMatchingObjective(make_model(), {"deep": deep})
    for regularizer in (ContrastiveFlowRegularizer(), VelocityDirectionRegularizer()):
        with pytest.raises(ValueError, match="it compares predictions of latents, and MaskedTokensObjective trains a"):
            MaskedTokensObjective(tiny_maskgit, {"it": regularizer})


def test_hidden_states_of_tokens_are_aligned_at_their_places(tiny_maskgit):
    """A MaskGIT's sequence ends with the class, which is no place of the image: what the projector sees are the tokens
    of the grid, row by row."""
    features = {"vae_encoder": FeatureSettings((4, 4, 4))}
    arguments = VAEREPAArguments(vae_repa_layer=2, vae_repa_projector_size=8)
    regularizer = VAEREPARegularizer.from_arguments(arguments, tiny_maskgit, features=features)
    batch = {"tokens": torch.arange(32).view(2, 4, 4) % 16, "class_labels": torch.tensor([0, 2])}
    batch["features.vae_encoder"] = torch.randn(2, 4, 4, 4)
    objective = MaskedTokensObjective(tiny_maskgit, {"it": regularizer})
    draw = objective.draw(batch, StepRandomness(0))
    term = objective(batch, draw)["terms"]["it"]
    caught = []
    tiny_maskgit.transformer_blocks[1].register_forward_hook(lambda module, inputs, output: caught.append(output))
    visible = batch["tokens"].masked_fill(draw["masked"], 16)
    tiny_maskgit(visible, None, batch["class_labels"], drop_labels=draw["drop_labels"])
    assert caught[0].shape == (2, 17, 16)
    layers = regularizer.projector.layers
    predicted = layers[4](F.silu(layers[2](F.silu(layers[0](caught[0][:, :16])))))
    target = batch["features.vae_encoder"].permute(0, 2, 3, 1).reshape(2, 16, 4)
    torch.testing.assert_close(term, F.smooth_l1_loss(predicted, target, beta=0.05))
