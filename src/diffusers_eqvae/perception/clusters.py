"""k-means of latent positions: regions of an image that need no label."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from .features import Standardization, to_rows

_RESTARTS, _ITERATIONS = 4, 50


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
