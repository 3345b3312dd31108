"""Distances between two sets of features: Fréchet, kernel, Monge, Inception score, precision and recall.

Features come from `metrics.feature_networks`; everything here is mathematics on tensors and knows no network.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows gathered before one matrix product; fixed, so that the sums do not depend on the batches features arrive in.
_FLUSH_ROWS = 1024


class FeatureStatistics:
    """Streaming mean and covariance (ddof 1) of feature rows in float64, on the CPU.

    Rows are gathered into blocks of a fixed size, blocks are joined by Chan, Golub and LeVeque (1979): the result does
    not depend on how rows are cut into batches (bit-equal), and on their order to rounding only.

    Args:
        dimension: D, the length of a feature.

    Example:
        >>> statistics = FeatureStatistics(2048)
        >>> statistics.update(features)
        >>> statistics.mean.shape, statistics.covariance.shape
        (torch.Size([2048]), torch.Size([2048, 2048]))
    """

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension
        self._count = 0
        self._mean = torch.zeros(dimension, dtype=torch.float64)
        self._scatter = torch.zeros(dimension, dimension, dtype=torch.float64)
        self._pending: list[Tensor] = []
        self._pending_rows = 0

    @property
    def count(self) -> int:
        return self._count + self._pending_rows

    def update(self, features: Tensor) -> None:
        """Adds features (B, D) of any float dtype and device."""
        # Copied: a caller may reuse its buffer before the block is full.
        rows = features.detach().to("cpu", torch.float64, copy=True)
        if not rows.isfinite().all():
            raise ValueError("Features must be finite; got NaN or infinity. Check the images and the network.")
        self._pending.append(rows)
        self._pending_rows += len(rows)
        if self._pending_rows >= _FLUSH_ROWS:
            blocks = list(torch.cat(self._pending).split(_FLUSH_ROWS))
            self._pending = [blocks.pop()] if len(blocks[-1]) < _FLUSH_ROWS else []
            self._pending_rows = sum(map(len, self._pending))
            for block in blocks:
                self._add(block)

    def merge(self, other: FeatureStatistics) -> None:
        """Adds what `other` has seen; `other` keeps its numbers."""
        self._flush()
        other._flush()
        self._join(other._count, other._mean, other._scatter)

    @property
    def mean(self) -> Tensor:
        """(D,) float64."""
        self._flush()
        if self._count == 0:
            raise ValueError("The mean of no features is undefined; call update first.")
        return self._mean.clone()

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, divided by N - 1."""
        self._flush()
        if self._count < 2:
            raise ValueError(f"A covariance needs at least two features; got {self._count}.")
        return self._scatter / (self._count - 1)

    def _flush(self) -> None:
        if self._pending:
            self._add(torch.cat(self._pending))
            self._pending, self._pending_rows = [], 0

    def _add(self, rows: Tensor) -> None:
        mean = rows.mean(0)
        centred = rows - mean
        self._join(len(rows), mean, centred.T @ centred)

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if count == 0:
            return
        total = self._count + count
        delta = mean - self._mean
        self._scatter += scatter
        self._scatter.addr_(delta, delta, alpha=self._count * count / total)
        self._mean += delta * (count / total)
        self._count = total


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2)), the squared Fréchet distance of two Gaussians.

    FID (Heusel et al., arXiv 1706.08500, section 3) on Inception's pool features, sFID (Nash et al., arXiv 2103.03841)
    on its spatial ones. With C1 = L L^T (Cholesky) the trace is the sum of the square roots of the eigenvalues of the
    symmetric L^T C2 L. Where a covariance has (numerically) lower rank, as with fewer samples than dimensions, it is
    the nuclear norm of F1^T F2 with C = F F^T, of that matrix from an eigendecomposition: no root of rounding errors.

    Differs from the reference: no scipy `sqrtm` of a matrix that is not symmetric, no 1e-6 added to the diagonal, no
    imaginary part to discard.

    Args:
        mean1, mean2: (D,).
        covariance1, covariance2: (D, D), symmetric positive semi-definite.
    """
    mean1, covariance1, mean2, covariance2 = (
        torch.as_tensor(each).to("cpu", torch.float64) for each in (mean1, covariance1, mean2, covariance2)
    )
    factor1, factor2 = _cholesky(covariance1), _cholesky(covariance2)
    if factor1 is not None and factor2 is not None:
        trace = torch.linalg.eigvalsh(factor1.T @ covariance2 @ factor1).clamp_min(0).sqrt().sum()
    else:
        factor1 = _thin_factor(covariance1) if factor1 is None else factor1
        factor2 = _thin_factor(covariance2) if factor2 is None else factor2
        trace = torch.linalg.svdvals(factor1.T @ factor2).sum()
    distance = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * trace
    return float(distance)


def _cholesky(covariance: Tensor) -> Tensor | None:
    """The Cholesky factor, or None where the matrix is numerically singular."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed:
        return None
    pivots = factor.diagonal().square()
    smallest_trusted = len(covariance) * torch.finfo(torch.float64).eps * pivots.max()
    return factor if pivots.min() > smallest_trusted else None


def _thin_factor(covariance: Tensor) -> Tensor:
    """F of shape (D, rank) with F F^T = covariance; directions below rounding are left out."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > len(covariance) * torch.finfo(torch.float64).eps * values.abs().max()
    return vectors[:, kept] * values[kept].sqrt()


def inception_score(logits: Tensor, *, split_size: int = 5000) -> tuple[float, float]:
    """exp E KL(p(y|x) || p(y)): mean and standard deviation over splits (Salimans et al., arXiv 1606.03498).

    Args:
        logits: (N, K), without the bias, in the order of the images (the ADM protocol).
        split_size: consecutive images per split; the last split may be shorter.

    The standard deviation is over splits (ddof 0), 0 for one split.
    """
    scores = []
    for part in logits.split(split_size):
        log_p = part.double().log_softmax(1)
        p = log_p.exp()
        log_marginal = p.mean(0).log()
        # A class that no image has any probability of contributes 0, not 0 * -infinity.
        divergence = torch.where(p > 0, p * (log_p - log_marginal), torch.zeros_like(p)).sum(1)
        scores.append(divergence.mean().exp())
    stacked = torch.stack(scores)
    return float(stacked.mean()), float(stacked.std(correction=0))


def kernel_distance(
    samples: Tensor,
    reference: Tensor,
    *,
    generator: torch.Generator,
    subsets: int = 100,
    subset_size: int = 1000,
) -> tuple[float, float | None]:
    """KID (Bińkowski et al., arXiv 1801.01401): mean and standard deviation over subsets of the unbiased MMD^2.

    The kernel is (x.y / D + 1)^3. It may be slightly negative, and unlike FID is unbiased in the number of samples.

    Args:
        samples, reference: (N, D) and (M, D).
        generator: CPU generator that draws the subsets, so that the number can be repeated.
        subset_size: cut to the smaller of N and M.

    Returns:
        Mean and standard deviation; None for the latter where every subset is both whole sets, drawn in another
        order: it would be rounding, and says nothing of how far the mean can be trusted.
    """
    size = min(subset_size, len(samples), len(reference))
    samples, reference = samples.detach().cpu(), reference.detach().cpu()
    if size == len(samples) == len(reference):
        return float(_unbiased_mmd2(samples.double(), reference.double())), None
    values = torch.empty(subsets, dtype=torch.float64)
    for index in range(subsets):
        x = samples[torch.randperm(len(samples), generator=generator)[:size]].double()
        y = reference[torch.randperm(len(reference), generator=generator)[:size]].double()
        values[index] = _unbiased_mmd2(x, y)
    return float(values.mean()), float(values.std(correction=0))


def _unbiased_mmd2(x: Tensor, y: Tensor) -> Tensor:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1).pow(3)

    within_x, within_y = kernel(x, x), kernel(y, y)
    pairs = len(x) * (len(x) - 1)
    within = (within_x.sum() - within_x.trace() + within_y.sum() - within_y.trace()) / pairs
    return within - 2 * kernel(x, y).mean()


def sorted_projections(features: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Of features (N, D) along unit vectors (M, D): values (M, N) in ascending order, and whose they are, (M, N)."""
    return (directions.double() @ features.detach().cpu().double().T).sort(dim=1)


def monge_distance(samples: Tensor, reference: Tensor, dimension: int) -> float:
    """MIND (Berthet et al., arXiv 2605.06797, as torch-fidelity states it), of `sorted_projections` of both sets:

        3 D mean over M directions and N ranks of (sample - reference)^2,

    which is 3 D times the squared sliced 2-Wasserstein distance. Where all features are shifted by a vector s the mean
    of (u.s)^2 over directions is |s|^2 / D, so that it is 3 |s|^2 however they are distributed. Of finite sets of one
    distribution it is above 0, the more so the fewer they are.
    """
    return float(3 * dimension * (samples - reference).square().mean())


def precision_recall(
    samples: Tensor, reference: Tensor, *, neighbours: int = 3, block_size: int = 1024
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991).

    Precision is the share of samples that lie in the reference's manifold, recall the share of the reference that lies
    in the samples' manifold; a manifold is the union of balls around its points that reach to their `neighbours`-th
    nearest neighbour, the point itself not counted.

    Args:
        samples, reference: (N, D) and (M, D) on one device. Distances are computed in their dtype, by blocks of a
            matrix product around the reference's mean, in memory O(block_size * max(N, M)).
        neighbours: k; both sides need more features than that.
    """
    centre = reference.mean(0, keepdim=True)
    samples, reference = samples - centre, reference - centre
    sample_radii = _squared_radii(samples, neighbours, block_size)
    reference_radii = _squared_radii(reference, neighbours, block_size)
    samples_inside = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    reference_inside = torch.zeros(len(reference), dtype=torch.bool, device=samples.device)
    for start in range(0, len(samples), block_size):
        block = slice(start, start + block_size)
        distances = _squared_distances(samples[block], reference)
        samples_inside[block] = (distances <= reference_radii).any(1)
        reference_inside |= (distances <= sample_radii[block, None]).any(0)
    return float(samples_inside.double().mean()), float(reference_inside.double().mean())


def _squared_radii(features: Tensor, neighbours: int, block_size: int) -> Tensor:
    radii = []
    for start in range(0, len(features), block_size):
        distances = _squared_distances(features[start : start + block_size], features)
        rows = torch.arange(len(distances), device=features.device)
        distances[rows, rows + start] = torch.inf
        radii.append(distances.topk(neighbours, dim=1, largest=False).values[:, -1])
    return torch.cat(radii)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    norms = b.square().sum(1).expand(len(a), -1)
    distances = torch.addmm(norms, a, b.T, alpha=-2)
    return distances.add_(a.square().sum(1, keepdim=True)).clamp_min_(0)
