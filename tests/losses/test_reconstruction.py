"""Reductions of the reconstruction and KL terms, and their precision."""

from __future__ import annotations

import pytest
import torch

from diffusers_eqvae.autoencoders import Posterior
from diffusers_eqvae.losses.reconstruction import kl_loss, reconstruction_loss


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_reductions_are_sum_per_image_and_mean_of_all(kind):
    first, second = torch.randn(2, 3, 4, 6, dtype=torch.float64), torch.randn(2, 3, 4, 6, dtype=torch.float64)
    elementwise = (first - second).abs() if kind == "l1" else (first - second) ** 2
    total = reconstruction_loss(first, second, kind=kind, reduction="sum")
    mean = reconstruction_loss(first, second, kind=kind, reduction="mean")
    torch.testing.assert_close(total, elementwise.sum() / 2)
    torch.testing.assert_close(mean, elementwise.mean())


@pytest.mark.parametrize(("reduction", "ratio"), [("sum", 0.25), ("mean", 1.0)])
def test_a_target_of_half_the_side_weighs_a_quarter_under_sum(reduction, ratio):
    """Images of the same error: a scale s weighs s^2 under "sum" and 1 under "mean"."""
    full = reconstruction_loss(torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), 0.3), reduction=reduction)
    half = reconstruction_loss(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.3), reduction=reduction)
    torch.testing.assert_close(half, full * ratio)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_batch_size_does_not_change_the_scale(reduction):
    first, second = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    one = reconstruction_loss(first, second, reduction=reduction)
    three = reconstruction_loss(first.repeat(3, 1, 1, 1), second.repeat(3, 1, 1, 1), reduction=reduction)
    torch.testing.assert_close(one, three)


def test_half_precision_is_summed_in_float32():
    first = torch.zeros(1, 3, 64, 64, dtype=torch.bfloat16)
    loss = reconstruction_loss(first, torch.full_like(first, 1 / 256))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor(3 * 64 * 64 / 256.0))


def test_kl_reductions_against_torch_distributions():
    posterior = Posterior(torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5))
    gaussian = torch.distributions.Normal(posterior.mean, torch.exp(0.5 * posterior.logvar))
    kl = torch.distributions.kl_divergence(gaussian, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(kl_loss(posterior), kl.sum() / 2)
    torch.testing.assert_close(kl_loss(posterior, reduction="mean"), kl.mean())


def test_kl_of_the_prior_and_of_a_point_is_zero():
    zeros = torch.zeros(2, 4, 3, 3)
    assert kl_loss(Posterior(zeros, zeros)) == 0.0
    assert kl_loss(Posterior(torch.randn(2, 4, 3, 3))) == 0.0


def test_gradient_reaches_the_reconstruction():
    reconstruction = torch.zeros(1, 3, 2, 2, requires_grad=True)
    reconstruction_loss(reconstruction, torch.ones(1, 3, 2, 2)).backward()
    torch.testing.assert_close(reconstruction.grad, -torch.ones(1, 3, 2, 2))


@pytest.mark.parametrize("options", [{"kind": "huber"}, {"reduction": "none"}])
def test_unknown_options_are_refused(options):
    with pytest.raises(ValueError, match="must be"):
        reconstruction_loss(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2), **options)


def test_unequal_shapes_are_refused_instead_of_broadcast():
    with pytest.raises(ValueError, match="equal shapes"):
        reconstruction_loss(torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4))
