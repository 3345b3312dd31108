"""EQ-VAE's steps beyond the paper: turns per image, blends, windows; and that the paper's own are what they were."""

from __future__ import annotations

import pytest
import torch

from diffusers_eqvae.equivariance import TauDistribution
from diffusers_eqvae.randomness import StepRandomness
from diffusers_eqvae.regularizers import EquivarianceRegularizer
from diffusers_eqvae.regularizers.equivariance import EquivarianceArguments, EquivarianceDraw

EXPECTED = [
    ("e", 17, 17, 3),
    ("p",),
    ("l", 14, 14, 1),
    ("l", 27, 27, 1),
    ("p",),
    ("e", 19, 19, 2),
    ("p",),
    ("e", 9, 9, 3),
]
FACTOR = 4
SHAPE = (4, 2, 8, 8)


def draws(regularizer, count: int = 200, shape=SHAPE) -> list[EquivarianceDraw]:
    return [regularizer.draw(shape, StepRandomness(0).at(step, 0)) for step in range(count)]


def blocks(shape=SHAPE) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents, and pixels that show the same cell by cell, so that what is done to one is seen in the other."""
    raw_latents = torch.randn(shape, dtype=torch.float64)
    return raw_latents, raw_latents.repeat_interleave(FACTOR, -1).repeat_interleave(FACTOR, -2)


def test_the_defaults_draw_what_they_drew():
    """Kind and tau of the first steps of seed 0, from before there was anything beyond the paper."""
    found = [
        (draw.kind[0], *((*draw.tau.latent_size, draw.tau.quarter_turns) if draw.tau else ()))
        for draw in draws(EquivarianceRegularizer(8), 8, (2, 4, 32, 32))
    ]
    assert found == EXPECTED
    assert all(draw.each is None and draw.shares is None for draw in draws(EquivarianceRegularizer(8)))


def test_every_image_turns_in_a_way_of_its_own():
    regularizer = EquivarianceRegularizer(
        FACTOR, distribution=TauDistribution("none", flip=True), p_equivariance=1.0, per_image=True
    )
    raw_latents, pixels = blocks()
    ways = set()
    for draw in draws(regularizer):
        ways.add(tuple((tau.quarter_turns, tau.flip) for tau in draw.each))
        transformed, target = regularizer.transform(raw_latents, pixels, draw)
        for index, tau in enumerate(draw.each):
            assert torch.equal(transformed[index], tau.apply_to_latents(raw_latents[index : index + 1])[0])
        assert torch.equal(target, transformed.repeat_interleave(FACTOR, -1).repeat_interleave(FACTOR, -2))
    assert len(ways) > 150
    assert {way for each in ways for way in each} == set(TauDistribution(flip=True).turns)


def test_images_of_one_step_have_one_shape_whatever_it_is():
    regularizer = EquivarianceRegularizer(
        FACTOR, distribution=TauDistribution("anisotropic", flip=True), p_equivariance=1.0, per_image=True
    )
    raw_latents, pixels = blocks((4, 2, 8, 6))
    parities = set()
    for draw in draws(regularizer, shape=(4, 2, 8, 6)):
        transformed, target = regularizer.transform(raw_latents, pixels, draw)
        assert target.shape[-2:] == (FACTOR * transformed.shape[-2], FACTOR * transformed.shape[-1])
        if draw.tau.latent_size[0] != draw.tau.latent_size[1]:
            parities.add(tuple(tau.quarter_turns % 2 for tau in draw.each))
    assert parities == {(0,) * 4, (1,) * 4}


def test_a_blend_is_of_both_partners_in_latents_as_in_pixels():
    regularizer = EquivarianceRegularizer(
        FACTOR, distribution=TauDistribution("none", rotation=False), p_equivariance=1.0, blend=0.5
    )
    raw_latents, pixels = blocks()
    blended = [draw for draw in draws(regularizer) if draw.shares is not None]
    assert 70 < len(blended) < 130
    transformed, target = regularizer.transform(raw_latents, pixels, blended[0])
    for i, j in ((0, 1), (1, 0), (2, 3), (3, 2)):
        share = blended[0].shares[i].double()
        expected = share * raw_latents[i] + (1 - share) * raw_latents[j]
        torch.testing.assert_close(transformed[i], expected)
    torch.testing.assert_close(target, transformed.repeat_interleave(FACTOR, -1).repeat_interleave(FACTOR, -2))
    plain = next(draw for draw in draws(regularizer) if draw.shares is None)
    assert regularizer.transform(raw_latents, pixels, plain)[0] is raw_latents
    with pytest.raises(ValueError, match="A blend takes two images, so its micro-batch must be even; got 3"):
        draws(regularizer, shape=(3, 2, 8, 8))


def test_two_ranks_draw_the_halves_of_the_whole():
    distribution = TauDistribution("isotropic", flip=True, crop=0.5)
    regularizer = EquivarianceRegularizer(FACTOR, distribution=distribution, blend=0.5, per_image=True)
    half = (2, *SHAPE[1:])
    for step in range(60):
        whole = regularizer.draw(SHAPE, StepRandomness(0).at(step, 0))
        ranks = [regularizer.draw(half, StepRandomness(0, rank, 2).at(step, 0)) for rank in (0, 1)]
        assert all((draw.kind, draw.tau) == (whole.kind, whole.tau) for draw in ranks)
        if whole.each is not None:
            assert whole.each == ranks[0].each + ranks[1].each
        if whole.shares is not None:
            assert torch.equal(whole.shares, torch.cat([draw.shares for draw in ranks]))


def test_images_made_smaller_lose_nothing_at_the_border():
    regularizer = EquivarianceRegularizer(
        FACTOR, distribution=TauDistribution(crop=1.0), p_equivariance=0.0, p_low_resolution=1.0
    )
    assert all(draw.kind == "low_resolution" and draw.tau.window is None for draw in draws(regularizer, 20))


@pytest.mark.parametrize(
    ("options", "smallest"), [({}, 0.25), ({"tau_crop": 0.5}, 0.125), ({"tau_scale": "none", "tau_crop": 0.5}, 0.5)]
)
def test_the_size_checks_are_told_of_windows(options, smallest, tiny_autoencoder_kl):
    regularizer = EquivarianceRegularizer.from_arguments(EquivarianceArguments(**options), tiny_autoencoder_kl)
    assert regularizer.smallest_scale() == smallest


def test_a_tau_that_does_nothing_is_refused(tiny_autoencoder_kl):
    nothing = EquivarianceArguments(tau_scale="none", tau_rotation=False)
    with pytest.raises(
        ValueError, match=r"tau leaves everything as it is: it neither scales, .* leave the regularizer"
    ):
        EquivarianceRegularizer.from_arguments(nothing, tiny_autoencoder_kl)
    for switch in ({"tau_flip": True}, {"tau_crop": 0.1}, {"tau_blend": 0.1}):
        something = EquivarianceArguments(tau_scale="none", tau_rotation=False, **switch)
        EquivarianceRegularizer.from_arguments(something, tiny_autoencoder_kl)
