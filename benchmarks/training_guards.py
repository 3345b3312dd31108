"""What the guards of a training step cost: the same step with and without them, in turn.

    python benchmarks/training_guards.py --output benchmarks/results/training_guards_cpu.json

A step reads a shuffled batch of 256 px latents (8x32x32) from a store, goes forward and backward through
training/configs/sit_tiny.json with patches of 4 (64 tokens, so that reading weighs four times what it does with
patches of 2), clips, steps and averages. The guards are the crc32 of every row that is read for the first time (so in
the first epoch; here in every step), the look for NaN and infinity, and the count of skipped steps. Figures are of CPU
time: "share" is the median over rounds of the difference of whole steps, of which each goes first in every other
round, beside its standard error; "share_alone" that of the guards timed by themselves, which is less noisy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from unittest.mock import ANY, patch

import numpy as np
import torch
from harness import median_seconds, save_result, seconds
from latent_read import write_store

from diffusers_eqvae.data import latent_store
from diffusers_eqvae.models.transformer_sit import SiTTransformer2DModel
from diffusers_eqvae.training_utils.nonfinite import NonfiniteGuard
from diffusers_eqvae.training_utils.optimization import ExponentialAverage, OptimizedModule, step_all

ROOT = Path(__file__).resolve().parents[1]


class Training:
    """One training step at a call, with the guards or without."""

    def __init__(self, store: latent_store.LatentStore, batch_size: int) -> None:
        self.store, self.batch_size = store, batch_size
        self.unread = np.random.default_rng(0).permutation(len(store)).tolist()
        config = json.loads((ROOT / "training" / "configs" / "sit_tiny.json").read_text())
        torch.manual_seed(0)
        model = SiTTransformer2DModel.from_config(
            {**config, "patch_size": 4, "in_channels": 4, "sample_size": 32, "num_classes": 1000}
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        self.entry = OptimizedModule("model", model, model, optimizer, 1e-4, ExponentialAverage(model, 0.9999))
        self.guard = NonfiniteGuard(torch.device("cpu"))

    def loss(self) -> torch.Tensor:
        batch = self.read()
        latents, noise = batch["moments"][:, :4].float(), torch.randn(self.batch_size, 4, 32, 32)
        sigmas = torch.rand(self.batch_size)
        noisy = torch.lerp(latents, noise, sigmas[:, None, None, None])
        velocity = self.entry.module(noisy, timestep=sigmas, class_labels=batch["class_labels"]).sample
        return (velocity - (noise - latents)).square().mean()

    def read(self) -> dict[str, torch.Tensor]:
        """Rows that were not read before: a row is checked the first time."""
        batch, self.unread = self.unread[: self.batch_size], self.unread[self.batch_size :]
        return self.store.get_many(batch)

    def read_unchecked(self) -> None:
        with patch.object(latent_store, "crc32", lambda *_: ANY):
            self.read()

    def look(self) -> None:
        self.guard.count((~torch.isfinite(torch.stack([torch.ones(())])).all()).float())

    def guarded(self) -> None:
        self.loss().backward()
        self.guard.count(step_all([self.entry], factor=1.0, max_grad_norm=1.0)[1])

    def unguarded(self) -> None:
        with patch.object(latent_store, "crc32", lambda *_: ANY):  # equal to whatever was written
            self.loss().backward()
        norm, none = self.entry.gradient_norm(), torch.zeros(())
        self.entry.clip(1.0, norm)
        for group in self.entry.optimizer.param_groups:
            group["lr"] = 1e-4
        self.entry.optimizer.found_inf = None
        self.entry.optimizer.step()
        self.entry.update_ema(none)
        self.entry.optimizer.zero_grad(set_to_none=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=120)
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    count = 4 * (arguments.repetitions + 2) * arguments.batch_size
    moments = np.random.default_rng(0).standard_normal((count, 8, 32, 32), dtype=np.float32).astype(np.float16)
    labels = np.random.default_rng(1).integers(0, 1000, len(moments))
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder), moments, labels, 1024)
        training = Training(latent_store.LatentStore(Path(folder)), arguments.batch_size)
        found: dict[str, list[float]] = {"guarded": [], "unguarded": []}
        for number in range(arguments.repetitions + 2):
            for name in sorted(found, reverse=number % 2 == 1):  # what comes second may find warmer memory
                found[name].append(seconds(getattr(training, name), "cpu"))
        alone = {"read": training.read, "read_unchecked": training.read_unchecked, "look": training.look}
        alone = median_seconds(alone, device="cpu", repetitions=arguments.repetitions)
    guarded, unguarded = (statistics.median(times[2:]) for times in found.values())
    shares = [(one - other) / unguarded for one, other in list(zip(*found.values(), strict=True))[2:]]
    results = {"guarded_s": guarded, "unguarded_s": unguarded, "share": statistics.median(shares)}
    results |= {"standard_error": 1.2533 * statistics.stdev(shares) / len(shares) ** 0.5}  # of a median
    results |= {f"{name}_s": value for name, value in alone.items()}
    results |= {"share_alone": (alone["read"] - alone["read_unchecked"] + alone["look"]) / unguarded}
    print(json.dumps({name: round(value, 7) for name, value in results.items()}))
    save_result(arguments.output, device="cpu", arguments=vars(arguments), **results)


if __name__ == "__main__":
    main()
