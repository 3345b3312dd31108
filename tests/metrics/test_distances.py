"""Distances of feature sets against definitions written out in NumPy and SciPy, and their invariances."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusers_eqvae.metrics.distances import (
    FeatureStatistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    monge_distance,
    precision_recall,
    sorted_projections,
)


def rows(count: int, dimension: int, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(dimension, dimension))
    return torch.from_numpy(rng.normal(size=(count, dimension)) @ mixing + shift)


def statistics(features: torch.Tensor, batch: int = 64) -> FeatureStatistics:
    result = FeatureStatistics(features.shape[1])
    for part in features.split(batch):
        result.update(part)
    return result


def distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def test_statistics_equal_numpys():
    features = rows(3000, 17, shift=1000.0)
    measured = statistics(features, 7)
    assert measured.count == 3000
    np.testing.assert_allclose(measured.mean, features.numpy().mean(0), rtol=1e-13)
    np.testing.assert_allclose(measured.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-9)


@pytest.mark.parametrize("batch", [1, 7, 32, 128, 5000])
def test_statistics_do_not_see_the_batches(batch):
    features = rows(2500, 5).float()
    assert torch.equal(statistics(features, batch).covariance, statistics(features, 64).covariance)


def test_statistics_do_not_see_the_order_nor_the_process():
    features = rows(2500, 5, shift=3.0)
    whole = statistics(features)
    shuffled = statistics(features[torch.randperm(2500)])
    merged = FeatureStatistics(5)
    for part in features.split([1100, 1, 900, 499]):
        merged.merge(statistics(part))
    for other in (shuffled, merged):
        assert other.count == whole.count
        torch.testing.assert_close(other.mean, whole.mean, rtol=1e-13, atol=0)
        torch.testing.assert_close(other.covariance, whole.covariance, rtol=1e-11, atol=1e-11)


def test_statistics_keep_what_they_were_given():
    buffer = torch.ones(2, 3)
    measured = FeatureStatistics(3)
    measured.update(buffer)
    buffer.zero_()
    assert measured.mean.tolist() == [1, 1, 1]


def test_frechet_distance_equals_scipys_square_root():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = rows(900, 60), 1.3 * rows(800, 60, seed=1, shift=0.4)
    c1, c2 = (np.cov(x.numpy(), rowvar=False) for x in (a, b))
    difference = a.numpy().mean(0) - b.numpy().mean(0)
    expected = difference @ difference + np.trace(c1 + c2 - 2 * linalg.sqrtm(c1 @ c2).real)
    assert distance(statistics(a), statistics(b)) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_known_gaussians():
    """Covariances that commute: the distance is sum (sqrt(a) - sqrt(b))^2, also where some variances are 0."""
    basis = torch.linalg.qr(rows(40, 40)).Q
    a, b = (torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    for zeros in (0, 15):
        a[:zeros], b[5 : 5 + zeros] = 0, 0
        c1, c2 = (basis * a) @ basis.T, (basis * b) @ basis.T
        zero = torch.zeros(40)
        expected = float((a.sqrt() - b.sqrt()).square().sum())
        assert frechet_distance(zero, c1, zero + 2, c2) == pytest.approx(expected + 160, rel=1e-10)


@pytest.mark.parametrize(("first", "second"), [(30, 500), (500, 30), (30, 20)])
def test_fewer_samples_than_dimensions(first, second):
    """tr (C1 C2)^(1/2) is the nuclear norm of X1 X2^T / sqrt((n1 - 1)(n2 - 1)) for centred data."""
    a, b = rows(first, 100).numpy(), rows(second, 100, seed=1).numpy()
    x, y = a - a.mean(0), b - b.mean(0)
    cross = np.linalg.svd(x @ y.T, compute_uv=False).sum() / np.sqrt((first - 1) * (second - 1))
    spread = (x**2).sum() / (first - 1) + (y**2).sum() / (second - 1)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + spread - 2 * cross
    measured = distance(statistics(torch.from_numpy(a)), statistics(torch.from_numpy(b)))
    assert measured == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count", [20, 400])
def test_a_set_has_no_distance_to_itself(count):
    a = statistics(rows(count, 50))
    assert distance(a, a) == pytest.approx(0, abs=1e-9 * float(a.covariance.trace()))


def test_inception_score_by_its_formula():
    logits = np.random.default_rng(0).normal(size=(250, 12)) * 3
    scores = []
    for part in (logits[:100], logits[100:200], logits[200:]):
        p = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        scores.append(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))
    mean, std = inception_score(torch.from_numpy(logits), split_size=100)
    assert mean == pytest.approx(np.mean(scores), rel=1e-12) and std == pytest.approx(np.std(scores), rel=1e-9)
    certain = torch.eye(10).repeat(5, 1) * 1e4
    assert inception_score(certain)[0] == pytest.approx(10)  # ten classes, each certain and equally frequent


def test_kernel_distance_by_its_formula():
    a, b = rows(30, 6), rows(30, 6, seed=1, shift=0.3)
    x, y = a.numpy(), b.numpy()
    kernel = [[(u @ v / 6 + 1) ** 3 for v in np.concatenate([x, y])] for u in np.concatenate([x, y])]
    k = np.array(kernel)
    off = 1 - np.eye(30)
    expected = ((k[:30, :30] + k[30:, 30:]) * off).sum() / (30 * 29) - 2 * k[:30, 30:].mean()
    mean, std = kernel_distance(a, b, generator=torch.Generator().manual_seed(0), subsets=3, subset_size=30)
    # Every subset is both whole sets, so that nothing but rounding could deviate.
    assert mean == pytest.approx(expected, rel=1e-9) and std is None
    repeated = [
        kernel_distance(a, b, generator=torch.Generator().manual_seed(4), subsets=5, subset_size=9) for _ in range(2)
    ]
    assert repeated[0] == repeated[1] and repeated[0][1] > 0


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_precision_and_recall_equal_the_naive_ones(block):
    a, b = rows(150, 8), 0.7 * rows(120, 8, seed=1, shift=1.0)

    def naive(points, manifold):
        inside = 0
        within = np.linalg.norm(manifold[:, None] - manifold[None], axis=2)
        radii = np.sort(within, axis=1)[:, 3]  # column 0 is the point itself
        for point in points:
            inside += (np.linalg.norm(manifold - point, axis=1) <= radii).any()
        return inside / len(points)

    expected = naive(a.numpy(), b.numpy()), naive(b.numpy(), a.numpy())
    assert min(expected) > 0.05 and max(expected) < 1
    assert precision_recall(a, b, block_size=block) == pytest.approx(expected, abs=1e-12)
    assert precision_recall(a.float(), b.float(), block_size=block) == pytest.approx(expected, abs=1e-12)
    assert precision_recall(a, a) == (1, 1)
    assert precision_recall(a, a + 1e4) == (0, 0)


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest tensor has that any operation gives."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        found = [each.numel() for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        self.numel = max(self.numel, *found, 0)
        return result


def test_precision_and_recall_hold_one_block_of_distances_at_a_time():
    with LargestTensor() as largest:
        precision_recall(rows(300, 4), rows(500, 4, seed=1), block_size=10)
    assert largest.numel == 10 * 500


def test_distances_equal_torch_fidelitys():
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kernel_mmd
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    a, b = rows(150, 8), 0.7 * rows(120, 8, seed=1, shift=1.0)
    assert precision_recall(a, b) == pytest.approx(calculate_precision_recall_part(a, b), abs=1e-6)
    both = [{"mu": each.mean(0).numpy(), "sigma": np.cov(each.numpy(), rowvar=False)} for each in (a, b)]
    (theirs,) = fid_statistics_to_metric(*both, verbose=False).values()
    assert distance(statistics(a), statistics(b)) == pytest.approx(theirs, rel=1e-9)
    # Whole sets as one subset, so that nothing is drawn.
    ours, _ = kernel_distance(a[:120], b, generator=torch.Generator(), subsets=1, subset_size=120)
    assert ours == pytest.approx(kernel_mmd(a[:120].numpy(), b.numpy()), rel=1e-9)
    theirs = isc_features_to_metric(a, splits=3, shuffle=False)
    ours = inception_score(a, split_size=50)
    assert ours == pytest.approx(tuple(theirs.values()), rel=1e-12)


def test_undefined_statistics_are_named():
    measured = FeatureStatistics(3)
    with pytest.raises(ValueError, match="finite"):
        measured.update(torch.full((1, 3), float("nan")))
    with pytest.raises(ValueError, match="no features"):
        _ = measured.mean
    measured.update(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="at least two"):
        _ = measured.covariance


def test_the_monge_distance_of_a_shift_is_three_times_its_square():
    """Along directions that are a basis the mean of (u.s)^2 is |s|^2 / D exactly; 3 d mu^2 for mu in each of d."""
    given, dimension = rows(40, 6), 6
    basis = torch.linalg.qr(rows(dimension, dimension, seed=3)).Q
    for shift in (torch.full((dimension,), 0.7), torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0, 0.1])):
        pair = [sorted_projections(each, basis)[0] for each in (given, given.flip(0) + shift)]
        assert monge_distance(*pair, dimension) == pytest.approx(3 * float(shift.square().sum()))


def test_the_monge_distance_is_that_of_sorted_projections():
    first, second, directions = rows(15, 4), rows(15, 4, seed=1, shift=1.0), rows(5, 4, seed=2)
    total = 0.0
    for direction in directions.numpy():
        pairs = zip(sorted(first.numpy() @ direction), sorted(second.numpy() @ direction), strict=True)
        total += sum((one - other) ** 2 for one, other in pairs)
    values, places = zip(*(sorted_projections(each, directions) for each in (first, second)), strict=True)
    assert monge_distance(*values, 4) == pytest.approx(3 * 4 * total / (15 * 5))
    assert torch.allclose((directions @ first.T).gather(1, places[0]), values[0])
