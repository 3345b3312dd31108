"""Masked cells: how many, which, what stands there, and what learns from it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from diffusers_eqvae.randomness import StepRandomness
from diffusers_eqvae.regularizers.latent_masking import LatentMaskingArguments, LatentMaskingRegularizer, MaskToken


@pytest.fixture
def regularizer() -> LatentMaskingRegularizer:
    token = MaskToken(4)
    torch.nn.init.normal_(token.token)
    return LatentMaskingRegularizer(token)


def masked_cells(regularizer, raw_latents, draw) -> torch.Tensor:
    """(B, h, w) bool, found by what stands there."""
    transformed, _ = regularizer.transform(raw_latents, torch.rand(1, 3, 8, 8), draw)
    token = regularizer.token.token.view(1, -1, 1, 1).expand_as(transformed)
    masked, kept = (transformed == token).all(1), (transformed == raw_latents).all(1)
    assert (masked ^ kept).all(), "a cell is the token or what it was"
    return masked


def test_the_share_of_cells_is_exact_and_the_rest_stays(regularizer):
    raw_latents = torch.randn(4, 4, 6, 4)
    order = torch.rand(4, 6, 6)
    masked = masked_cells(regularizer, raw_latents, (torch.tensor([0.0, 0.25, 0.5, 0.75]), order))
    assert masked.flatten(1).sum(1).tolist() == [0, 6, 12, 18]
    least = order[2, :6, :4].flatten().argsort()[:12]
    assert masked[2].flatten()[least].all()


def test_ratios_have_their_probabilities_and_cells_are_drawn_per_image(regularizer):
    drawn = [regularizer.draw((8, 4, 4, 4), StepRandomness(0).at(step, 0)) for step in range(500)]
    counts = Counter(round(ratio, 2) for ratios, _ in drawn for ratio in ratios.tolist())
    expected = {0.0: 2800, 0.25: 400, 0.5: 400, 0.75: 400}
    assert counts.keys() == expected.keys()
    assert sum((counts[ratio] - count) ** 2 / count for ratio, count in expected.items()) < 16.3
    assert not torch.equal(drawn[0][1][0], drawn[0][1][1])


def test_the_token_learns_from_masked_cells_and_the_latents_from_the_others(regularizer):
    raw_latents = torch.randn(1, 4, 4, 4, requires_grad=True)
    order = torch.arange(16.0).view(1, 4, 4)
    transformed, _ = regularizer.transform(raw_latents, torch.rand(1, 3, 8, 8), (torch.tensor([0.5]), order))
    transformed.sum().backward()
    assert torch.equal(regularizer.token.token.grad, torch.full((4,), 8.0))
    assert not raw_latents.grad[..., :2, :].any() and raw_latents.grad[..., 2:, :].all()


@pytest.mark.parametrize(
    ("ratios", "probabilities"), [([0.0, 0.5], [1.0]), ([0.0, 0.5], [0.5, 0.4])], ids=["fewer", "not one"]
)
def test_probabilities_belong_to_ratios(ratios, probabilities):
    with pytest.raises(ValueError, match="must be as many as latent_masking_ratios and add up to 1; got"):
        LatentMaskingArguments(latent_masking_ratios=ratios, latent_masking_probabilities=probabilities)


def test_the_token_of_another_autoencoder_is_refused(tmp_path, tiny_autoencoder_kl):
    tiny_autoencoder_kl.save_pretrained(tmp_path / "run")
    MaskToken(16).save_pretrained(tmp_path / "run" / "mask_token")
    vae = type(tiny_autoencoder_kl).from_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match=r"mask_token saved beside .* has latent_channels=16, and 4 is needed"):
        LatentMaskingRegularizer.from_arguments(LatentMaskingArguments(), vae)
