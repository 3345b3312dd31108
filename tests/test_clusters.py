"""Positions as points: what standardisation and k-means must find where it was put."""

from __future__ import annotations

import pytest
import torch

from diffusers_eqvae.clusters import Standardization, cluster_positions, to_rows


def test_standardised_features_have_unit_variance_and_constants_stay_finite():
    rows = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 9.0, 0.0]) + 2
    standard = Standardization.of(rows)(rows)
    assert torch.allclose(standard.mean(0), torch.zeros(3), atol=1e-6)
    assert torch.allclose(standard.std(0, correction=0), torch.tensor([1.0, 1.0, 0.0]), atol=1e-5)


def blobs(count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points in `count` heaps, well apart, heap k with `size` + k of them; and their heaps."""
    generator = torch.Generator().manual_seed(1)
    heaps = torch.arange(count).repeat_interleave(torch.arange(size, size + count))
    centres = torch.randn(count, 5, generator=generator) * 20
    return centres[heaps] + 0.1 * torch.randn(len(heaps), 5, generator=generator), heaps


def test_clusters_are_separate_heaps_in_any_order_numbered_by_falling_size():
    points, heaps = blobs(6, 10)
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(2))
    for seed in range(5):
        labels = cluster_positions(points[order].T[None, :, :, None], 6, seed=seed)
        assert torch.equal(labels.flatten(), 5 - heaps[order])


def spread_within(points: torch.Tensor, labels: torch.Tensor) -> float:
    rows = to_rows(points.double())
    rows = (rows - rows.mean(0)) / rows.std(0, correction=0)
    heaps = [rows[labels.flatten() == label] for label in labels.unique()]
    return sum((heap - heap.mean(0)).square().sum().item() for heap in heaps)


def test_clusters_are_a_function_of_features_and_seed_and_nearest_to_their_means():
    features = torch.randn(1, 3, 20, 10, generator=torch.Generator().manual_seed(0))
    labels = cluster_positions(features, 7, seed=3)
    assert torch.equal(labels, cluster_positions(features, 7, seed=3)) and labels.unique().tolist() == list(range(7))
    rows = Standardization.of(to_rows(features))(to_rows(features))
    centres = torch.stack([rows[labels.flatten() == label].mean(0) for label in range(7)])
    assert (torch.cdist(rows, centres).argmin(1) == labels.flatten()).all()


def test_clusters_are_the_tightest_of_several_starts(monkeypatch):
    features = torch.randn(1, 2, 10, 6, generator=torch.Generator().manual_seed(0))
    best = [spread_within(features, cluster_positions(features, 8, seed=seed)) for seed in range(6)]
    monkeypatch.setattr("diffusers_eqvae.clusters._RESTARTS", 1)
    single = [spread_within(features, cluster_positions(features, 8, seed=seed)) for seed in range(6)]
    assert all(several <= one for several, one in zip(best, single, strict=True)) and sum(best) < 0.98 * sum(single)


@pytest.mark.parametrize("distinct", [1, 2, 3])
def test_fewer_distinct_positions_are_fewer_clusters(distinct):
    features = (torch.arange(12) % distinct).float().view(1, 1, 3, 4).expand(1, 2, 3, 4)
    labels = cluster_positions(features, 3)
    assert labels.unique().tolist() == list(range(distinct))
    assert all(len(labels[features[:, 0] == value].unique()) == 1 for value in range(distinct))


def test_channels_weigh_the_same_in_clusters():
    """Halves that differ by a little in two channels, beside noise a hundred times larger in a third."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 3, 8, 8, generator=generator) * torch.tensor([0.01, 0.01, 30.0]).view(1, 3, 1, 1)
    features[:, :2, :, 4:] += 1.0
    labels = cluster_positions(features, 2)
    assert len(labels[..., :4].unique()) == len(labels[..., 4:].unique()) == 1 and len(labels.unique()) == 2


def test_clusters_rotate_with_the_image():
    features = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    features[:, 0, :3] += 30
    features[:, 1, :2, :2] += 30
    plain = cluster_positions(features, 3)
    rotated = cluster_positions(torch.rot90(features, 1, (2, 3)), 3)
    assert torch.equal(rotated, torch.rot90(plain, 1, (1, 2)))
    assert plain.unique(return_counts=True)[1].tolist() == [18, 14, 4]
