"""What glibc's allocator costs a training step on the CPU, and what keeping large buffers costs in memory.

Buffers above glibc's limit (at most 32 MiB) are mapped anew for every tensor and given back when it is freed, so that
the kernel faults in and clears every page again. `keep_large_buffers` lifts the limit. Each
variant runs in processes of its own, in turns; CPU seconds are user and system time of the whole process.

    python benchmarks/cpu_allocator.py --output benchmarks/results/cpu_allocator_cpu.json
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

from harness import save_result

VARIANTS = ("as it is", "large buffers kept")


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_large_buffers() -> None:
    """Lets glibc keep what tensors free, instead of mapping and clearing new pages for every large one.

    Memory that was freed stays with the process. MALLOC_ variables in the environment win; other C libraries are left
    alone.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def train(steps: int, resolution: int, batch_size: int, keep: bool) -> None:
    """A few steps of an EQ-VAE-sized autoencoder; prints CPU seconds, split, and the peak of memory."""
    import torch
    from autoencoder_step import build_vae

    if keep:
        keep_large_buffers()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    vae = build_vae(full=False)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-4)
    images = torch.rand(batch_size, 3, resolution, resolution) * 2 - 1
    for step in range(steps + 1):
        if step == 1:
            before = resource.getrusage(resource.RUSAGE_SELF)
        loss = (vae.decode(vae.encode(images).latent_dist.mean).sample - images).abs().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = resource.getrusage(resource.RUSAGE_SELF)
    measured = {"user": after.ru_utime - before.ru_utime, "system": after.ru_stime - before.ru_stime}
    print(json.dumps({**measured, "peak_mib": after.ru_maxrss / 1024}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = (arguments.steps, arguments.resolution, arguments.batch_size)
    if arguments.child:
        train(*sizes, keep=arguments.child == VARIANTS[1])
        return
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(arguments.repetitions):
        for variant in VARIANTS:
            command = [sys.executable, *sys.argv, "--child", variant]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[variant].append(json.loads(done.stdout))
    medians = {
        variant: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for variant, runs in found.items()
    }
    cpu = {variant: median["user"] + median["system"] for variant, median in medians.items()}
    ratio = cpu[VARIANTS[1]] / cpu[VARIANTS[0]]
    for variant, median in medians.items():
        print(f"{variant}: {cpu[variant]:.2f} s CPU ({median['system']:.2f} s system), {median['peak_mib']:.0f} MiB")
    print(f"ratio {ratio:.3f}")
    save_result(arguments.output, device="cpu", arguments=vars(arguments), medians=medians, ratio=ratio)


if __name__ == "__main__":
    main()
