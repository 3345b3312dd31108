"""The one-forward-one-backward step has the gradients of the plain one, and moves exactly what it should."""

import importlib.util
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn

from diffusers_eqvae.autoencoders import last_decoder_layer
from diffusers_eqvae.equivariance import TauDistribution
from diffusers_eqvae.losses.perceptual import LPIPS
from diffusers_eqvae.models.discriminator import PatchDiscriminator
from diffusers_eqvae.objectives.autoencoder import AutoencoderLossWeights, AutoencoderObjective, AutoencoderStep
from diffusers_eqvae.regularizers import EquivarianceRegularizer, Regularizer

_SPEC = importlib.util.spec_from_file_location(
    "plain_autoencoder_step", Path(__file__).parents[2] / "benchmarks/plain_autoencoder_step.py"
)
plain = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(plain)


class LatentSquare(Regularizer):
    """The simplest penalty: mean square of the latents."""

    def __init__(self, weight: float, adaptive: bool) -> None:
        super().__init__()
        self.weight, self.adaptive = weight, adaptive

    def penalty(self, latents, pixels, draw):
        return latents.square().mean()


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
        vae=vae,
        regularizers=regularizers,
        weights=weights,
        perceptual=perceptual,
        discriminator=discriminator,
    )
    return vae, objective, discriminator, perceptual, step


def make_batch(batch_size: int = 2, size: int = 64):
    generator = torch.Generator().manual_seed(2)
    pixels = torch.rand(batch_size, 3, size, size, generator=generator) * 2 - 1
    return pixels, torch.randn(batch_size, 4, size // 2, size // 2, generator=generator)


def draw_of_kind(objective, kind: str):
    generator = torch.Generator().manual_seed(0)
    while True:
        draws = objective.draw((32, 32), generator)
        if draws["equivariance"].kind == kind:
            return draws


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
    draws, (pixels, noise) = draw_of_kind(objective, kind), make_batch()

    loss, discriminator_loss, _ = step(pixels, noise, draws, step=0)
    loss.backward()
    discriminator_loss.backward(inputs=list(discriminator.parameters()))
    ours, ours_discriminator = gradients(vae), gradients(discriminator)

    last = last_decoder_layer(vae).weight
    plain.plain_generator_loss(objective, discriminator, perceptual, last, pixels, noise, draws, weights).backward()
    theirs = gradients(vae)
    gradients(discriminator)
    plain.plain_discriminator_loss(objective, discriminator, perceptual, pixels, noise, draws, weights).backward()
    assert_close(ours, theirs, 1e-5)
    assert_close(ours_discriminator, gradients(discriminator), 1e-5)


def test_each_network_gets_only_its_own_gradient():
    vae, objective, discriminator, _, step = make_parts()
    loss, discriminator_loss, _ = step(*make_batch(), draw_of_kind(objective, "equivariance"), step=0)
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
        loss, _, _ = step(*make_batch(), draw_of_kind(objective, "plain"), step=0)
        loss.backward()
        found.append(gradients(vae))
    difference = max((a - b).abs().max() for a, b in zip(*found, strict=True))
    assert difference > 1e-3


def test_terms_that_are_off_cost_nothing():
    vae, objective, discriminator, perceptual, _ = make_parts()
    counters = Counter(perceptual), Counter(discriminator), Counter(objective)
    step = AutoencoderStep(
        counters[2],
        vae=vae,
        regularizers={},
        weights=AutoencoderLossWeights(perceptual=0, discriminator=0.5, discriminator_start=5),
        perceptual=counters[0],
        discriminator=counters[1],
    )
    draws = draw_of_kind(objective, "plain")
    _, discriminator_loss, _ = step(*make_batch(), draws, step=4)
    assert discriminator_loss is None
    assert [counter.calls for counter in counters] == [0, 0, 1]
    _, discriminator_loss, _ = step(*make_batch(), draws, step=5)
    assert discriminator_loss is not None
    assert [counter.calls for counter in counters] == [0, 2, 2]


def test_a_weighted_term_needs_its_network():
    vae = make_vae()
    with pytest.raises(ValueError, match="perceptual"):
        AutoencoderStep(AutoencoderObjective(vae), vae=vae, regularizers={}, weights=AutoencoderLossWeights())


def test_adaptive_penalty_has_the_gradient_norm_of_the_reconstruction():
    weights = AutoencoderLossWeights(discriminator=0, kl=0)
    regularizers = {"square": LatentSquare(weight=1.0, adaptive=True)}
    vae, objective, _, perceptual, step = make_parts(regularizers=regularizers, weights=weights)
    pixels, noise = make_batch()
    _, _, logs = step(pixels, noise, {"square": None}, step=0)

    output = objective(pixels, noise, {"square": None})
    nll = (output["reconstruction"] - output["target"]).abs().sum() / len(pixels)
    nll = nll + pixels[0].numel() * perceptual(output["reconstruction"], output["target"]).mean()
    weight = vae.encoder.conv_out.weight
    expected = (
        torch.autograd.grad(nll, weight, retain_graph=True)[0].norm()
        / torch.autograd.grad(output["penalties"]["square"], weight)[0].norm()
    )
    assert torch.isclose(logs["square_weight"], expected, rtol=1e-3)


def test_regularizers_compose():
    regularizers = {"equivariance": EquivarianceRegularizer(2), "square": LatentSquare(weight=3.0, adaptive=False)}
    vae, objective, _, _, step = make_parts(regularizers=regularizers)
    draws = draw_of_kind(objective, "equivariance")
    pixels, noise = make_batch()
    output = objective(pixels, noise, draws)
    tau = draws["equivariance"].tau
    assert torch.equal(output["target"], tau.apply_to_pixels(pixels, 2))
    latents = vae.encode(pixels).latent_dist
    latents = latents.mean + latents.std * noise
    assert torch.isclose(output["penalties"]["square"], latents.square().mean())
    _, _, logs = step(pixels, noise, draws, step=0)
    assert logs["square_weight"] == 3.0


def test_kl_is_of_the_untransformed_posterior():
    _, objective, _, _, _ = make_parts()
    pixels, noise = make_batch()
    kls = {kind: objective(pixels, noise, draw_of_kind(objective, kind))["kl"] for kind in ("plain", "equivariance")}
    assert torch.equal(kls["plain"], kls["equivariance"])
    assert torch.allclose(kls["plain"], objective.vae.encode(pixels).latent_dist.kl().mean(), rtol=1e-5)


def test_deterministic_autoencoder_trains():
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    _, objective, _, _, step = make_parts(vae=vae, regularizers={"equivariance": EquivarianceRegularizer(2)})
    loss, _, logs = step(*make_batch(), draw_of_kind(objective, "equivariance"), step=0)
    loss.backward()
    assert logs["loss/kl"] == 0
    assert all(parameter.grad is not None for parameter in vae.parameters())


def test_draw_shares_follow_the_probabilities():
    regularizer = EquivarianceRegularizer(8)
    generator = torch.Generator().manual_seed(0)
    kinds = [regularizer.draw((32, 32), generator).kind for _ in range(4000)]
    for kind, share in (("equivariance", 0.5), ("low_resolution", 0.125), ("plain", 0.375)):
        assert abs(kinds.count(kind) / len(kinds) - share) < 0.025


def test_rotation_alone_has_no_low_resolution_steps():
    regularizer = EquivarianceRegularizer(8, distribution=TauDistribution(scale="none"))
    generator = torch.Generator().manual_seed(0)
    assert "low_resolution" not in {regularizer.draw((32, 32), generator).kind for _ in range(200)}


def test_probabilities_are_checked():
    with pytest.raises(ValueError, match="p_equivariance"):
        EquivarianceRegularizer(8, p_equivariance=1.5)
