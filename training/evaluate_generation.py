r"""Measures generated images against a reference in one pass: FID, sFID, Inception score, KID, precision, recall.

    eqvae evaluate-generation --samples runs/samples/samples.npz --reference VIRTUAL_imagenet256.npz \
        --feature_networks inception
    eqvae evaluate-generation --samples runs/sit --num_samples 1000 --reference IMAGES \
        --resolution 256 --feature_networks dinov2=facebook/dinov2-large

Samples are an .npz (arr_0 uint8 NHWC), a folder of images, or a saved pipeline, which is sampled in memory; --metrics
computes others. Writes a result card (JSON) for each feature network, which `eqvae compare` reads. The number of
processes changes no bit, the batch size last digits.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState

from diffusers_eqvae.autoencoders import is_pipeline
from diffusers_eqvae.data.image_datasets import load_image_dataset
from diffusers_eqvae.directories import require_replaceable
from diffusers_eqvae.extensions import loaded_extensions
from diffusers_eqvae.metrics.base import METRICS, Measurement, build_metrics, measure
from diffusers_eqvae.metrics.feature_networks import FeatureNetwork, load_feature_network
from diffusers_eqvae.metrics.generation import (
    GENERATION_METRICS,
    OFFERS,
    ImageDigests,
    Reference,
    load_reference,
    require_same_classes,
    sample_batches,
)
from diffusers_eqvae.metrics.image_sets import ImageSet, open_images
from diffusers_eqvae.metrics.result_card import ResultCard, is_card_of, run_settings, sampling_settings
from diffusers_eqvae.options import Checked, inputs_of
from diffusers_eqvae.pipelines.generated import GeneratedImages
from diffusers_eqvae.pipelines.sampling import load_pipeline
from diffusers_eqvae.provenance import hardware
from diffusers_eqvae.training_utils.arguments import warn_without_effect
from diffusers_eqvae.training_utils.command_line import Choice, parse
from diffusers_eqvae.training_utils.console import start_logging
from diffusers_eqvae.training_utils.launch import build_state, run_script


@dataclass
class EvaluationArguments(Checked):
    """What to compare with what, and by which network."""

    samples: str = field(
        metadata={
            "reads": "pipeline",
            "help": "An .npz with arr_0, a folder of images, or a pipeline (directory or Hub name).",
        }
    )
    reference: str | None = field(
        default=None,
        metadata={
            "reads": True,
            "help": "An ADM reference .npz, saved statistics, a folder of images, or a dataset's name.",
        },
    )
    reference_split: str | None = field(
        default=None, metadata={"help": "Read --reference as a dataset, and this split of it (needs --resolution)."}
    )
    metrics: list[str] = field(
        default_factory=lambda: list(GENERATION_METRICS), metadata={"help": "NAME ... of what is computed."}
    )
    feature_networks: list[str] = field(
        default_factory=lambda: ["inception"],
        metadata={
            "reads": True,
            "help": "NAME[=WEIGHTS] ..., with a card for each: inception gives FID; dinov2, squeezenet and "
            "cifar_resnet name themselves in every number. Loaded only for metrics that need them.",
        },
    )
    output: str | None = field(default=None, metadata={"help": "The card; default: beside the samples."})
    save_reference: str | None = field(
        default=None, metadata={"help": "Keep the reference's statistics in this .npz, which --reference takes."}
    )
    num_samples: int | None = field(
        default=None, metadata={"help": "Measure exactly the first n samples.", "range": "(0, inf)"}
    )
    batch_size: int = field(
        default=64, metadata={"help": "Images per forward; changes last digits.", "range": "(0, inf)"}
    )
    resolution: int | None = field(
        default=None,
        metadata={
            "help": "Crop images of folders and datasets to this side in pixels (ADM crop).",
            "range": "(0, inf)",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reference and self.reference_split is None and not Path(self.reference).exists():
            raise ValueError(
                f"--reference {self.reference} is neither a file nor a folder; a dataset needs --reference_split."
            )
        if len(self.feature_networks) > 1 and (self.output or self.save_reference):
            raise ValueError(
                "Several --feature_networks have a card and a reference each, beside the samples; leave --output and "
                "--save_reference out, or name one network."
            )
        needs = {need for name in self.metrics for need in METRICS[name].needs}
        if "reference" in needs and self.reference is None:
            raise ValueError("--reference is missing: what are the samples to be compared with?")
        if "features" not in needs:
            self.feature_networks = []


@dataclass
class PipelineArguments(Checked):
    """How a pipeline is sampled; without effect on samples that exist already."""

    seed: int = field(default=0, metadata={"help": "Image n is a function of (seed, n).", "range": "[0, 2**64)"})
    label_policy: Literal["random", "balanced"] = field(default="random", metadata={"help": "How classes are drawn."})
    guidance_scale: float = field(
        default=1.0, metadata={"help": "Classifier-free guidance; 1 is none.", "range": "[0, inf)"}
    )
    guidance_interval: list[float] = field(
        default_factory=lambda: [0.0, 1.0],
        metadata={"help": "LO HI in sigma (1 = noise) where guidance acts.", "range": "[0, 1]"},
    )
    guided_channels: int | None = field(
        default=None,
        metadata={"help": "Guide the first n latent channels only; all when absent.", "range": "(0, inf)"},
    )
    num_inference_steps: int = field(default=50, metadata={"help": "Steps of the sampler.", "range": "(0, inf)"})


def generated(arguments: EvaluationArguments, options: PipelineArguments, state: PartialState) -> GeneratedImages:
    if arguments.num_samples is None:
        raise ValueError("A pipeline needs --num_samples; how many images are to be measured?")
    pipeline = load_pipeline(arguments.samples).to(state.device)
    ranks = {"rank": state.process_index, "world_size": state.num_processes}
    return GeneratedImages(pipeline, arguments.num_samples, batch_size=arguments.batch_size, **ranks, **vars(options))


def card_path(arguments: EvaluationArguments, network: str | None) -> Path:
    """--output, or beside the samples; of a pipeline on the Hub in the working directory."""
    path = Path(arguments.samples)
    base, beside = path.stem if path.is_file() else path.name, path.parent if path.exists() else Path()
    name = network.partition("=")[0] if network else "metrics"
    return Path(arguments.output or beside / f"{base}.{name}.json")


def chosen_metrics(given: Mapping[str, Any]) -> list[Choice]:
    return [Choice(METRICS, tuple(given["metrics"]), "metrics", lambda metric: metric.needs <= OFFERS)]


def references(
    arguments: EvaluationArguments, networks: list[FeatureNetwork], state: PartialState
) -> list[Reference | None]:
    """One for each network, as far as there is something to compare with."""
    if arguments.reference is None:
        return [None] * len(networks)
    source: str | ImageSet = arguments.reference
    if arguments.reference_split is not None:
        images = load_image_dataset(source, split=arguments.reference_split)
        source = ImageSet(images, name=f"{source} ({arguments.reference_split})", resolution=arguments.resolution)
    how = {"batch_size": arguments.batch_size, "resolution": arguments.resolution, "processes": state}
    return [load_reference(source, network, **how) for network in networks]


def main(argv: list[str] | None = None) -> ResultCard | list[ResultCard] | None:
    """The card, or those of several networks; None on processes other than the first."""
    arguments, sampling, options = parse(
        EvaluationArguments, PipelineArguments, argv=argv, description=__doc__, choices=chosen_metrics, script=__file__
    )
    start_logging(format="%(levelname)s: %(message)s")
    state, path = build_state(), Path(arguments.samples)
    outputs = [card_path(arguments, name) for name in arguments.feature_networks or [None]]
    subject = {"task": "generation", "samples": arguments.samples, "num_samples": arguments.num_samples}
    ours = partial(is_card_of, **subject, compared_with=arguments.reference)
    kept = filter(None, [arguments.save_reference])
    require_replaceable(*outputs, companions=kept, inputs=inputs_of(arguments), ours=ours)
    networks = [load_feature_network(name).to(state.device) for name in arguments.feature_networks]

    settings, rules, classes = sampling_settings(path)
    made, resize_rule = None, "none"
    if is_pipeline(arguments.samples):
        made = generated(arguments, sampling, state)
        batches, classes = zip(made.blocks, made, strict=True), made.classes
    else:
        warn_without_effect(sampling, vars(sampling), "the samples exist already")
        resolution = arguments.resolution if path.is_dir() else None
        images = open_images(path, limit=arguments.num_samples, resolution=resolution)
        batches, resize_rule = images.batches(arguments.batch_size, state), images.resize_rule
        classes = classes or images.classes
    targets = references(arguments, networks, state)
    require_same_classes(targets, classes)
    groups = [
        build_metrics(arguments.metrics, options, offers=OFFERS, network=network, reference=target)
        for network, target in zip(networks or [None], targets or [None], strict=True)
    ]
    digests = ImageDigests()
    checked = sample_batches(batches, networks, references=targets, resolution="--resolution")
    measure([*(metric for group in groups for metric in group), digests], checked, state)
    if not state.is_main_process:
        return None
    if made is not None:
        settings, rules = {**made.settings, "model": str(path), **run_settings(path)}, made.protocol
    cards = []
    for group, target, output in zip(groups, targets or [None], outputs, strict=True):
        measured = Measurement(group)
        protocol = {"num_samples": len(digests), "image_size": digests.image_size, "resize_rule": resize_rule}
        protocol |= {**rules, **measured.protocol}
        asked = {"samples": arguments.samples, "compared_with": arguments.reference}
        provenance = asked | {
            "data_hash": digests.hash,
            "classes": classes.images,
            "extensions": loaded_extensions(),
            **hardware(state.device),
        }
        if target is not None:
            provenance |= {"reference": target.name, "reference_classes": target.classes.images}
        card = ResultCard(protocol=protocol, settings=settings, provenance=provenance, **measured.card_parts())
        print(card.summary(), flush=True)  # first: a disk that is full now takes no card
        card.save(output)
        if arguments.save_reference and target is not None:
            target.save(arguments.save_reference)
        print(f"card: {output}")
        cards.append(card)
    return cards if len(cards) > 1 else cards[0]


if __name__ == "__main__":
    run_script(main)
