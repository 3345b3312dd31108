"""The matrix part of FID against its usual computation.

    python benchmarks/frechet.py --output benchmarks/results/frechet_cpu.json

Random features, so no weights or data are needed: Cholesky and eigvalsh against scipy's `sqrtm` of the product, 2048
dimensions; and ours for half as many samples as dimensions, where it takes another way, against such a reference and
against themselves. Medians of CPU time on one thread; the variants take turns. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from harness import median_seconds, save_result
from torch import Tensor

from diffusers_eqvae.metrics.distances import FeatureStatistics, frechet_distance


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimension", type=int, default=2048)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--skip_reference", action="store_true", help="time our computation only")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    size = arguments.dimension
    reference, many, few = statistics(3 * size, size, 0), statistics(3 * size, size, 1), statistics(size // 2, size, 1)
    full = (*reference, *many)
    steps = {
        "frechet": lambda: frechet_distance(*full),
        "frechet_few_samples": lambda: frechet_distance(*reference, *few),
        "frechet_few_samples_both": lambda: frechet_distance(*few, *few),
    }
    results: dict[str, object] = {}
    if not arguments.skip_reference:
        ours, theirs = frechet_distance(*full), sqrtm_distance(*full)
        results["relative_difference"] = abs(ours - theirs) / theirs
        print(f"relative difference of the two distances: {results['relative_difference']:.1e}")
        steps["sqrtm"] = lambda: sqrtm_distance(*full)
    times = median_seconds(steps, device="cpu", repetitions=arguments.repetitions, warmup=0)
    for name, value in times.items():
        print(f"{name:28}{value:9.3f} s")
    save_result(arguments.output, device="cpu", arguments=vars(arguments), seconds=times, **results)


if __name__ == "__main__":
    main()
