"""Precision and recall of 10 000 samples and as many of the reference: time, peak memory, and the naive computation.

    python benchmarks/precision_recall.py --output benchmarks/results/precision_recall_cpu.json

Random features, so no weights or data are needed. `blocked` is ours, at full size; `blocked_small` and `naive` (exact
differences, one row at a time) take turns on fewer samples. Medians of CPU time on one thread. Memory is what the
process's peak grows by in the first call. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import resource
import sys
from pathlib import Path

import torch
from harness import median_seconds, save_result
from torch import Tensor

from diffusers_eqvae.metrics.distances import precision_recall


def naive_precision_recall(samples: Tensor, reference: Tensor, *, neighbours: int = 3) -> tuple[float, float]:
    def distances(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([(row - b).square().sum(1) for row in a])

    def radii(features: Tensor) -> Tensor:
        return distances(features, features).kthvalue(neighbours + 1, dim=1).values

    cross = distances(samples, reference)
    precision = (cross <= radii(reference)).any(1).double().mean()
    return float(precision), float((cross <= radii(samples)[:, None]).any(0).double().mean())


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000, help="features per side")
    parser.add_argument("--naive_samples", type=int, default=500, help="features per side of the naive computation")
    parser.add_argument("--dimension", type=int, default=2048)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    generator = torch.Generator().manual_seed(0)
    shape = (arguments.samples, arguments.dimension)
    samples, reference = (torch.randn(shape, generator=generator) for _ in range(2))
    before = peak_bytes()
    precision, recall = precision_recall(samples, reference)
    extra = peak_bytes() - before
    few = samples[: arguments.naive_samples], reference[: arguments.naive_samples]
    difference = max(abs(a - b) for a, b in zip(precision_recall(*few), naive_precision_recall(*few), strict=True))
    print(f"precision {precision:.4f}, recall {recall:.4f}; {extra / 1e6:.0f} MB above the features")
    print(f"largest difference to the naive computation: {difference:.1e}")
    times = median_seconds(
        {
            "blocked": lambda: precision_recall(samples, reference),
            "blocked_small": lambda: precision_recall(*few),
            "naive": lambda: naive_precision_recall(*few),
        },
        device="cpu",
        repetitions=arguments.repetitions,
        warmup=0,
    )
    for name, value in times.items():
        print(f"{name:24}{value:9.3f} s")
    results = {"extra_peak_bytes": extra, "difference_to_naive": difference}
    save_result(arguments.output, device="cpu", arguments=vars(arguments), seconds=times, **results)


if __name__ == "__main__":
    main()
