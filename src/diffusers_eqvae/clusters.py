"""Latent positions as points: one row for each, channels of equal weight, and k-means: regions that need no label."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

_RESTARTS, _ITERATIONS = 4, 50


def to_rows(maps: Tensor) -> Tensor:
    """(B, D, h, w) as one row per latent position: (B h w, D)."""
    return maps.movedim(1, -1).flatten(0, -2)


@dataclass(frozen=True)
class Standardization:
    """(x - mean) / std for each channel, so that no channel outweighs the others in a distance or an angle.

    Args:
        mean, std: (D,); a channel that does not vary has std 1.

    Example:
        >>> standard = Standardization.of(rows)(rows)  # mean 0, std 1 in each of D columns
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Standardization:
        """From features (N, D), one row per latent position."""
        std, mean = torch.std_mean(rows, dim=0, correction=0)
        return cls(mean, torch.where(std > 0, std, torch.ones_like(std)))

    def __call__(self, rows: Tensor) -> Tensor:
        return (rows - self.mean.to(rows)) / self.std.to(rows)


def cluster_positions(features: Tensor, num_clusters: int, *, seed: int = 0) -> Tensor:
    """Cluster of every position of features (B, D, h, w), common to all images: (B, h, w) int64 on the CPU.

    The best of four runs of k-means from k-means++ starts (scipy's `kmeans2`) on features standardised per channel,
    in float64. Clusters are numbered by falling size, so that the result is a function of the features and the seed.
    Where fewer positions than `num_clusters` are distinct, there are only so many clusters.

    Example:
        >>> cluster_positions(torch.randn(2, 4, 32, 32), 6).shape
        torch.Size([2, 32, 32])
    """
    rows = to_rows(features.double().cpu())
    points = Standardization.of(rows)(rows).numpy()
    count = min(num_clusters, len(np.unique(points, axis=0)))
    generator = np.random.default_rng(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="One of the clusters is empty")
        runs = [kmeans2(points, count, _ITERATIONS, minit="++", seed=generator) for _ in range(_RESTARTS)]
    _, labels = min(runs, key=lambda run: np.square(points - run[0][run[1]]).sum())
    order = np.argsort(-np.bincount(labels, minlength=count), kind="stable")
    numbered = torch.from_numpy(np.argsort(order)[labels])
    return numbered.view(len(features), *features.shape[-2:])
