"""Sampling many images reproducibly: labels, seeds, blocks of work, and files that survive a kill.

Image n of a set is a function of (seed, n) alone: its label, its initial noise and its SDE noise come from streams
seeded by that pair. Work is cut into fixed blocks of consecutive n; the blocks not yet there are dealt to the ranks in
turn. A block is computed with the same shapes on whatever rank, so the set is bit-equal for any number of processes on
one kind of machine (and number of threads); another batch size changes the order of sums and moves a few values of
uint8 by one.
"""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import _registration
from ..classes import ClassTable
from ..directories import OutputDirectory
from ..files import (
    atomic_path,
    delete,
    map_npz_array,
    read_json,
    read_npz,
    require_format_version,
    strict_json,
    write_json,
    write_npz,
)
from ..images import UINT8_RULE
from ..pretrained import load_pretrained, looking_for
from ..provenance import autoencoder_identity, hash_file, public_config, weights_hash
from ..randomness import numpy_generator, torch_generator
from .guide import check_guide, check_guides_path
from .pipeline_class_conditional import ClassConditionalPipeline

LABEL_POLICIES = ("random", "balanced")
PARTS_DIR = "parts"
SETTINGS_FILE = "sampling.json"
SAMPLES_FILE = "samples.npz"
BEGUN = "settings.json"
NAMES = (SAMPLES_FILE, SETTINGS_FILE, PARTS_DIR, "grid.png", "png")
FORMAT_VERSION = 3  # 1 had no digest of the samples, 2 one for the options of all models
# Independent streams of one image.
_NOISE, _LABEL = 0, 1


def load_pipeline(model: str, **options: Any) -> ClassConditionalPipeline:
    """A saved pipeline (directory or Hub repository) to sample many images of, without a progress bar of its own.

    A directory without a pipeline and a pipeline of another class are refused before weights are read; `options` go to
    `from_pretrained`.

    Example:
        >>> pipeline = load_pipeline("runs/sit", dtype=torch.bfloat16).to("cuda")
    """
    if Path(model).is_dir() and not (Path(model) / "model_index.json").is_file():
        raise ValueError(f"{model} does not hold a pipeline (model_index.json); name the directory of one.")
    if Path(model).is_dir():
        read_json(Path(model) / "model_index.json", needs={"_class_name": str})
    with looking_for(model, "a pipeline") as where:
        config = ClassConditionalPipeline.load_config(model, **where)
    kind = config.get("_class_name")
    found = getattr(sys.modules[_registration.LIBRARY], str(kind), None)
    if not (isinstance(found, type) and issubclass(found, ClassConditionalPipeline)):
        raise ValueError(
            f"{model} is a {kind}, and only a {ClassConditionalPipeline.__name__} (MaskGITPipeline and other "
            "subclasses too) is sampled here; sample it by its own script."
        )
    for entry in config.values():
        if isinstance(entry, list) and entry[0] == _registration.LIBRARY:
            _registration.require_class(entry[1], model)
    pipeline = load_pretrained(found.from_pretrained, model, "a pipeline", **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_guide(model: str, pipeline: ClassConditionalPipeline, **options: Any) -> Any:
    """The transformer of the saved pipeline `model`, a weaker one, as `guide` of `pipeline` (autoguidance).

    Only it is loaded. One of another objective, other latents, classes or another path is refused; `options` go to
    `from_pretrained`.

    Example:
        >>> pipeline.guide = load_guide("runs/sit-early", pipeline).to("cuda")
    """
    weaker = load_pipeline(model, vae=None, alignment_network=None, **options)
    check_guide(weaker.transformer, pipeline.transformer)
    check_guides_path(weaker.scheduler.config, pipeline.scheduler.config)
    return weaker.transformer


def sample_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per image, for its initial noise and then its SDE noise; see `randomness.torch_generator`.

    Example:
        >>> pipeline([1, 2], generator=sample_generators(seed=0, indices=[0, 1]))
    """
    return [torch_generator(seed, index, _NOISE) for index in indices]


def sample_labels(class_ids: Sequence[int], indices: Sequence[int], *, seed: int, policy: str = "random") -> list[int]:
    """Class ids, out of `class_ids`, of the images `indices` of a set.

    "random" draws uniformly and independently per image; "balanced" takes class_ids in turn, so that the counts of a
    set differ by at most one.

    Example:
        >>> sample_labels([3, 5, 9], range(5), seed=0, policy="balanced")
        [3, 5, 9, 3, 5]
    """
    if policy not in LABEL_POLICIES:
        raise ValueError(f"label policy must be one of {LABEL_POLICIES}; got {policy!r}.")
    if not class_ids:
        raise ValueError("Sampling needs at least one class id; got none.")
    if policy == "balanced":
        return [class_ids[index % len(class_ids)] for index in indices]
    return [class_ids[int(numpy_generator(seed, index, _LABEL).integers(len(class_ids)))] for index in indices]


def sampled_classes(
    pipeline: Any, count: int, class_ids: Sequence[int], *, seed: int, policy: str = "random"
) -> ClassTable:
    """Names of a pipeline's classes and how many of the images 0 .. count-1 of a set are of each.

    Example:
        >>> sampled_classes(pipeline, 50000, pipeline.class_ids, seed=0).counts
    """
    labels, named = sample_labels(class_ids, range(count), seed=seed, policy=policy), pipeline.id2label
    names = [named[each][0] if each in named else str(each) for each in range(pipeline.transformer.config.num_classes)]
    return ClassTable.of_labels(np.array(labels), names)


def sample_block(
    pipeline: Any, block: range, class_ids: Sequence[int], *, seed: int, label_policy: str = "random", **options: Any
) -> dict[str, Any]:
    """One call of the pipeline for the images `block` of a set.

    Returns `arr_0` uint8 (B, H, W, 3), `arr_1` int64 class ids (B,), `nfe` and `seconds`, as `write_part` keeps them.
    Latents that are not finite raise ValueError: uint8 would hide them. `options` go to the pipeline.

    Example:
        >>> sample_block(pipeline, range(8, 16), range(1000), seed=0, guidance_scale=1.8)["arr_0"].shape
        (8, 256, 256, 3)
    """
    labels = sample_labels(class_ids, block, seed=seed, policy=label_policy)
    generators = sample_generators(seed, block)
    output = pipeline(labels, generator=generators, callback_on_step_end=require_finite, **options)
    samples = np.stack([np.asarray(image) for image in output.images])
    return {"arr_0": samples, "arr_1": np.array(labels), "nfe": output.nfe, "seconds": output.seconds}


def require_finite(pipeline: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A pipeline's `callback_on_step_end` that raises ValueError on latents which are not finite.

    At the last step only, since looking makes the host wait for the device.
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
    """This rank's share of the blocks whose part file is not there yet, or cut: every world_size-th of them.

    All ranks must list before any writes, or they cut different lists.
    """
    return [block for block in blocks if not zipfile.is_zipfile(part_path(output_dir, block))][rank::world_size]


def find_set(output_dir: str | Path, settings: Mapping[str, Any]) -> str | None:
    """How far the set of these settings is in a directory: None, "begun" or "finished"; writes nothing.

    A finished set is known by the digest of its samples; where they are gone, it counts as not begun.

    Raises:
        ValueError: (part of) a set of other settings, naming what differs, or of another format; samples that are not
            those which were written.

    Example:
        >>> find_set("runs/samples", {"seed": 0, "num_samples": 50000})
    """
    samples, stages = Path(output_dir) / SAMPLES_FILE, {"finished": SETTINGS_FILE, "begun": f"{PARTS_DIR}/{BEGUN}"}
    for stage, name in stages.items():
        path = Path(output_dir) / name
        if not path.exists() or (stage == "finished" and not samples.exists()):
            continue
        content = read_json(path, needs={"settings": dict})
        remedy = "choose another output directory"
        require_format_version(content.get("format_version"), FORMAT_VERSION, path=path, remedy=remedy)
        present, wanted = _one_level(content["settings"]), _one_level(json.loads(strict_json(settings)))
        changed = [key for key in {**present, **wanted} if present.get(key) != wanted.get(key)]
        if changed:
            differences = ", ".join(f"{key} ({present.get(key)} -> {wanted.get(key)})" for key in changed)
            raise ValueError(
                f"{output_dir} holds samples made with other settings: {differences}. "
                "Repeat the settings to resume, or choose another output directory."
            )
        if stage == "finished" and hash_file(samples) != content.get("samples_hash"):
            raise ValueError(
                f"{samples} is not what {path} says was written (it is damaged, or another file); remove it to sample "
                "again, or choose another output directory."
            )
        return stage
    return None


def _one_level(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with those of "options" by their own names."""
    options = settings.get("options")
    return {**settings, **({"options": None, **options} if isinstance(options, Mapping) else {})}


def begin_set(output: OutputDirectory, settings: Mapping[str, Any]) -> bool:
    """Notes in a directory that has been claimed which set it is to hold; True where that is finished already.

    What is left of a set that was neither is deleted: no image of it gets beside the new ones.

    Example:
        >>> output = OutputDirectory("runs/samples", kind="set of samples")
        >>> output.claim(*NAMES)
        >>> finished = begin_set(output, {"seed": 0, "num_samples": 50000})
    """
    stage = find_set(output.path, settings)
    if stage == "finished":
        output.delete(PARTS_DIR)  # left by a run killed after it had finished
    elif stage is None:
        output.delete(*NAMES)
        write_json(output.path / PARTS_DIR / BEGUN, {"format_version": FORMAT_VERSION, "settings": settings})
    return stage == "finished"


def require_accepted(pipeline: Any, class_ids: Sequence[int], **options: Any) -> None:
    """Raises what a pipeline has against its options, which it says when it is called; takes one step of one image."""

    class Accepted(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Accepted

    with suppress(Accepted):
        pipeline(list(class_ids[:1]), generator=sample_generators(0, [0]), callback_on_step_end=stop, **options)


def merge_parts(output_dir: str | Path, blocks: Sequence[range]) -> dict[str, float]:
    """Joins the part files into samples.npz: arr_0 uint8 (N, H, W, 3), arr_1 int64 (N,), in image order.

    Reads one part at a time, so memory does not grow with N.

    Returns:
        `seconds` summed over all parts and `nfe` of one image.
    """
    missing = pending_blocks(output_dir, blocks)
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(blocks)} parts are missing in {output_dir}; run it again.")
    labels, seconds, nfe = [], 0.0, 0.0
    with atomic_path(Path(output_dir) / SAMPLES_FILE) as sibling, zipfile.ZipFile(sibling, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            for block in blocks:
                part = read_npz(part_path(output_dir, block), "arr_0", "arr_1", "seconds", "nfe")
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

    Example:
        >>> open_samples("runs/samples/samples.npz").shape
        (50000, 256, 256, 3)
    """
    return map_npz_array(path, "arr_0")


def write_pngs(samples: np.ndarray, directory: str | Path) -> None:
    """One PNG per sample, numbered from 000000.png; images that are there already are left alone."""
    directory = Path(directory)
    for index, sample in enumerate(samples):
        path = directory / f"{index:06d}.png"
        if not path.exists():
            with atomic_path(path, durable=False) as sibling:
                Image.fromarray(np.asarray(sample)).save(sibling, format="png")


def finish(
    output_dir: str | Path, blocks: Sequence[range], *, settings: Mapping[str, Any], metadata: Mapping[str, Any]
) -> None:
    """Writes samples.npz, then sampling.json, which marks the set as finished, then removes the parts.

    sampling.json holds format_version, settings, uint8_rule, nfe, seconds, samples_hash and `metadata`. Killed in
    between, the next call begins again with what is there.
    """
    record = {"format_version": FORMAT_VERSION, "settings": settings, "uint8_rule": UINT8_RULE}
    record |= merge_parts(output_dir, blocks)
    record["samples_hash"] = hash_file(Path(output_dir) / SAMPLES_FILE)
    write_json(Path(output_dir) / SETTINGS_FILE, {**record, **metadata})
    delete(Path(output_dir) / PARTS_DIR)


def scheduler_settings(scheduler: Any) -> dict[str, Any]:
    """Class and options of a scheduler, as a result card states them.

    Example:
        >>> scheduler_settings(FlowMatchODEScheduler(solver="heun"))["solver"]
        'heun'
    """
    options = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return {"class": type(scheduler).__name__, **options}


def identities(pipeline: Any) -> dict[str, Any]:
    """Which weights the models of a pipeline have, under the names of a result card."""
    made_by = {"autoencoder": autoencoder_identity(pipeline.vae), "transformer": weights_hash(pipeline.transformer)}
    if pipeline.preview_decoder is not None:  # decodes in place of the autoencoder
        made_by["preview_decoder"] = autoencoder_identity(pipeline.preview_decoder)
    if pipeline.guide is not None:
        made_by["guide"] = weights_hash(pipeline.guide)
    return made_by


def model_options(pipeline: Any) -> dict[str, Any]:
    """What the configs of a pipeline's models say, class names apart, as JSON values: "part.Class.option" -> value."""
    parts = ("transformer", "vae", "preview_decoder", "guide")
    models = {name: model for name in parts if (model := getattr(pipeline, name)) is not None}
    said = {f"{name}.{key}": value for name, model in models.items() for key, value in public_config(model).items()}
    named = {key: value for key, value in said.items() if not key.endswith(".id2label")}
    return dict(json.loads(json.dumps(named, sort_keys=True, default=str)))
