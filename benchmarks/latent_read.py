"""Random reads and writes of latents: the sharded store against one .npy file per image.

    python benchmarks/latent_read.py --output benchmarks/results/latent_read_cpu.json

Both are read by the same DataLoader (in the main process) in the same random order, taking turns; figures are medians
of CPU time, system calls included, with the files in the page cache. Moments of 256 px images (8x32x32, float16) are
random, so no weights or data are needed. The store's writing includes its statistics, which .npy files do not have; a
row without them compares like with like. Prints a table and JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from harness import median_seconds, save_result
from torch.utils.data import DataLoader, Dataset

from diffusers_eqvae.autoencoders import Posterior
from diffusers_eqvae.data.latent_format import StoreSettings
from diffusers_eqvae.data.latent_store import LatentStore
from diffusers_eqvae.data.latent_writer import LatentStoreWriter
from diffusers_eqvae.data.order import DrawDataset, DrawSampler, collate_draws
from diffusers_eqvae.latents import LatentStatistics

SHAPE = (8, 32, 32)  # moments of a 256 px image in an f8 autoencoder with 4 channels


class NpyFiles(Dataset):
    """One array and one label file per image, as SiT-style trainers read them."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.count = count

    def __len__(self) -> int:
        return self.count

    def get(self, index: int, generator: np.random.Generator) -> dict[str, torch.Tensor]:
        moments = torch.from_numpy(np.load(self.folder / f"{index}.npy"))
        return {"moments": moments, "class_labels": torch.from_numpy(np.load(self.folder / f"{index}-label.npy"))}


def write_npy(folder: Path, moments: np.ndarray, labels: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    for index, (moment, label) in enumerate(zip(moments, labels, strict=True)):
        np.save(folder / f"{index}.npy", moment)
        np.save(folder / f"{index}-label.npy", label)


def write_store(folder: Path, moments: np.ndarray, labels: np.ndarray, shard_size: int) -> None:
    settings = StoreSettings(
        num_examples=len(moments),
        shape=SHAPE,
        dtype="float16",
        views=1,
        kind="moments",
        shard_size=shard_size,
        batch_size=256,
        resolution=256,
        downsampling_factor=8,
        labelled=True,
        encoder="0" * 16,
    )
    writer = LatentStoreWriter(folder, settings)
    for shard in range(settings.num_shards):
        rows = slice(settings.examples(shard).start, settings.examples(shard).stop)
        writer.write_shard(shard, torch.from_numpy(moments[rows, None]), labels=torch.from_numpy(labels[rows]))
    writer.finish(autoencoder=None)


def measure_statistics(moments: np.ndarray) -> None:
    """What a store notes of its latents, in the batches of its settings; .npy files carry nothing of the kind."""
    statistics = LatentStatistics()
    for batch in torch.from_numpy(moments).split(256):
        posterior = Posterior.from_moments(batch)
        statistics.update(posterior.mean, posterior.logvar)


class Reader:
    """Reads the next `batches` of a loader's endless random order."""

    def __init__(self, dataset: Dataset, batch_size: int, batches: int) -> None:
        sampler = DrawSampler(len(dataset), batch_size, seed=0)
        loader = DataLoader(DrawDataset(dataset, seed=0), batch_sampler=sampler, collate_fn=collate_draws)
        self.iterator = iter(loader)
        self.batches = batches

    def __call__(self) -> None:
        for _ in range(self.batches):
            next(self.iterator)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--shard_size", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--batches", type=int, default=8, help="read per turn")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--directory", help="where to write; a temporary folder by default")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    moments = generator.standard_normal((arguments.samples, *SHAPE), dtype=np.float32).astype(np.float16)
    labels = generator.integers(0, 1000, arguments.samples)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        npy, store = Path(folder) / "npy", Path(folder) / "store"
        writers = {
            "npy": lambda: write_npy(npy, moments, labels),
            "store": lambda: write_store(store, moments, labels, arguments.shard_size),
        }
        write = median_seconds(writers, device="cpu", repetitions=arguments.repetitions)
        statistics = median_seconds(
            {"store": lambda: measure_statistics(moments)}, device="cpu", repetitions=arguments.repetitions
        )
        readers = {
            "npy": Reader(NpyFiles(npy, arguments.samples), arguments.batch_size, arguments.batches),
            "store": Reader(LatentStore(store), arguments.batch_size, arguments.batches),
        }
        read = median_seconds(readers, device="cpu", repetitions=arguments.repetitions)
        files = {"npy": len(os.listdir(npy)), "store": len(os.listdir(store))}

    def microseconds(seconds: float) -> float:
        return round(seconds / arguments.samples * 1e6, 2)

    samples = arguments.batch_size * arguments.batches
    results = {
        "read_us_per_sample": {name: round(value / samples * 1e6, 2) for name, value in read.items()},
        "write_us_per_sample": {name: microseconds(value) for name, value in write.items()},
        "write_without_statistics_us_per_sample": {
            "npy": microseconds(write["npy"]),
            "store": microseconds(write["store"] - statistics["store"]),
        },
        "files": files,
    }
    print(f"{'':40s}{'one .npy each':>16s}{'store':>10s}{'ratio':>8s}")
    for row, values in results.items():
        print(f"{row:40s}{values['npy']:>16}{values['store']:>10}{values['store'] / values['npy']:>8.3f}")
    print(json.dumps(results))
    save_result(arguments.output, device="cpu", arguments=vars(arguments), **results)


if __name__ == "__main__":
    main()
