"""Sampling many images reproducibly: labels, seeds, blocks of work, and files that survive a kill.

Image n of a set is a function of (seed, n) alone: its label, its initial noise and its SDE noise come from streams
seeded by that pair. Work is cut into fixed blocks of consecutive n; the blocks not yet there are dealt to the ranks in
turn. A block is computed with the same shapes on whatever rank, so the set is bit-equal for any number of processes on
one kind of machine (and number of threads); another batch size changes the order of sums and moves a few pixels by one
level.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..files import map_npz_array, require_writable, strict_json, write_json, write_npz, written_aside
from ..images import UINT8_RULE
from ..provenance import autoencoder_identity, weights_hash
from .pipeline_class_conditional import ClassConditionalPipeline

LABEL_POLICIES = ("random", "balanced")
PARTS_DIR = "parts"
SETTINGS_FILE = "sampling.json"
SAMPLES_FILE = "samples.npz"
# Independent streams of one image.
_NOISE, _LABEL = 0, 1


def load_pipeline(model: str, **options: Any) -> ClassConditionalPipeline:
    """A saved pipeline to sample many images of, without a progress bar of its own.

    Args:
        model: directory or Hub repository.
        options: passed to `from_pretrained`.

    Raises:
        ValueError: it is another pipeline, or a directory without one; said before weights are read.
    """
    if Path(model).is_dir() and not (Path(model) / "model_index.json").is_file():
        raise ValueError(f"{model} holds no pipeline: there is no model_index.json. Name the directory of one.")
    kind = ClassConditionalPipeline.load_config(model)["_class_name"]
    if kind != ClassConditionalPipeline.__name__:
        raise ValueError(
            f"{model} is a {kind}, and only a {ClassConditionalPipeline.__name__} is sampled here; sample it by its "
            "own script."
        )
    pipeline = ClassConditionalPipeline.from_pretrained(model, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_seed(seed: int, index: int) -> int:
    """63-bit seed of the noise of image `index`."""
    return int(np.random.SeedSequence((seed, index, _NOISE)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def sample_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per image, for its initial noise and then its SDE noise; CPU so that no device matters."""
    return [torch.Generator("cpu").manual_seed(sample_seed(seed, index)) for index in indices]


def sample_labels(class_ids: Sequence[int], indices: Sequence[int], *, seed: int, policy: str = "random") -> list[int]:
    """Class ids of the images `indices`.

    Args:
        class_ids: the classes to sample from.
        indices: image numbers.
        seed: of the set.
        policy: "random" draws uniformly and independently per image; "balanced" takes class_ids in turn, so that
            the counts of a set differ by at most one.

    Raises:
        ValueError: unknown policy or no classes.
    """
    if policy not in LABEL_POLICIES:
        raise ValueError(f"label policy must be one of {LABEL_POLICIES}; got {policy!r}.")
    if not class_ids:
        raise ValueError("Sampling needs at least one class id; got none.")
    if policy == "balanced":
        return [class_ids[index % len(class_ids)] for index in indices]
    return [class_ids[int(np.random.default_rng((seed, index, _LABEL)).integers(len(class_ids)))] for index in indices]


def require_finite(pipeline: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A pipeline's `callback_on_step_end` that refuses latents which 8 bits would turn into a image like any other.

    Looks at the last step only: looking makes the host wait for the device.
    """
    if step == len(pipeline.scheduler.timesteps) - 1 and not tensors["latents"].isfinite().all():
        raise ValueError("Sampling gave NaN or infinity. Check the transformer's weights and dtype.")
    return tensors


def plan_blocks(num_samples: int, batch_size: int) -> list[range]:
    """Consecutive image numbers in blocks of `batch_size`, the last one shorter where it does not divide."""
    if num_samples < 1 or batch_size < 1:
        raise ValueError(f"num_samples and batch_size must be at least 1; got {num_samples} and {batch_size}.")
    return [range(start, min(start + batch_size, num_samples)) for start in range(0, num_samples, batch_size)]


def part_path(output_dir: str | Path, block: range) -> Path:
    return Path(output_dir) / PARTS_DIR / f"part-{block.start:08d}.npz"


def write_part(output_dir: str | Path, block: range, arrays: Mapping[str, Any]) -> None:
    """Keeps one block's arr_0, arr_1, nfe and seconds until `finish` joins them."""
    write_npz(part_path(output_dir, block), **arrays)


def pending_blocks(
    output_dir: str | Path, blocks: Sequence[range], *, rank: int = 0, world_size: int = 1
) -> list[range]:
    """This rank's share of the blocks whose part file is not there yet: every world_size-th of them.

    All ranks must list before any writes, or they cut different lists.
    """
    return [block for block in blocks if not part_path(output_dir, block).exists()][rank::world_size]


def claim_directory(output_dir: str | Path, settings: Mapping[str, Any]) -> bool:
    """Takes a directory for one set of images; True where that set is already finished there.

    Raises:
        ValueError: the directory cannot be written to, or holds (part of) a set made with other settings; names what
            differs.
    """
    output_dir = Path(output_dir)
    settings = json.loads(strict_json(settings))
    finished, begun = output_dir / SETTINGS_FILE, output_dir / PARTS_DIR / "settings.json"
    require_writable(begun)
    for path in (finished, begun):
        if path.exists():
            present = json.loads(path.read_text())
            present = present.get("settings", {}) if path == finished else present
            changed = [key for key in {**present, **settings} if present.get(key) != settings.get(key)]
            if changed:
                differences = ", ".join(f"{key} ({present.get(key)} -> {settings.get(key)})" for key in changed)
                raise ValueError(
                    f"{output_dir} holds samples made with other settings: {differences}. "
                    "Repeat the settings to resume, or choose another output directory."
                )
            if path == finished:
                # A run killed after it had finished leaves its parts behind.
                shutil.rmtree(begun.parent, ignore_errors=True)
            return path == finished
    write_json(begun, settings)
    return False


def merge_parts(output_dir: str | Path, blocks: Sequence[range]) -> dict[str, float]:
    """Joins the part files into samples.npz: arr_0 uint8 (N, H, W, 3), arr_1 int64 (N,), in image order.

    Reads one part at a time, so memory does not grow with N.

    Returns:
        `seconds` summed over all parts and `nfe` of a image.

    Raises:
        FileNotFoundError: a part is missing.
    """
    missing = [block for block in blocks if not part_path(output_dir, block).exists()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(blocks)} parts are missing in {output_dir}; run it again.")
    labels, seconds, nfe = [], 0.0, 0.0
    with written_aside(Path(output_dir) / SAMPLES_FILE) as sibling, zipfile.ZipFile(sibling, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            for block in blocks:
                with np.load(part_path(output_dir, block)) as part:
                    samples = part["arr_0"]
                    labels.append(part["arr_1"])
                    seconds, nfe = seconds + float(part["seconds"]), float(part["nfe"])
                if block.start == 0:
                    shape = (blocks[-1].stop, *samples.shape[1:])
                    header = {**np.lib.format.header_data_from_array_1_0(samples), "shape": shape}
                    np.lib.format.write_array_header_1_0(stream, header)
                stream.write(samples.tobytes())
        with archive.open("arr_1.npy", "w") as stream:
            np.lib.format.write_array(stream, np.concatenate(labels))
    return {"nfe": nfe, "seconds": seconds}


def open_samples(path: str | Path) -> np.ndarray:
    """arr_0 of an uncompressed .npz as a memory map: 50 000 images cost no memory until they are read.

    Raises:
        ValueError: arr_0 is compressed.
    """
    return map_npz_array(path, "arr_0")


def write_pngs(samples: np.ndarray, directory: str | Path) -> None:
    """One PNG per sample, numbered from 000000.png; images that are there already are left alone."""
    directory = Path(directory)
    for index, sample in enumerate(samples):
        path = directory / f"{index:06d}.png"
        if not path.exists():
            with written_aside(path) as sibling:
                Image.fromarray(np.asarray(sample)).save(sibling, format="png")


def finish(
    output_dir: str | Path, blocks: Sequence[range], *, settings: Mapping[str, Any], facts: Mapping[str, Any]
) -> None:
    """Writes samples.npz, then sampling.json (settings, facts, uint8_rule, nfe, seconds), then removes the parts.

    sampling.json marks the set as finished. Killed in between, the next call begins again with what is there.
    """
    measured = merge_parts(output_dir, blocks)
    write_json(Path(output_dir) / SETTINGS_FILE, {"settings": settings, "uint8_rule": UINT8_RULE, **measured, **facts})
    shutil.rmtree(Path(output_dir) / PARTS_DIR)


def scheduler_facts(scheduler: Any) -> dict[str, Any]:
    """Class and options of a scheduler, as a result card states them."""
    options = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return {"class": type(scheduler).__name__, **options}


def identities(pipeline: Any) -> dict[str, Any]:
    """Which weights the two models of a pipeline have, under the names of a result card."""
    return {"autoencoder": autoencoder_identity(pipeline.vae), "transformer": weights_hash(pipeline.transformer)}
