"""The matrix part of FID and the neighbours of precision and recall, against their usual computation.

    python benchmarks/frechet.py --output benchmarks/results/frechet_cpu.json

Random features, so no weights or data are needed. `frechet`: Cholesky and eigvalsh against scipy's `sqrtm` of the
product, 2048 dimensions. `precision_recall`: blocked matrix products against exact differences, block by block.
Medians of CPU time on one thread; the variants take turns. Prints a table and JSON.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from harness import median_seconds, save_result
from torch import Tensor

from diffusers_eqvae.metrics.frechet import FeatureStatistics, frechet_distance, precision_recall


def statistics(count: int, dimension: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Spectra of real features fall over several decades.
    scales = torch.logspace(0, -3, dimension)
    measured = FeatureStatistics(dimension)
    measured.update(torch.randn(count, dimension, generator=generator) * scales + seed * 0.01)
    return measured.mean, measured.covariance


def sqrtm_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    from scipy import linalg

    root = linalg.sqrtm(covariance1.numpy() @ covariance2.numpy())
    difference = (mean1 - mean2).numpy()
    return float(difference @ difference + np.trace(covariance1 + covariance2) - 2 * np.trace(root).real)


def exact_precision_recall(samples: Tensor, reference: Tensor, *, neighbours: int = 3) -> tuple[float, float]:
    def distances(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([(row - b).square().sum(1) for row in a])

    def radii(features: Tensor) -> Tensor:
        return distances(features, features).kthvalue(neighbours + 1, dim=1).values

    cross = distances(samples, reference)
    precision = (cross <= radii(reference)).any(1).double().mean()
    return float(precision), float((cross <= radii(samples)[:, None]).any(0).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimension", type=int, default=2048)
    parser.add_argument("--neighbour_samples", type=int, default=500, help="features per side of precision and recall")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--skip_reference", action="store_true", help="time our computation only")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    pair = (*statistics(3 * arguments.dimension, arguments.dimension, 0),)
    pair += (*statistics(3 * arguments.dimension, arguments.dimension, 1),)
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.neighbour_samples, arguments.dimension)
    samples, reference = (torch.randn(shape, generator=generator) for _ in range(2))

    steps = {
        "frechet": lambda: frechet_distance(*pair),
        "precision_recall": lambda: precision_recall(samples, reference),
    }
    usual = {
        "frechet_sqrtm": lambda: sqrtm_distance(*pair),
        "precision_recall_exact": lambda: exact_precision_recall(samples, reference),
    }
    results: dict[str, object] = {}
    if not arguments.skip_reference:
        ours, theirs = frechet_distance(*pair), sqrtm_distance(*pair)
        results["frechet_relative_difference"] = abs(ours - theirs) / theirs
        print(f"relative difference of the two distances: {results['frechet_relative_difference']:.1e}")
        steps |= usual
    times = median_seconds(steps, device="cpu", repetitions=arguments.repetitions, warmup=0)
    for name, value in times.items():
        print(f"{name:24}{value:9.3f} s")
    save_result(arguments.output, device="cpu", arguments=vars(arguments), seconds=times, **results)


if __name__ == "__main__":
    main()
