"""The flow-matching loss is a float32 mean square per sample."""

from __future__ import annotations

import pytest
import torch

from diffusers_eqvae.losses.diffusion import flow_matching_loss


def test_mean_square_per_sample():
    prediction, target = torch.randn(3, 4, 5, 6, dtype=torch.float64), torch.randn(3, 4, 5, 6, dtype=torch.float64)
    expected = torch.stack([((p - t) ** 2).mean() for p, t in zip(prediction, target, strict=True)])
    torch.testing.assert_close(flow_matching_loss(prediction, target), expected)


def test_difference_is_taken_in_float32():
    """1 and 1 + 2^-8 are the same bfloat16 number, so a difference taken there would be 0."""
    loss = flow_matching_loss(torch.ones(2, 4, 2, 2).bfloat16(), torch.full((2, 4, 2, 2), 1 + 2.0**-8))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.full((2,), 2.0**-16))


def test_gradient_reaches_the_prediction_only():
    prediction, target = torch.randn(2, 4, 2, 2, requires_grad=True), torch.randn(2, 4, 2, 2)
    flow_matching_loss(prediction, target).mean().backward()
    torch.testing.assert_close(prediction.grad, 2 * (prediction.detach() - target) / prediction.numel())


def test_prediction_with_learned_variance_is_refused():
    with pytest.raises(ValueError, match="learned variance"):
        flow_matching_loss(torch.zeros(2, 8, 4, 4), torch.zeros(2, 4, 4, 4))
