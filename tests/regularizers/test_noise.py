"""Noise on latents: (1 - s) z + s gamma e with one s an image, and the clean image as the target."""

from __future__ import annotations

import torch

from diffusers_eqvae.randomness import StepRandomness
from diffusers_eqvae.regularizers.noise import NoiseRegularizer


def test_the_formula_in_float64():
    raw_latents, pixels = torch.randn(3, 4, 5, 5, dtype=torch.float64), torch.rand(3, 3, 40, 40)
    regularizer = NoiseRegularizer(gamma=2.5)
    strength, noise = regularizer.draw((3, 4, 5, 5), StepRandomness(0))
    noisy, target = regularizer.transform(raw_latents, pixels, (strength, noise))
    assert target is pixels
    for image in range(3):
        s = strength[image].double()
        expected = (1 - s) * raw_latents[image] + s * 2.5 * noise[image].double()
        torch.testing.assert_close(noisy[image], expected, rtol=0, atol=1e-12)


def test_strengths_are_uniform_and_independent_of_the_noise():
    drawn = [NoiseRegularizer().draw((8, 2, 3, 3), StepRandomness(1).at(step, 0)) for step in range(200)]
    strengths, noise = (torch.cat([each[part] for each in drawn]) for part in (0, 1))
    assert strengths.min() < 0.01 and strengths.max() > 0.99
    assert abs(strengths.mean() - 0.5) < 0.03 and abs(strengths.var() - 1 / 12) < 0.01
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    correlation = torch.corrcoef(torch.stack([strengths, noise.flatten(1).mean(1)]))[0, 1]
    assert abs(correlation) < 0.1


def test_no_strength_is_no_change_and_full_strength_no_image():
    raw_latents, pixels = torch.randn(2, 4, 4, 4), torch.rand(2, 3, 32, 32)
    noise = torch.randn(2, 4, 4, 4)
    regularizer = NoiseRegularizer(gamma=0.5)
    assert torch.equal(regularizer.transform(raw_latents, pixels, (torch.zeros(2), noise))[0], raw_latents)
    assert torch.equal(regularizer.transform(raw_latents, pixels, (torch.ones(2), noise))[0], 0.5 * noise)
