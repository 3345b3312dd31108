"""Local correlation against a transcription that walks over windows and pairs, and what couples the ranks."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from diffusers_eqvae.autoencoders import Posterior
from diffusers_eqvae.regularizers import local_correlation as module
from diffusers_eqvae.regularizers.base import AutoencoderState
from diffusers_eqvae.regularizers.local_correlation import LocalCorrelationRegularizer, local_correlation


def transcribed(mean: np.ndarray) -> float:
    """c of (B, C, h, w) in float64, window by window, Pearson by numpy."""
    z = mean.astype(np.float64)
    z = (z - z.mean((0, 2, 3), keepdims=True)) / (z.std((0, 2, 3), keepdims=True) + 1e-6)
    found = []
    for image in z:
        for top in range(0, image.shape[1] // 2 * 2, 2):
            for left in range(0, image.shape[2] // 2 * 2, 2):
                cells = [image[:, top + i, left + j] for i in (0, 1) for j in (0, 1)]
                found += [np.corrcoef(one, other)[0, 1] for one, other in combinations(cells, 2)]
    return float(np.mean(found))


def state_of(mean: torch.Tensor) -> AutoencoderState:
    return AutoencoderState(Posterior(mean), mean, mean, None, None)


@pytest.mark.parametrize("shape", [(2, 6, 4, 6), (1, 4, 5, 3)], ids=["even", "odd"])
def test_against_numpy_with_a_mean_far_from_zero(shape):
    mean = 3 * torch.randn(shape) + torch.arange(float(shape[1])).view(1, -1, 1, 1) * 10
    expected = transcribed(mean.numpy())
    got = LocalCorrelationRegularizer(threshold=0.75).penalty(state_of(mean), {}, ())
    assert float(got) == pytest.approx(0.75 - expected, abs=1e-4)


def test_equal_cells_are_fully_correlated_and_opposite_ones_not():
    cell = torch.randn(1, 6, 1, 1)
    assert float(local_correlation(cell.expand(1, 6, 2, 2))) == pytest.approx(1.0, abs=1e-5)
    checker = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert float(local_correlation(cell * checker)) == pytest.approx((2 - 4) / 6, abs=1e-5)


def test_nothing_is_missing_above_the_threshold():
    mean = torch.randn(2, 8, 2, 2).repeat_interleave(2, -1).repeat_interleave(2, -2).requires_grad_()
    loss = LocalCorrelationRegularizer().penalty(state_of(mean + 0.01 * torch.randn_like(mean)), {}, ())
    loss.backward()
    assert loss.item() == 0 and not mean.grad.any()


def test_following_its_gradient_makes_neighbours_alike():
    mean = torch.randn(2, 6, 6, 6, requires_grad=True)
    regularizer = LocalCorrelationRegularizer()
    optimizer = torch.optim.Adam([mean], lr=0.05)
    for _ in range(60):
        loss = regularizer.penalty(state_of(mean), {}, ())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert transcribed(mean.detach().numpy()) > 0.7


def test_two_ranks_have_the_gradient_of_the_whole(monkeypatch):
    """Each half is given what both together would say: mean and variance of the channels, and the correlation."""
    smooth = torch.randn(2, 5, 2, 2).repeat_interleave(2, -1).repeat_interleave(2, -2)
    # One half is above the threshold and the other below, so that the mean over both decides.
    whole = torch.cat([smooth + 0.1 * torch.randn(2, 5, 4, 4) + 0.5, torch.randn(2, 5, 4, 4)]).requires_grad_()
    regularizer = LocalCorrelationRegularizer()
    expected = regularizer.penalty(state_of(whole), {}, ())
    expected.backward()
    values = whole.detach()
    variance, mean = torch.var_mean(values, (0, 2, 3), correction=0)
    losses, gradients = [], []
    for half in values.split(2):
        half = half.clone().requires_grad_()
        answers = iter([mean, variance, regularizer.threshold - expected.detach()])
        monkeypatch.setattr(module, "mean_over_ranks", lambda value, answers=answers: next(answers))
        loss = regularizer.penalty(state_of(half), {}, ())
        loss.backward()
        losses.append(loss.detach())
        gradients.append(half.grad / 2)  # data parallelism averages over ranks
    torch.testing.assert_close(sum(losses) / 2, expected.detach())
    torch.testing.assert_close(torch.cat(gradients), whole.grad)


def test_one_channel_has_no_correlation(tiny_autoencoder_kl):
    tiny_autoencoder_kl.register_to_config(latent_channels=1)
    with pytest.raises(ValueError, match="compares cells by their channels, and this autoencoder has one"):
        LocalCorrelationRegularizer.from_arguments(module.LocalCorrelationArguments(), tiny_autoencoder_kl)
