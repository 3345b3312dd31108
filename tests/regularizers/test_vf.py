"""VA-VAE's loss against a transcription cell by cell, its margins, and what its gradient moves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusers_eqvae.autoencoders import Posterior
from diffusers_eqvae.regularizers.base import AutoencoderState
from diffusers_eqvae.regularizers.vf import VFProjection, VFRegularizer, vf_loss


def transcribed(p: np.ndarray, f: np.ndarray, m1: float, m2: float) -> float:
    """Both terms in float64, one cell and one pair at a time."""
    cosine = lambda a, b: a @ b / np.sqrt((a @ a) * (b @ b))  # noqa: E731
    marginal, matrix = [], []
    for ours, theirs in zip(p.astype(np.float64), f.astype(np.float64), strict=True):
        ours, theirs = ours.reshape(len(ours), -1).T, theirs.reshape(len(theirs), -1).T
        marginal += [max(0.0, 1 - m1 - cosine(a, b)) for a, b in zip(ours, theirs, strict=True)]
        for i in range(len(ours)):
            for j in range(len(ours)):
                matrix.append(max(0.0, abs(cosine(ours[i], ours[j]) - cosine(theirs[i], theirs[j])) - m2))
    return float(np.mean(marginal) + np.mean(matrix))


@pytest.mark.parametrize(("m1", "m2"), [(0.5, 0.25), (0.0, 0.0)])
def test_against_numpy(m1, m2):
    p, f = torch.randn(2, 6, 3, 2), torch.randn(2, 6, 3, 2) + 0.5
    got = vf_loss(p, f, cosine_margin=m1, distance_margin=m2)
    assert float(got) == pytest.approx(transcribed(p.numpy(), f.numpy(), m1, m2), rel=1e-5)


def test_equal_directions_cost_nothing_and_neither_does_what_the_margins_allow():
    f = torch.randn(1, 8, 4, 4)
    assert float(vf_loss(3 * f, f, cosine_margin=0.5, distance_margin=0.25)) == 0
    assert float(vf_loss(f + 0.2 * torch.randn_like(f), f, cosine_margin=0.5, distance_margin=0.25)) == 0
    assert float(vf_loss(-f, f, cosine_margin=0.5, distance_margin=0.25)) == pytest.approx(1.5)


class Fixed(torch.nn.Module):
    """A teacher that says the same of every image."""

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__()
        self.features = torch.nn.Parameter(features)

    def forward(self, pixels):
        return self.features, None


def test_latents_and_projection_learn_the_features_and_the_teacher_stays():
    features = torch.randn(2, 6, 4, 4)
    regularizer = VFRegularizer(VFProjection(4, 6), Fixed(features.clone()), cosine_margin=0.2)
    raw_latents = torch.randn(2, 4, 4, 4, requires_grad=True)
    optimizer = torch.optim.Adam([raw_latents, *regularizer.parameters()], lr=0.03)
    losses = []
    for _ in range(120):
        state = AutoencoderState(Posterior(raw_latents), raw_latents, torch.zeros(2, 3, 8, 8), None, None)
        losses.append(regularizer.penalty(state, {}, ()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]
    assert torch.equal(regularizer.frozen_modules()[0].features, features)
    assert {name.split(".")[0] for name, _ in regularizer.named_parameters()} == {"projection"}


def test_features_on_another_grid_are_averaged_to_the_latents():
    ramp = torch.arange(4.0).expand(1, 6, 4, 4) + torch.randn(1, 6, 1, 1)
    coarse = torch.nn.functional.interpolate(ramp, size=(2, 2), mode="bilinear", antialias=True)
    regularizer = VFRegularizer(VFProjection(4, 6), Fixed(ramp))
    raw_latents = torch.randn(1, 4, 2, 2)
    state = AutoencoderState(Posterior(raw_latents), raw_latents, torch.zeros(1, 3, 8, 8), None, None)
    expected = vf_loss(regularizer.projection(raw_latents), coarse, cosine_margin=0.5, distance_margin=0.25)
    torch.testing.assert_close(regularizer.penalty(state, {}, ()), expected)


def test_features_of_another_size_are_refused():
    with pytest.raises(ValueError, match="The projected latents and the teacher's features must have equal shapes"):
        vf_loss(torch.zeros(1, 4, 2, 2), torch.zeros(1, 6, 2, 2), cosine_margin=0.5, distance_margin=0.25)
