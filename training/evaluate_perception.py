r"""Measures what latents know about classes or depths: a few annotated images are carried over to the others.

    python training/evaluate_perception.py --vae runs/eq-vae --images IMAGES --targets MASKS \
        --num_annotated 5 --output perception.json

Nothing is trained: each cell of a latent takes the label, or the depth, of the most similar annotated cells. Beside it
stand two answers that never look at the image: the mean of all annotated cells (for classes: the most frequent one),
and the mean at each place. With --alignment_network the features are those that it predicts, and --head applies a
published linear head to them instead. Writes a result card (JSON) for `eqvae compare`, and an overview (PNG).
"""

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from diffusers_eqvae.autoencoders import load_autoencoder
from diffusers_eqvae.files import require_writable
from diffusers_eqvae.images import evenly_spaced, grid
from diffusers_eqvae.metrics.result_card import ResultCard
from diffusers_eqvae.perception.annotated_images import AnnotatedReader, split_figures
from diffusers_eqvae.perception.features import load_alignment_network
from diffusers_eqvae.perception.tasks import DepthTask, Method, SegmentationTask, paired_files, transfer_methods
from diffusers_eqvae.provenance import autoencoder_identity, hardware, hash_file, weights_hash
from diffusers_eqvae.training_utils.arguments import warn_without_effect
from diffusers_eqvae.training_utils.command_line import parse
from diffusers_eqvae.training_utils.launch import run_script


@dataclass
class PerceptionArguments:
    """What to measure on which images, and where the figures go."""

    vae: str = field(metadata={"help": "Autoencoder or pipeline: a directory or Hub name in diffusers layout."})
    images: str = field(metadata={"help": "Folder of images, taken as ADM centre crops."})
    targets: str = field(metadata={"help": "Folder of annotations: 8-bit masks, or 16-bit depths in mm (0: invalid)."})
    output: str = field(metadata={"help": "The card, a JSON file; the overview gets the same name with .png."})
    task: Literal["segmentation", "depth"] = field(default="segmentation", metadata={"help": "What targets hold."})
    num_annotated: int = field(default=5, metadata={"help": "Images whose annotations may be used; 0 with --head."})
    num_tested: int | None = field(default=None, metadata={"help": "Of the last images; unset: all not annotated."})
    order: Literal["random", "name"] = field(
        default="random",
        metadata={"help": "Which come first, the annotated ones: by --seed or by name (for frames of a film)."},
    )
    seed: int = field(default=0, metadata={"help": "Of the random order."})
    resolution: int = field(default=256, metadata={"help": "Side in pixels of the centre crops."})
    alignment_network: str | None = field(default=None, metadata={"help": "Its directory, or its autoencoder's."})
    head: str | None = field(default=None, metadata={"help": "File of DINOv2's linear head for this task."})
    max_depth: float = field(default=10.0, metadata={"help": "Metres of the depth head's last bin; KITTI: 80."})
    neighbours: int = field(default=5, metadata={"help": "Annotated cells that a cell is compared with."})
    window: int | None = field(default=None, metadata={"help": "Side in cells of a feature; unset: 5 for latents."})
    ignore_index: int = field(default=255, metadata={"help": "Label of pixels without a class."})
    num_classes: int | None = field(default=None, metadata={"help": "Unset: the highest label and 1."})
    median_scaling: bool = field(default=False, metadata={"help": "Compare depths up to a factor per image."})
    batch_size: int = field(default=8, metadata={"help": "Images per forward."})
    num_shown: int = field(default=4, metadata={"help": "Rows of the overview, evenly spaced."})
    device: str = field(default="cpu", metadata={"help": "Where to compute: cpu, cuda, cuda:1 ..."})

    def __post_init__(self) -> None:
        positive = ["num_tested", "resolution", "max_depth", "neighbours", "window", "num_classes", "batch_size"]
        for name in (*positive, "num_shown"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"--{name} must be positive; got {getattr(self, name)}.")
        if Path(self.output).suffix == ".png":
            raise ValueError(f"--output names the JSON file, and the overview gets .png; got {self.output}.")
        if self.head is not None and (self.alignment_network is None or (self.window or 1) != 1):
            raise ValueError("--head reads single features of a teacher: give --alignment_network and no --window.")
        if (self.head is None and self.num_annotated < 1) or self.num_annotated < 0:
            raise ValueError(f"--num_annotated must be positive without --head; got {self.num_annotated}.")
        others = ("median_scaling", "max_depth") if self.task == "segmentation" else ("ignore_index", "num_classes")
        warn_without_effect(self, others, f"--task is {self.task}")
        if self.task == "depth" and self.head is None:
            warn_without_effect(self, ("max_depth",), "there is no --head")
        if self.order == "name":
            warn_without_effect(self, ("seed",), "--order is name")


def main(argv: list[str] | None = None) -> ResultCard:
    (arguments,) = parse(PerceptionArguments, argv=argv, description=__doc__)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    require_writable(arguments.output)
    pairs = paired_files(arguments.images, arguments.targets)
    if arguments.order == "random":
        pairs = [pairs[index] for index in np.random.default_rng(arguments.seed).permutation(len(pairs))]
    annotated, others = pairs[: arguments.num_annotated], pairs[arguments.num_annotated :]
    num_tested = len(others) if arguments.num_tested is None else arguments.num_tested
    if not 0 < num_tested <= len(others):
        raise ValueError(f"--num_annotated leaves {len(others)} images to test on; --num_tested is {num_tested}.")
    tested = others[-num_tested:]

    task: SegmentationTask | DepthTask
    if arguments.task == "depth":
        task = DepthTask(median_scaling=arguments.median_scaling, max_depth=arguments.max_depth)
        task.check([target for _, target in tested], arguments.resolution)
    else:
        masks = [target for _, target in pairs]
        task = SegmentationTask.of_files(masks, arguments.num_classes, ignore_index=arguments.ignore_index)
    vae, network = load_autoencoder(arguments.vae).requires_grad_(False), None
    facts: dict[str, Any] = {"model": arguments.vae, "model_class": type(vae).__name__, "dtype": "float32"}
    facts |= {"autoencoder": autoencoder_identity(vae)}
    if arguments.alignment_network is not None:
        network = load_alignment_network(arguments.alignment_network).to(arguments.device)
        facts["alignment_network"] = {"name": arguments.alignment_network, "weights_hash": weights_hash(network)}
    window = arguments.window or (5 if network is None else 1)
    sizes = {"window": window, "resolution": arguments.resolution, "batch_size": arguments.batch_size}
    reader = AnnotatedReader(vae.to(arguments.device), task, network=network, **sizes)

    methods: dict[str, Method] = {}
    if arguments.head is not None:
        head, methods["head"] = task.head(arguments.head)
        head.to(arguments.device)
        facts["head"] = {"name": arguments.head, "file_hash": hash_file(arguments.head)}
        facts["head"] |= {"max_depth": task.max_depth} if isinstance(task, DepthTask) else {}
    if annotated:
        methods |= transfer_methods(*reader.cells(annotated), neighbours=arguments.neighbours)
        facts |= {"window": window, "neighbours": arguments.neighbours}

    rows: list[list[torch.Tensor]] = []
    shown = evenly_spaced(num_tested, arguments.num_shown)
    for number, (pixels, seen, truth) in enumerate(tqdm(reader.batches(tested), unit="batch")):
        answers = {name: task.answer(method(seen), truth.shape[-2:]) for name, method in methods.items()}
        for name, answer in answers.items():
            task.score(name, answer, truth)
        for index in (place - number * arguments.batch_size for place in shown):
            if 0 <= index < len(pixels):
                rows.append([pixels[index], *task.draw([answer[index] for answer in answers.values()], truth[index])])
    metrics, caveats = split_figures(task.figures())
    protocol = {**reader.protocol, "num_annotated": len(annotated), "num_tested": num_tested}
    provenance = {"data": Path(arguments.images).name, "targets": Path(arguments.targets).name}
    provenance |= hardware(arguments.device)
    used = {"annotated": [image.name for image, _ in annotated], "tested": [image.name for image, _ in tested]}
    details = {"figures": task.figures(), "arguments": asdict(arguments), **used}
    card = ResultCard(metrics, protocol, facts, caveats, provenance, "perception", details)
    card.save(arguments.output)
    grid(rows, ("image", "truth", *methods)).save(Path(arguments.output).with_suffix(".png"))
    print(card.summary(), f"card: {arguments.output}, the overview beside it", sep="\n")
    return card


if __name__ == "__main__":
    run_script(main)
