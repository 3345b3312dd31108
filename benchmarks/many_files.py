"""How long a data set of many files takes to open, and how much memory it holds then.

    python benchmarks/many_files.py --num_files 100000 [--tars]

Files are 32 px PNGs of one colour each in 100 class folders, or in tars of 10 000 with a .cls beside each, written to
--directory and left there for the next time.
Opening is `load_image_dataset` and the identity that a run compares: what every script does before its first step.
Sizes are the headers of all images, which aspect buckets and leaving out small images need.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import tarfile
import tempfile
import time
from pathlib import Path

from harness import save_result
from PIL import Image

from diffusers_eqvae.data.image_datasets import load_image_dataset

CLASSES = 100
IN_A_TAR = 10_000


def png(number: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (32, 32), (number % 256, number // 256 % 256, number // 65536)).save(content, "PNG")
    return content.getvalue()


def write_tars(directory: Path, count: int) -> None:
    for first in range(0, count, IN_A_TAR):
        path = directory / f"{first // IN_A_TAR:05d}.tar"
        if path.exists():
            continue
        directory.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for number in range(first, min(first + IN_A_TAR, count)):
                for name, content in (
                    (f"{number:07d}.png", png(number)),
                    (f"{number:07d}.cls", b"%d" % (number % CLASSES)),
                ):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def write_files(directory: Path, count: int) -> None:
    for number in range(count):
        folder = directory / f"class_{number % CLASSES:03d}"
        path = folder / f"{number:07d}.png"
        if path.exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num_files", type=int, default=100_000)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()) / "eqvae_many_files")
    parser.add_argument("--tars", action="store_true")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    directory = given.directory / f"{given.num_files}{'_tars' * given.tars}"
    (write_tars if given.tars else write_files)(directory, given.num_files)
    columns = {"image_column": "png", "label_column": "cls"} if given.tars else {}
    rounds = []
    for _ in range(2):
        before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        source = load_image_dataset(train_data_dir=directory, require_labels=True, **columns)
        opened = time.perf_counter()
        identity = source.identity
        done = time.perf_counter()
        source.check(len(source))
        sized = time.perf_counter()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        rounds.append(
            {"open": opened - begun, "identity": done - opened, "sizes": sized - done, "extra_peak_mib": grown}
        )
        print(
            f"{len(source)} images in {len(source.id2label)} classes: opened in {opened - begun:.1f} s, identity of "
            f"{len(identity)} entries in {done - opened:.1f} s, all sizes in {sized - done:.1f} s, "
            f"{grown:.0f} MiB more at the peak (pid {os.getpid()})"
        )
    save_result(given.output, device="cpu", arguments=vars(given), rounds=rounds)


if __name__ == "__main__":
    main()
