"""The alignment loss: its formula, and what it leaves to each of its two terms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from diffusers_eqvae.losses.alignment import alignment_loss


def test_loss_is_zero_at_equality_and_its_formula_elsewhere():
    feature, prediction = torch.randn(2, 2, 5, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(alignment_loss(feature, feature), torch.zeros((), dtype=torch.float64))
    cosine = (feature * prediction).sum(1) / (feature.norm(dim=1) * prediction.norm(dim=1))
    difference = (feature - prediction).abs()
    smooth = torch.where(difference < 1, 0.5 * difference**2, difference - 0.5).mean()
    torch.testing.assert_close(alignment_loss(prediction, feature), 0.9 * (1 - cosine.mean()) + 0.1 * smooth)
    opposite = alignment_loss(-feature, feature, cosine_weight=1.0, smooth_l1_weight=0.0)
    torch.testing.assert_close(opposite, torch.tensor(2.0, dtype=torch.float64))


def test_directions_are_compared_normalised_and_values_as_they_are():
    """A cosine after the LayerNorm does not see a feature's mean and scale: the smooth L1 before it does."""
    feature = torch.randn(2, 8, 3, 3, dtype=torch.float64)

    def norm(values):
        return F.layer_norm(values.movedim(1, -1), (8,)).movedim(-1, 1)

    moved = 3 * feature + 2
    normalized = (norm(moved), norm(feature))
    cosine = alignment_loss(moved, feature, normalized=normalized, smooth_l1_weight=0.0)
    torch.testing.assert_close(cosine, torch.zeros((), dtype=torch.float64), atol=1e-4, rtol=0)
    assert alignment_loss(moved, feature, smooth_l1_weight=0.0) > 0.01
    values = alignment_loss(moved, feature, normalized=normalized, cosine_weight=0.0)
    torch.testing.assert_close(values, 0.1 * F.smooth_l1_loss(moved, feature))


def test_loss_is_float32_and_refuses_unequal_shapes():
    half = torch.randn(2, 8, 3, 3).bfloat16()
    assert alignment_loss(half, half.float()).dtype == torch.float32
    with pytest.raises(ValueError, match="equal shapes"):
        alignment_loss(half, half[:1])
