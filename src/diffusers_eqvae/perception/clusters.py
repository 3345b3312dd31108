"""k-means of cells: regions of a image that need no label."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import Standardization, to_rows


def kmeans(
    points: Tensor, num_clusters: int, *, seed: int = 0, restarts: int = 4, max_iterations: int = 100
) -> tuple[Tensor, Tensor]:
    """Lloyd's k-means from k-means++ starts (Arthur & Vassilvitskii 2007): the best of `restarts`.

    Minimises sum_n |x_n - c_l(n)|^2. Clusters are numbered by falling size, so that a result is a function of the
    points and the seed. A cluster that loses all its points is put on the point furthest from its centre.

    Args:
        points: (N, D); taken as float32 unless they are float64.
        num_clusters: K; where fewer points are distinct, some clusters stay empty.

    Returns:
        Cluster of each point (N,) int64 and the centres (K, D).

    Raises:
        ValueError: points that are no finite matrix, or not 1 <= K <= N.
    """
    if points.ndim != 2 or not torch.isfinite(points).all():
        raise ValueError(f"k-means needs finite points (N, D); got {tuple(points.shape)}, finite or not.")
    if not 1 <= num_clusters <= len(points):
        raise ValueError(f"The number of clusters must be 1..{len(points)}, the points there are; got {num_clusters}.")
    points = points if points.dtype == torch.float64 else points.float()
    generator = torch.Generator().manual_seed(seed)
    runs = [_lloyd(points, _spread(points, num_clusters, generator), max_iterations) for _ in range(max(1, restarts))]
    _, labels, centres = min(runs, key=lambda run: run[0])
    order = torch.bincount(labels, minlength=num_clusters).argsort(descending=True, stable=True)
    return order.argsort()[labels], centres[order]


def cluster_cells(features: Tensor, num_clusters: int, *, seed: int = 0) -> Tensor:
    """Cluster of every cell of features (B, D, h, w), standardised per channel; common to all images: (B, h, w).

    Example:
        >>> clusters = cluster_cells(latent_features(latents).patch, num_clusters=6)
    """
    rows = to_rows(features.float())
    labels, _ = kmeans(Standardization.of(rows)(rows), num_clusters, seed=seed)
    return labels.view(len(features), *features.shape[-2:])


def _spread(points: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """First centres: each next one is a point drawn with a chance proportional to its squared distance."""
    first = int(torch.randint(len(points), (1,), generator=generator))
    centres = [points[first]]
    squared = (points - centres[0]).square().sum(1)
    while len(centres) < num_clusters:
        cumulative = squared.double().cumsum(0).cpu()
        draw = torch.rand(1, generator=generator, dtype=torch.float64) * cumulative[-1]
        index = int(torch.searchsorted(cumulative, draw, right=True).clamp_max(len(points) - 1))
        centres.append(points[index])
        squared = torch.minimum(squared, (points - points[index]).square().sum(1))
    return torch.stack(centres)


def _lloyd(points: Tensor, centres: Tensor, max_iterations: int) -> tuple[float, Tensor, Tensor]:
    """Sum of squared distances, clusters and centres once no point changes its cluster."""
    labels = torch.full((len(points),), -1, device=points.device)
    for _ in range(max_iterations):
        distance, nearest = torch.cdist(points, centres).min(1)
        if torch.equal(nearest, labels):
            break
        labels = nearest
        # A product sums in one order on every device; index_add_ does not on a GPU.
        members = F.one_hot(labels, len(centres)).to(points.dtype)
        counts = members.sum(0)[:, None]
        centres = members.T @ points / counts.clamp_min(1)
        for empty in (counts[:, 0] == 0).nonzero().flatten().tolist():
            furthest = int(distance.argmax())
            centres[empty] = points[furthest]
            distance[furthest] = 0.0
    distance, labels = torch.cdist(points, centres).min(1)
    return float(distance.double().square().sum()), labels, centres
