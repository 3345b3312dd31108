"""The one-forward-one-backward step has the gradients of the plain one, and moves exactly what it should."""

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn

from diffusers_eqvae.autoencoders import last_decoder_layer
from diffusers_eqvae.equivariance import TauDistribution
from diffusers_eqvae.losses.perceptual import LPIPS
from diffusers_eqvae.models.discriminator import PatchDiscriminator
from diffusers_eqvae.objectives._last_layer import LastLayer
from diffusers_eqvae.objectives.autoencoder import (
    AutoencoderLossWeights,
    AutoencoderObjective,
    AutoencoderStep,
)
from diffusers_eqvae.randomness import StepRandomness
from diffusers_eqvae.regularizers import AutoencoderRegularizer, EquivarianceRegularizer

from ..golden import plain_autoencoder_step as plain


class LatentSquare(AutoencoderRegularizer):
    """The simplest penalty: mean square of the latents."""

    def __init__(self, weight: float, adaptive: bool) -> None:
        super().__init__()
        self.weight, self.adaptive = weight, adaptive

    def penalty(self, state, batch, draw):
        return state.raw_latents.square().mean()


class SecondDecoding(AutoencoderRegularizer):
    """A further pair that is the first one again, at some weight."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.pair_weight = weight

    def decodings(self, state, draw):
        return [(state.raw_latents, state.pixels, self.pair_weight)]


class Counter(nn.Module):
    """Counts the calls of the module it wraps."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *args):
        self.calls += 1
        return self.module(*args)


def make_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        latent_channels=4,
        mid_block_add_attention=False,
    )


def make_parts(vae=None, regularizers=None, weights=None, norm="batch"):
    vae = vae or make_vae()
    weights = weights or AutoencoderLossWeights()
    regularizers = {"equivariance": EquivarianceRegularizer(2)} if regularizers is None else regularizers
    objective = AutoencoderObjective(vae, regularizers, reduction=weights.reduction)
    torch.manual_seed(1)
    discriminator = PatchDiscriminator(base_channels=8, num_layers=2, norm=norm)
    perceptual = LPIPS.random("squeeze", seed=0)
    step = AutoencoderStep(
        objective,
        objective,
        weights=weights,
        perceptual=perceptual,
        discriminator=discriminator,
    )
    return vae, objective, discriminator, perceptual, step


def make_batch(batch_size: int = 2, size: int = 64):
    generator = torch.Generator().manual_seed(2)
    return {"pixel_values": torch.rand(batch_size, 3, size, size, generator=generator) * 2 - 1}


def draw_of_kind(objective, kind: str):
    """The draw of the first step that is of this kind."""
    batch = make_batch()
    for step in range(100):
        draw = objective.draw(batch, StepRandomness(0).at(step, 0))
        if draw["regularizers"]["equivariance"].kind == kind:
            return draw
    raise AssertionError(kind)


def plain_draw(objective):
    return objective.draw(make_batch(), StepRandomness(0))


def gradients(module: nn.Module) -> list[torch.Tensor]:
    found = [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]
    module.zero_grad()
    return found


def assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor], tolerance: float) -> None:
    assert len(ours) == len(theirs) > 0
    scale = torch.stack([g.norm() for g in theirs]).norm()
    difference = torch.stack([(a - b).norm() for a, b in zip(ours, theirs, strict=True)]).norm()
    assert difference / scale < tolerance


@pytest.mark.parametrize("kind", ["equivariance", "low_resolution", "plain"])
def test_gradients_equal_the_plain_step(kind):
    weights = AutoencoderLossWeights()
    vae, objective, discriminator, perceptual, step = make_parts(weights=weights)
    draw, batch = draw_of_kind(objective, kind), make_batch()

    loss, discriminator_loss, _ = step(batch, draw, step=0)
    loss.backward()
    discriminator_loss.backward(inputs=list(discriminator.parameters()))
    ours, ours_discriminator = gradients(vae), gradients(discriminator)

    last = last_decoder_layer(vae).weight
    plain.plain_generator_loss(objective, discriminator, perceptual, last, batch, draw, weights).backward()
    theirs = gradients(vae)
    gradients(discriminator)
    plain.plain_discriminator_loss(objective, discriminator, perceptual, batch, draw, weights).backward()
    assert_close(ours, theirs, 1e-5)
    assert_close(ours_discriminator, gradients(discriminator), 1e-5)


def test_each_network_gets_only_its_own_gradient():
    vae, objective, discriminator, _, step = make_parts()
    loss, discriminator_loss, _ = step(make_batch(), draw_of_kind(objective, "equivariance"), step=0)
    loss.backward(retain_graph=True)
    assert not gradients(discriminator)
    assert all(parameter.grad is not None for parameter in vae.parameters())
    gradients(vae)
    discriminator_loss.backward(inputs=list(discriminator.parameters()))
    assert not gradients(vae)
    assert all(parameter.grad is not None for parameter in discriminator.parameters())


def test_perceptual_gradient_reaches_the_autoencoder():
    only_lpips, without = (
        make_parts(weights=AutoencoderLossWeights(perceptual=weight, discriminator=0, kl=0)) for weight in (1.0, 0.0)
    )
    found = []
    for vae, objective, _, _, step in (only_lpips, without):
        loss, _, _ = step(make_batch(), draw_of_kind(objective, "plain"), step=0)
        loss.backward()
        found.append(gradients(vae))
    difference = max((a - b).abs().max() for a, b in zip(*found, strict=True))
    assert difference > 1e-3


def test_terms_that_are_off_cost_nothing():
    _, objective, discriminator, perceptual, _ = make_parts()
    counters = Counter(perceptual), Counter(discriminator), Counter(objective)
    step = AutoencoderStep(
        counters[2],
        objective,
        weights=AutoencoderLossWeights(perceptual=0, discriminator=0.5, discriminator_start=5),
        perceptual=counters[0],
        discriminator=counters[1],
    )
    draw = draw_of_kind(objective, "plain")
    _, discriminator_loss, _ = step(make_batch(), draw, step=4)
    assert discriminator_loss is None
    assert [counter.calls for counter in counters] == [0, 0, 1]
    _, discriminator_loss, _ = step(make_batch(), draw, step=5)
    assert discriminator_loss is not None
    assert [counter.calls for counter in counters] == [0, 2, 2]


def test_a_weighted_term_needs_its_network():
    objective = AutoencoderObjective(make_vae())
    with pytest.raises(ValueError, match=r"The perceptual term has weight 1\.0 but no perceptual network"):
        AutoencoderStep(objective, objective, weights=AutoencoderLossWeights())


def test_a_fixed_weight_of_a_mean_penalty_means_the_same_for_summed_and_mean_reconstruction():
    """The two objectives differ by the number of elements of an image, and so do their gradients."""

    class MeanSquare(LatentSquare):
        mean_over_elements = True

    gradients = {}
    for reduction in ("sum", "mean"):
        weights = AutoencoderLossWeights(discriminator=0, kl=0, reduction=reduction)
        regularizers = {"square": MeanSquare(weight=2.0, adaptive=False)}
        vae, objective, _, _, step = make_parts(regularizers=regularizers, weights=weights)
        batch = make_batch()
        loss, _, _ = step(batch, plain_draw(objective), step=0)
        gradients[reduction] = torch.autograd.grad(loss, vae.encoder.conv_out.weight)[0]
    assert torch.allclose(gradients["sum"], batch["pixel_values"][0].numel() * gradients["mean"], rtol=1e-3, atol=1e-2)


def test_adaptive_penalty_has_the_gradient_norm_of_the_reconstruction():
    weights = AutoencoderLossWeights(discriminator=0, kl=0)
    regularizers = {"square": LatentSquare(weight=1.0, adaptive=True)}
    vae, objective, _, perceptual, step = make_parts(regularizers=regularizers, weights=weights)
    batch, draw = make_batch(), plain_draw(objective)
    _, _, logs = step(batch, draw, step=0)

    output = objective(batch, draw)
    ((reconstruction, target, _),) = output["decodings"]
    nll = (reconstruction - target).abs().sum() / len(target)
    nll = nll + target[0].numel() * perceptual(reconstruction, target).mean()
    weight = vae.encoder.conv_out.weight
    expected = (
        torch.autograd.grad(nll, weight, retain_graph=True)[0].norm()
        / torch.autograd.grad(output["terms"]["square"], weight)[0].norm()
    )
    assert torch.isclose(logs["square_weight"], expected, rtol=1e-3)


class Predicted(AutoencoderRegularizer):
    """A layer of its own predicts latents: an adaptive penalty with weights."""

    adaptive = True

    def __init__(self, weight: float) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.weight, self.layer = weight, nn.Conv2d(4, 4, 1)

    def penalty(self, state, batch, draw):
        return (self.layer(state.raw_latents) - 1).square().mean()


def walks(vae) -> list[int]:
    """Counts the gradients that come to what the decoder's first layer gave."""
    counted: list[int] = []

    def watch(layer, taken, output) -> None:
        output.register_hook(lambda gradient: counted.append(1))

    vae.decoder.conv_in.register_forward_hook(watch)
    return counted


@pytest.mark.parametrize(("discriminator", "expected_walks"), [(0.0, 1), (0.5, 2)])
def test_adaptive_penalties_cost_one_walk_through_the_decoder_at_most(discriminator, expected_walks):
    """And every gradient is that of nll + w g + kl + sum of ratio_i * penalty_i, each differentiated by itself.

    Without a discriminator the walk that trains the decoder also gives nll's gradient at the encoder's last layer; a
    discriminator needs one of its own, and two penalties share it.
    """
    weights = AutoencoderLossWeights(discriminator=discriminator, kl=1e-2)
    regularizers = {"equivariance": EquivarianceRegularizer(2), "square": LatentSquare(0.5, adaptive=True)}
    regularizers["predicted"] = Predicted(2.0)
    vae, objective, judge, perceptual, step = make_parts(regularizers=regularizers, weights=weights, norm="group")
    batch, draw = make_batch(), draw_of_kind(objective, "equivariance")
    vae.requires_grad_(True)

    reference = plain.plain_generator_loss(
        objective, judge, perceptual, last_decoder_layer(vae).weight, batch, draw, weights
    )
    output = objective(batch, draw)
    ((reconstruction, target, _),) = output["decodings"]
    nll = (reconstruction - target).abs().sum() / len(target)
    nll = nll + target[0].numel() * perceptual(reconstruction, target).mean()
    last = vae.encoder.conv_out.weight
    at_last = torch.autograd.grad(nll, last, retain_graph=True)[0].norm()
    for name in ("square", "predicted"):
        own = torch.autograd.grad(output["terms"][name], last, retain_graph=True)[0].norm()
        reference = reference + regularizers[name].weight * at_last / (own + 1e-4) * output["terms"][name]
    reference.backward()
    expected = [parameter.grad.clone() for parameter in objective.parameters()]
    objective.zero_grad()

    counted = walks(vae)
    loss, _, _ = step(batch, draw, step=0)
    loss.backward()
    assert len(counted) == expected_walks
    for parameter, right in zip(objective.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, right, rtol=1e-3, atol=1e-5 * float(right.norm()) + 1e-6)


def test_a_weight_before_and_behind_the_encoders_end_gets_both_gradients():
    """A decoder that shares a weight with the encoder is not walked in two parts."""
    weights = AutoencoderLossWeights(discriminator=0, kl=0)
    found = []
    for adaptive in (True, False):
        vae = make_vae()
        vae.decoder.mid_block.resnets[0].conv1.weight = vae.encoder.mid_block.resnets[0].conv1.weight
        regularizers = {"square": LatentSquare(1e-9, adaptive=adaptive)}
        _, objective, _, _, step = make_parts(vae=vae, regularizers=regularizers, weights=weights)
        loss, _, _ = step(make_batch(), plain_draw(objective), step=0)
        loss.backward()
        found.append(gradients(vae))
    assert_close(found[0], found[1], 1e-4)


def test_regularizers_compose():
    regularizers = {"equivariance": EquivarianceRegularizer(2), "square": LatentSquare(weight=3.0, adaptive=False)}
    vae, objective, _, _, step = make_parts(regularizers=regularizers)
    draw, batch = draw_of_kind(objective, "equivariance"), make_batch()
    output = objective(batch, draw)
    tau = draw["regularizers"]["equivariance"].tau
    assert torch.equal(output["decodings"][0][1], tau.apply_to_pixels(batch["pixel_values"], 2))
    posterior = vae.encode(batch["pixel_values"]).latent_dist
    raw_latents = posterior.mean + posterior.std * draw["noise"]
    assert torch.isclose(output["terms"]["square"], raw_latents.square().mean())
    _, _, logs = step(batch, draw, step=0)
    assert logs["square_weight"] == 3.0


def test_kl_is_of_the_untransformed_posterior():
    _, objective, _, _, _ = make_parts()
    batch, posterior = make_batch(), objective.model.encode(make_batch()["pixel_values"]).latent_dist
    kls = []
    for kind in ("plain", "equivariance"):
        draw = draw_of_kind(objective, kind)
        kls.append(objective(batch, draw)["terms"]["kl"])
    assert torch.equal(*kls)
    assert torch.allclose(kls[0], posterior.kl().mean(), rtol=1e-5)


def test_deterministic_autoencoder_trains():
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    _, objective, _, _, step = make_parts(vae=vae, regularizers={"equivariance": EquivarianceRegularizer(2)})
    loss, _, logs = step(make_batch(), draw_of_kind(objective, "equivariance"), step=0)
    loss.backward()
    assert logs["loss/kl"] == 0
    assert all(parameter.grad is not None for parameter in vae.parameters())


def test_draw_shares_follow_the_probabilities():
    regularizer = EquivarianceRegularizer(8)
    kinds = [regularizer.draw((32, 32), StepRandomness(0).at(step, 0)).kind for step in range(4000)]
    for kind, share in (("equivariance", 0.5), ("low_resolution", 0.125), ("plain", 0.375)):
        assert abs(kinds.count(kind) / len(kinds) - share) < 0.025


def test_rotation_alone_has_no_low_resolution_steps():
    regularizer = EquivarianceRegularizer(8, distribution=TauDistribution(scale="none"))
    draws = [regularizer.draw((32, 32), StepRandomness(0).at(step, 0)) for step in range(200)]
    assert "low_resolution" not in {draw.kind for draw in draws}


def test_probabilities_are_checked():
    with pytest.raises(ValueError, match="p_equivariance"):
        EquivarianceRegularizer(8, p_equivariance=1.5)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
@pytest.mark.parametrize("trained", [True, False])
def test_the_gradient_at_a_layer_is_its_own_trained_or_not(padding_mode, trained):
    torch.manual_seed(0)
    before, layer = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 3, padding=1, stride=2, padding_mode=padding_mode)
    end = LastLayer(layer)
    goals = torch.randn(2, 4, 5, 5)
    image = torch.randn(2, 3, 12, 12)
    expected = torch.autograd.grad((layer(before(image)) * goals).sum() * 2, layer.weight)[0]
    layer.weight.requires_grad_(trained)
    end.calls.clear()
    # Two calls of the layer count twice, as autograd counts them.
    outputs = [layer(before(image)), layer(before(image))]
    torch.testing.assert_close(end.weight_gradient(outputs, [goals, goals]), expected)


def test_a_further_decoding_is_judged_like_the_first():
    weights = AutoencoderLossWeights(discriminator=0, kl=0, perceptual=0)
    once, twice = (
        make_parts(regularizers=regularizers, weights=weights) for regularizers in ({}, {"again": SecondDecoding(0.5)})
    )
    found = []
    for vae, objective, _, _, step in (once, twice):
        loss, _, logs = step(make_batch(), plain_draw(objective), step=0)
        loss.backward()
        found.append((gradients(vae), logs["loss/nll"]))
    assert torch.isclose(found[1][1], 1.5 * found[0][1])
    assert_close(found[1][0], [1.5 * gradient for gradient in found[0][0]], 1e-5)


def test_two_regularizers_of_one_step_continue_one_generator():
    """Their draws are shared by all ranks and differ from each other."""
    objective = AutoencoderObjective(make_vae(), {"a": EquivarianceRegularizer(2), "b": EquivarianceRegularizer(2)})
    left, right = (
        [objective.draw(make_batch(), StepRandomness(0, rank, 2).at(step, 0)) for step in range(40)] for rank in (0, 1)
    )
    assert all(one["regularizers"] == other["regularizers"] for one, other in zip(left, right, strict=True))
    assert any(draw["regularizers"]["a"] != draw["regularizers"]["b"] for draw in left)
    assert not any(torch.equal(one["noise"], other["noise"]) for one, other in zip(left, right, strict=True))


class Constant(AutoencoderRegularizer):
    """A penalty of its own parameter alone."""

    adaptive = True

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.ones(()))

    def penalty(self, state, batch, draw):
        return self.value.square()


def test_an_adaptive_penalty_that_does_not_reach_the_encoder_is_refused():
    weights = AutoencoderLossWeights(discriminator=0, kl=0, perceptual=0)
    _, objective, _, _, step = make_parts(regularizers={"constant": Constant()}, weights=weights)
    with pytest.raises(ValueError, match=r"the term does not depend on that; use a fixed weight \(adaptive off\)"):
        step(make_batch(), plain_draw(objective), step=0)


def test_a_regularizer_that_is_switched_off_does_nothing():
    class Off(EquivarianceRegularizer):
        def draw(self, size, randomness):
            return None

    objective = AutoencoderObjective(make_vae(), {"equivariance": Off(2)})
    batch = make_batch()
    ((_, target, _),) = objective(batch, plain_draw(objective))["decodings"]
    assert torch.equal(target, batch["pixel_values"])


def test_a_regularizer_cannot_take_the_name_of_a_term():
    with pytest.raises(ValueError, match="cannot be called 'kl'"):
        AutoencoderObjective(make_vae(), {"kl": LatentSquare(weight=1.0, adaptive=False)})
