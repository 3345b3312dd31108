"""The two terms of variance expansion, against float64 and at values known by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffusers_eqvae.autoencoders import Posterior
from diffusers_eqvae.regularizers.base import AutoencoderState
from diffusers_eqvae.regularizers.variance_expansion import VarianceExpansionRegularizer


def penalty(regularizer, logvar, raw_latents):
    state = AutoencoderState(Posterior(torch.zeros_like(logvar), logvar), raw_latents, raw_latents, None, None)
    return regularizer.penalty(state, {}, ())


def test_against_numpy():
    logvar, raw_latents = torch.randn(2, 4, 3, 3), 2 * torch.randn(2, 4, 3, 3)
    got = penalty(VarianceExpansionRegularizer(0.3, delta=0.05, range_weight=1e-2), logvar, raw_latents)
    variance, z = np.exp(logvar.double().numpy()), np.abs(raw_latents.double().numpy())
    assert float(got) == pytest.approx(0.3 * np.mean(1 / (variance + 0.05)) + 1e-2 * np.mean(np.exp(z - 1)), rel=1e-5)


def test_values_known_by_hand():
    ones = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
    assert float(penalty(VarianceExpansionRegularizer(0.1, delta=1.0), *ones)) == pytest.approx(0.05 + 1e-6)
    vanishing = torch.full((1, 4, 2, 2), -30.0), torch.zeros(1, 4, 2, 2)
    expected = 0.1 / 0.1 + 1e-6 * math.exp(-1)
    assert float(penalty(VarianceExpansionRegularizer(), *vanishing)) == pytest.approx(expected, rel=1e-5)


def test_variances_grow_and_latents_come_nearer():
    logvar, raw_latents = (
        torch.zeros(1, 4, 2, 2, requires_grad=True),
        torch.full((1, 4, 2, 2), -3.0, requires_grad=True),
    )
    penalty(VarianceExpansionRegularizer(range_weight=1.0), logvar, raw_latents).backward()
    assert (logvar.grad < 0).all() and (raw_latents.grad < 0).all()


def test_without_a_range_weight_large_latents_do_not_overflow():
    logvar, raw_latents = torch.zeros(1, 4, 2, 2), torch.full((1, 4, 2, 2), 200.0)
    assert torch.isfinite(penalty(VarianceExpansionRegularizer(range_weight=0.0), logvar, raw_latents))
