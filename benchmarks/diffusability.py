"""Diffusability of 5 000 latents of 4 x 32 x 32 in ten classes: CPU seconds of each part.

    python benchmarks/diffusability.py --output benchmarks/results/diffusability_cpu.json

Random latents, so no weights or data are needed. One thread, one call each. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from harness import median_seconds, save_result

from diffusers_eqvae.metrics import diffusability
from diffusers_eqvae.metrics.members.diffusability import diffusability_figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=5000)
    parser.add_argument("--side", type=int, default=32, help="of a latent, in cells")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(arguments.latents, 4, arguments.side, arguments.side, generator=generator)
    labels = torch.arange(arguments.latents) % 10
    times = median_seconds(
        {
            "viv": lambda: diffusability.velocity_irreducible_variance(latents, labels),
            "linear_loss": lambda: diffusability.linear_predictor_loss(latents, labels),
            "all, with labels": lambda: diffusability_figures(latents, labels),
        },
        device="cpu",
        repetitions=1,
        warmup=0,
    )
    for name, value in times.items():
        print(f"{name:20}{value:9.1f} s")
    save_result(arguments.output, device="cpu", arguments=vars(arguments), seconds=times)


if __name__ == "__main__":
    main()
