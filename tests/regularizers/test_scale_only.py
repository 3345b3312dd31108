"""Scale equivariance as an added pair: what it is, that the plain step stays, and when it is left out."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from diffusers_eqvae.autoencoders import Posterior
from diffusers_eqvae.objectives.autoencoder import AutoencoderLossWeights, AutoencoderObjective, AutoencoderStep
from diffusers_eqvae.randomness import StepRandomness
from diffusers_eqvae.regularizers.base import AutoencoderState
from diffusers_eqvae.regularizers.scale_only import ScaleOnlyArguments, ScaleOnlyRegularizer


def test_the_pair_is_the_mean_of_blocks_of_both(tiny_autoencoder_kl):
    raw_latents, pixels = torch.randn(2, 4, 8, 8), torch.rand(2, 3, 32, 32)
    regularizer = ScaleOnlyRegularizer(4, weight=0.3, scales=(0.5,))
    state = AutoencoderState(Posterior(raw_latents), raw_latents, pixels, None, None)
    ((small, target, weight),) = regularizer.decodings(state, regularizer.draw((2, 4, 8, 8), StepRandomness(0)))
    torch.testing.assert_close(small, F.avg_pool2d(raw_latents, 2))
    torch.testing.assert_close(target, F.avg_pool2d(pixels, 2))
    assert weight == 0.3


def test_the_loss_is_the_plain_one_and_the_weighted_pair(tiny_autoencoder_kl):
    vae = tiny_autoencoder_kl.train()
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    weights = AutoencoderLossWeights(perceptual=0, discriminator=0, kl=0, reduction="mean")
    regularizer = ScaleOnlyRegularizer(4, weight=0.3, scales=(0.5,))
    objective = AutoencoderObjective(vae, {"scale_only": regularizer}, reduction="mean")
    draw = objective.draw({"pixel_values": pixels}, StepRandomness(0))
    _, _, logs = AutoencoderStep(objective, objective, weights=weights)({"pixel_values": pixels}, draw, step=0)
    posterior = vae.encode(pixels).latent_dist
    z = posterior.mean + posterior.std * draw["noise"]
    plain = (vae.decode(z).sample - pixels).abs().mean()
    pair = (vae.decode(F.avg_pool2d(z, 2)).sample - F.avg_pool2d(pixels, 2)).abs().mean()
    torch.testing.assert_close(logs["loss/nll"], (plain + 0.3 * pair).detach())


def test_scales_are_drawn_alike_and_told_to_the_size_checks():
    regularizer = ScaleOnlyRegularizer(8)
    counts = Counter(
        regularizer.draw((2, 4, 32, 16), StepRandomness(0).at(step, 0)).latent_size for step in range(600)
    )
    assert counts.keys() == {(16, 8), (8, 4)} and all(abs(count - 300) < 60 for count in counts.values())
    assert regularizer.smallest_scale() == 0.25


def test_a_step_that_is_as_small_already_goes_without():
    regularizer = ScaleOnlyRegularizer(8, scales=(0.5,))
    draw = regularizer.draw((2, 4, 32, 32), StepRandomness(0))
    raw_latents, pixels = torch.randn(2, 4, 16, 16), torch.rand(2, 3, 128, 128)
    assert regularizer.decodings(AutoencoderState(None, raw_latents, pixels, None, None), draw) == []


def test_at_least_one_scale_below_one():
    with pytest.raises(ValueError, match="must name at least one scale"):
        ScaleOnlyArguments(scale_only_scales=[])
    with pytest.raises(ValueError, match=r"scale_only_scales must lie in \(0, 1\)|scale_only_scales must .*got"):
        ScaleOnlyArguments(scale_only_scales=[1.0])
