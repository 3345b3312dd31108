"""What perception is measured with and on, from its arguments: images, tasks, models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ...autoencoders import load_autoencoder
from ...images import require_channels
from ...models.alignment_network import AlignmentNetwork
from ...perception.evaluation import AnnotatedReader
from ...perception.heads import LinearDepthHead, LinearHead, LinearSegmentationHead
from ...perception.tasks import DepthTask, SegmentationTask, Task
from ...provenance import autoencoder_identity, weights_hash
from .arguments import PerceptionArguments

Rows = list[tuple[Path, ...]]


def choose_images(arguments: PerceptionArguments, rows: Rows) -> tuple[Rows, Rows]:
    """Annotated and tested images, each with its annotations."""
    if arguments.order == "random":
        rows = [rows[index] for index in np.random.default_rng(arguments.seed).permutation(len(rows))]
    annotated, others = rows[: arguments.num_annotated], rows[arguments.num_annotated :]
    num_tested = len(others) if arguments.num_tested is None else arguments.num_tested
    if not 0 < num_tested <= len(others):
        raise ValueError(f"--num_annotated leaves {len(others)} images to test on; --num_tested is {num_tested}.")
    return annotated, others[-num_tested:]


def build_tasks(arguments: PerceptionArguments, rows: Rows, tested: Rows) -> list[Task]:
    """One task for each kind of annotation, in the order of a row's files; its files are checked here."""
    tasks: list[Task] = []
    if arguments.masks is not None:
        options = {"ignore_index": arguments.ignore_index}
        if arguments.num_classes is None:
            tasks.append(SegmentationTask.of_files([row[1] for row in rows], **options))
        else:
            tasks.append(SegmentationTask(arguments.num_classes, **options))
    if arguments.depths is not None:
        task = DepthTask(median_scaling=arguments.median_scaling)
        task.check_files([row[-1] for row in tested], arguments.resolution)
        tasks.append(task)
    return tasks


def load_models(
    arguments: PerceptionArguments, tasks: list[Task]
) -> tuple[AnnotatedReader, dict[str, LinearHead], dict[str, Any]]:
    """The reader of images, the heads by task, and what a result card says of all of them."""
    vae = load_autoencoder(arguments.vae).requires_grad_(False)
    require_channels(vae, 3)
    settings: dict[str, Any] = {"model": arguments.vae, "model_class": type(vae).__name__, "dtype": "float32"}
    settings["autoencoder"] = autoencoder_identity(vae)
    network = None
    if arguments.alignment_network is not None:
        network = AlignmentNetwork.find(arguments.alignment_network)
        if network is None:
            raise ValueError(
                f"--alignment_network {arguments.alignment_network} holds no alignment network, nor is one beside it; "
                "name another, or train one with train_autoencoder.py --regularizers alignment."
            )
        network.to(arguments.device)
        settings["alignment_network"] = {"name": arguments.alignment_network, "weights_hash": weights_hash(network)}
    heads, described = load_heads(arguments, tasks, network)
    settings |= {"head": described} if heads else {}
    window = arguments.window or (5 if network is None else 1)
    sizes = {"window": window, "resolution": arguments.resolution, "batch_size": arguments.batch_size}
    return AnnotatedReader(vae.to(arguments.device), tasks, network=network, **sizes), heads, settings


def load_heads(
    arguments: PerceptionArguments, tasks: list[Task], network: AlignmentNetwork | None
) -> tuple[dict[str, LinearHead], dict[str, Any]]:
    """The linear heads that were asked for, and what a result card says of them, by task."""
    heads: dict[str, LinearHead] = {}
    described: dict[str, Any] = {}
    kind = arguments.head_teacher_type
    for task in tasks:
        path = getattr(arguments, f"{task.name}_head")
        if path is None:
            continue
        if isinstance(task, SegmentationTask):
            segmentation = LinearSegmentationHead.from_file(path, teacher_type=kind)
            task.check_head(segmentation)
            heads[task.name] = segmentation
        else:
            heads[task.name] = LinearDepthHead.from_file(path, max_depth=arguments.max_depth, teacher_type=kind)
        heads[task.name].to(arguments.device).check_network(network)
        described[task.name] = {"name": path, "weights_hash": weights_hash(heads[task.name])}
        described[task.name] |= {"max_depth": arguments.max_depth} if task.name == "depth" else {}
    return heads, described
