r"""Measures what latents know about classes and depths: a few annotated images are carried over to the others.

    python training/evaluate_perception.py --vae runs/eq-vae --images IMAGES --masks MASKS --depths DEPTHS \
        --num_annotated 5 --output perception.json

Nothing is trained: each latent position takes the label, or the depth, of the most similar annotated positions. Beside
it stand two answers that never look at the image: the mean of all annotated positions (for classes: the most frequent
one), and the mean at each. With --alignment_network the features are those that it predicts, and --segmentation_head
and --depth_head apply published linear heads to them. Writes a result card (JSON) for `eqvae compare`, and an overview
(PNG).
"""

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from tqdm.auto import tqdm

import diffusers_eqvae
from diffusers_eqvae.autoencoders import load_autoencoder
from diffusers_eqvae.files import hash_file, require_writable
from diffusers_eqvae.images import grid
from diffusers_eqvae.metrics.result_card import ResultCard, hardware
from diffusers_eqvae.models.alignment_network import AlignmentNetwork
from diffusers_eqvae.perception import LinearDepthHead, LinearSegmentationHead
from diffusers_eqvae.perception.annotated_images import paired_files
from diffusers_eqvae.perception.evaluation import AnnotatedReader, split_results
from diffusers_eqvae.perception.heads import LinearHead
from diffusers_eqvae.perception.tasks import DepthTask, Method, SegmentationTask, Task, transfer_methods
from diffusers_eqvae.provenance import hash_tensors, model_revision, vae_fingerprint
from diffusers_eqvae.training_utils.arguments import warn_without_effect
from diffusers_eqvae.training_utils.command_line import parse
from diffusers_eqvae.training_utils.launch import run_script

Rows = list[tuple[Path, ...]]


@dataclass
class PerceptionArguments:
    """What to measure on which images, and where the results go."""

    vae: str = field(metadata={"help": "Autoencoder or pipeline: a directory or Hub name in diffusers layout."})
    images: str = field(metadata={"help": "Folder of images, taken as ADM centre crops."})
    output: str = field(metadata={"help": "The card, a JSON file; the overview gets the same name with .png."})
    masks: str | None = field(default=None, metadata={"help": "Folder of classes: 8-bit masks named as the images."})
    depths: str | None = field(default=None, metadata={"help": "Folder of depths: 16 bits in mm, where 0 is invalid."})
    num_annotated: int = field(default=5, metadata={"help": "Images whose annotations may be used; 0 with heads."})
    num_tested: int | None = field(default=None, metadata={"help": "Of the last images; unset: all not annotated."})
    order: Literal["random", "name"] = field(
        default="random",
        metadata={"help": "Which come first, the annotated ones: by --seed or by name (for frames of a film)."},
    )
    seed: int = field(default=0, metadata={"help": "Of the random order."})
    resolution: int = field(default=256, metadata={"help": "Side in pixels of the centre crops."})
    alignment_network: str | None = field(
        default=None, metadata={"help": "Its directory or Hub name, or that of its autoencoder or pipeline."}
    )
    segmentation_head: str | None = field(default=None, metadata={"help": "File of DINOv2's linear head of classes."})
    depth_head: str | None = field(default=None, metadata={"help": "File of DINOv2's linear head of depth."})
    head_teacher_type: str = field(
        default="dinov2", metadata={"help": "Backbone that the heads were fitted to, a transformers type."}
    )
    max_depth: float = field(default=10.0, metadata={"help": "Metres of the depth head's last bin; KITTI: 80."})
    neighbours: int = field(default=5, metadata={"help": "Annotated positions that a position is compared with."})
    window: int | None = field(
        default=None, metadata={"help": "Side in latent positions of a feature; unset: 1 with a network, 5 without."}
    )
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
        if self.masks is None and self.depths is None:
            raise ValueError("Nothing is annotated: give --masks, --depths or both.")
        for head, targets in (("segmentation_head", "masks"), ("depth_head", "depths")):
            if getattr(self, head) is not None and getattr(self, targets) is None:
                raise ValueError(f"--{head} is measured on --{targets}; give both or neither.")
        heads = self.segmentation_head is not None or self.depth_head is not None
        if heads and (self.alignment_network is None or (self.window or 1) != 1):
            raise ValueError("Heads read single features of a teacher: give --alignment_network and no --window.")
        covered = (self.masks is None) == (self.segmentation_head is None)
        covered = covered and (self.depths is None) == (self.depth_head is None)
        if self.num_annotated < 0 or (self.num_annotated == 0 and not covered):
            raise ValueError(f"--num_annotated must be positive without a head; got {self.num_annotated}.")
        for given, names, reason in (
            (self.masks, ("ignore_index", "num_classes"), "there are no --masks"),
            (self.depths, ("median_scaling", "max_depth"), "there are no --depths"),
            (self.depth_head or not self.depths, ("max_depth",), "there is no --depth_head"),
            (heads, ("head_teacher_type",), "there is no head"),
            (self.order == "random", ("seed",), "--order is name"),
        ):
            if not given:
                warn_without_effect(self, names, reason)


def main(argv: list[str] | None = None) -> ResultCard:
    (arguments,) = parse(PerceptionArguments, argv=argv, description=__doc__)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    require_writable(arguments.output)
    rows = paired_files(arguments.images, *filter(None, (arguments.masks, arguments.depths)))
    annotated, tested = choose_images(arguments, rows)
    tasks = build_tasks(arguments, rows, tested)
    reader, heads, settings = load_models(arguments, tasks)

    methods: list[dict[str, Method]] = [
        {"head": heads[task.name].read} if task.name in heads else {} for task in tasks
    ]
    if annotated:
        features, targets = reader.positions(annotated)
        for own, target in zip(methods, targets, strict=True):
            own |= transfer_methods(features, target, neighbours=arguments.neighbours)
        settings |= {"window": reader.window, "neighbours": arguments.neighbours}
    overview = measure(arguments, reader, methods, tested)

    metrics, marks = {}, {}
    for task in tasks:
        numbers, reasons = split_results(task.results())
        metrics, marks = metrics | numbers, marks | reasons
    protocol = {**reader.protocol, "num_annotated": len(annotated), "num_tested": len(tested)}
    provenance = {"data": Path(arguments.images).name}
    provenance["targets"] = ", ".join(Path(folder).name for folder in (arguments.masks, arguments.depths) if folder)
    versions = {"diffusers_eqvae": diffusers_eqvae.__version__, "diffusers": diffusers.__version__}
    used = {"annotated": [image.name for image, *_ in annotated], "tested": [image.name for image, *_ in tested]}
    details = {"results": {task.name: task.results() for task in tasks}, "arguments": asdict(arguments), **used}
    provenance |= hardware(arguments.device, **versions)
    card = ResultCard(metrics, protocol, settings, marks, provenance, "perception", details)
    card.save(arguments.output)
    captions = [caption for own in methods for caption in ("truth", *own)]
    grid(overview, ("image", *captions)).save(Path(arguments.output).with_suffix(".png"))
    print(card.summary(), f"card: {arguments.output}, the overview beside it", sep="\n")
    return card


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
    settings: dict[str, Any] = {"model": arguments.vae, "model_class": type(vae).__name__, "dtype": "float32"}
    settings |= {"weights": vae_fingerprint(vae), "vae_revision": model_revision(vae)}
    network = None
    if arguments.alignment_network is not None:
        network = AlignmentNetwork.find(arguments.alignment_network)
        if network is None:
            raise ValueError(
                f"--alignment_network {arguments.alignment_network} holds no alignment network, nor is one beside it; "
                "name another, or train one with train_autoencoder.py --regularizers alignment."
            )
        network.to(arguments.device)
        settings["alignment_network"] = {"name": arguments.alignment_network, "weights_hash": hash_tensors(network)}
    heads: dict[str, LinearHead] = {}
    for task in tasks:
        path = getattr(arguments, f"{task.name}_head")
        if path is None:
            continue
        options = {"teacher_type": arguments.head_teacher_type}
        if isinstance(task, SegmentationTask):
            heads[task.name] = head = LinearSegmentationHead.from_file(path, **options)
            task.check_head(head)
            described: dict[str, Any] = {}
        else:
            heads[task.name] = LinearDepthHead.from_file(path, max_depth=arguments.max_depth, **options)
            described = {"max_depth": arguments.max_depth}
        heads[task.name].to(arguments.device).check_network(network)
        settings.setdefault("head", {})[task.name] = {"name": path, "file_hash": hash_file(path), **described}
    window = arguments.window or (5 if network is None else 1)
    sizes = {"window": window, "resolution": arguments.resolution, "batch_size": arguments.batch_size}
    return AnnotatedReader(vae.to(arguments.device), tasks, network=network, **sizes), heads, settings


def measure(
    arguments: PerceptionArguments, reader: AnnotatedReader, methods: list[dict[str, Method]], tested: Rows
) -> list[list[torch.Tensor]]:
    """Scores every method on the tested images; rows of the overview."""
    overview: list[list[torch.Tensor]] = []
    shown = np.linspace(0, len(tested) - 1, min(arguments.num_shown, len(tested))).round().astype(int).tolist()
    for number, (pixels, features, truths) in enumerate(tqdm(reader.batches(tested), unit="batch")):
        first = number * arguments.batch_size
        drawn = {place - first: [pixels[place - first]] for place in shown if 0 <= place - first < len(pixels)}
        for task, own, truth in zip(reader.tasks, methods, truths, strict=True):
            size = (truth.shape[-2], truth.shape[-1])
            answers = {name: task.answer(method(features), size) for name, method in own.items()}
            for name, answer in answers.items():
                task.score(name, answer, truth)
            for index, row in drawn.items():
                row += task.draw([answer[index] for answer in answers.values()], truth[index])
        overview += drawn.values()
    return overview


if __name__ == "__main__":
    run_script(main)
