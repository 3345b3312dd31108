"""Sampling errors: of a mean they are its standard error, and elsewhere the spread over sets of images."""

from __future__ import annotations

import math

import pytest
import torch

from diffusers_eqvae.metrics.distances import frechet_distance, inception_score, kernel_distance
from diffusers_eqvae.metrics.errors import (
    disjoint_error,
    jackknife_error,
    kept_without_each,
    share_error,
    without_each,
)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    each = [values[kept].mean().item() for kept in kept_without_each(4000, groups=2000)]
    assert jackknife_error(each) == pytest.approx(values.std().item() / math.sqrt(4000), rel=0.05)
    assert list(kept_without_each(6, groups=3))[1].tolist() == [0, 2, 3, 5]
    assert not list(kept_without_each(19)) and jackknife_error([]) is None
    assert jackknife_error([1.0, math.nan]) is None


def test_statistics_without_a_group_are_those_of_the_rest():
    rows = torch.randn(47, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = list(without_each(rows))
    for left_out, kept in enumerate(kept_without_each(47)):
        assert torch.allclose(found[left_out].mean, rows[kept].mean(0))
        assert torch.allclose(found[left_out].covariance, rows[kept].T.cov())
    assert not list(without_each(rows[:19]))


def test_the_error_of_a_frechet_distance_is_its_spread():
    """Over 30 sets of 400 images; the mean of the stated errors."""
    generator, identity = torch.Generator().manual_seed(0), torch.eye(4, dtype=torch.float64)
    values, errors = [], []
    for _ in range(30):
        rows = torch.randn(400, 4, generator=generator, dtype=torch.float64) + 0.5
        values.append(frechet_distance(rows.mean(0), rows.T.cov(), torch.zeros(4), identity))
        each = [frechet_distance(s.mean, s.covariance, torch.zeros(4), identity) for s in without_each(rows)]
        errors.append(jackknife_error(each))
    assert sum(errors) / 30 == pytest.approx(torch.tensor(values).std().item(), rel=0.35)


@pytest.mark.parametrize("most", [1000, 30])
def test_the_error_of_a_kernel_distance_is_its_spread(most):
    generator = torch.Generator().manual_seed(0)
    values, errors = [], []
    for _ in range(30):
        a, b = torch.randn(400, 3, generator=generator) + 0.5, torch.randn(400, 3, generator=generator)
        values.append(kernel_distance(a, b, generator=generator)[0])
        parts = disjoint_error(lambda p, a=a, b=b: kernel_distance(a[p], b[p], generator=generator)[0], 400, most=most)
        errors.append(parts)
    assert sum(errors) / 30 == pytest.approx(torch.tensor(values).std().item(), rel=0.4)
    assert disjoint_error(lambda p: 0.0, 19, most=1000) is None


def test_the_error_of_an_inception_score_is_its_spread():
    generator = torch.Generator().manual_seed(0)
    values, errors = [], []
    for _ in range(30):
        logits = 2 * torch.randn(300, 5, generator=generator)
        values.append(inception_score(logits)[0])
        errors.append(jackknife_error([inception_score(logits[kept])[0] for kept in kept_without_each(300)]))
    assert sum(errors) / 30 == pytest.approx(torch.tensor(values).std().item(), rel=0.35)


def test_a_share_has_the_error_of_a_mean():
    inside = torch.tensor([1.0, 1, 1, 0, 0], dtype=torch.float64)
    assert share_error(0.6, 5) == pytest.approx(inside.std().item() / math.sqrt(5))
