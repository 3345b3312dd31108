r"""Measures generated images against a reference in one pass: FID, sFID, Inception score, KID, precision, recall.

    python training/evaluate_generation.py --samples runs/samples/samples.npz --reference VIRTUAL_imagenet256.npz \
        --weights weights-inception-2015-12-05-6726825d.pth
    python training/evaluate_generation.py --samples runs/sit --num_samples 1000 --reference IMAGES \
        --resolution 256 --evaluator dinov2 --weights facebook/dinov2-large

Samples are an .npz (arr_0 uint8 NHWC), a folder of images, or a saved pipeline, which is sampled in memory. Writes a
result card (JSON) that `eqvae compare` reads. The number of processes changes no bit, the batch size last digits.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from accelerate import PartialState
from accelerate.utils import gather_object

from diffusers_eqvae.autoencoders import is_pipeline
from diffusers_eqvae.data.image_datasets import load_image_dataset
from diffusers_eqvae.files import require_writable
from diffusers_eqvae.metrics.feature_networks import EvaluatorName, load_extractor
from diffusers_eqvae.metrics.generation import evaluate_generation, load_reference, network_facts
from diffusers_eqvae.metrics.image_sets import Collected, Processes, collect
from diffusers_eqvae.metrics.inputs import ImageSet, open_images
from diffusers_eqvae.metrics.result_card import ResultCard, run_facts, sampling_facts
from diffusers_eqvae.pipelines.generated import GeneratedImages
from diffusers_eqvae.pipelines.sampling import load_pipeline
from diffusers_eqvae.provenance import hardware
from diffusers_eqvae.training_utils.arguments import warn_without_effect
from diffusers_eqvae.training_utils.command_line import parse
from diffusers_eqvae.training_utils.launch import build_state, run_script


@dataclass
class EvaluationArguments:
    """What to compare with what, and by which network."""

    samples: str = field(
        metadata={"help": "An .npz with arr_0, a folder of images, or a pipeline (directory or Hub name)."}
    )
    reference: str = field(
        metadata={"help": "An ADM reference .npz, saved statistics, a folder of images, or a dataset's name."}
    )
    reference_split: str | None = field(
        default=None, metadata={"help": "Read --reference as a dataset, and this split of it (needs --resolution)."}
    )
    evaluator: EvaluatorName = field(
        default="inception", metadata={"help": "inception gives FID; the others name themselves in every number."}
    )
    weights: str | None = field(
        default=None, metadata={"help": "File of the network's weights; for dinov2 a directory or Hub name."}
    )
    output: str | None = field(default=None, metadata={"help": "The card; default: beside the samples."})
    save_reference: str | None = field(
        default=None, metadata={"help": "Keep the reference's statistics in this .npz, which --reference takes."}
    )
    num_samples: int | None = field(default=None, metadata={"help": "Measure exactly the first n samples."})
    batch_size: int = field(default=64, metadata={"help": "Images per forward; changes last digits."})
    resolution: int | None = field(
        default=None, metadata={"help": "Crop images of folders and datasets to this side in pixels (ADM crop)."}
    )

    def __post_init__(self) -> None:
        if self.reference_split is None and not Path(self.reference).exists():
            raise ValueError(f"--reference {self.reference} is no file or folder; a dataset needs --reference_split.")


@dataclass
class PipelineArguments:
    """How a pipeline is sampled; without effect on samples that exist already."""

    seed: int = field(default=0, metadata={"help": "Image n is a function of (seed, n)."})
    label_policy: Literal["random", "balanced"] = field(default="random", metadata={"help": "How classes are drawn."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Classifier-free guidance; 1 is none."})
    guidance_interval: list[float] = field(
        default_factory=lambda: [0.0, 1.0], metadata={"help": "LO HI in sigma (1 = noise) where guidance acts."}
    )
    guided_channels: int | None = field(
        default=None, metadata={"help": "Guide the first n latent channels only; all when absent."}
    )
    num_inference_steps: int = field(default=50, metadata={"help": "Steps of the sampler."})


def generated(evaluation: EvaluationArguments, options: PipelineArguments, state: PartialState) -> GeneratedImages:
    if evaluation.num_samples is None:
        raise ValueError("A pipeline needs --num_samples; how many images are to be measured?")
    pipeline = load_pipeline(evaluation.samples).to(state.device)
    ranks = {"rank": state.process_index, "world_size": state.num_processes}
    return GeneratedImages(
        pipeline, evaluation.num_samples, batch_size=evaluation.batch_size, **ranks, **vars(options)
    )


def card_path(evaluation: EvaluationArguments) -> Path:
    """--output, or beside the samples; of a pipeline on the Hub in the working directory."""
    path = Path(evaluation.samples)
    base, beside = path.stem if path.is_file() else path.name, path.parent if path.exists() else Path()
    return Path(evaluation.output or beside / f"{base}.{evaluation.evaluator}.json")


def main(argv: list[str] | None = None) -> ResultCard | None:
    arguments, options = parse(EvaluationArguments, PipelineArguments, argv=argv, description=__doc__)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    state, path, resolution = build_state(), Path(arguments.samples), arguments.resolution
    output = card_path(arguments)
    for written in filter(None, (output, arguments.save_reference)):
        require_writable(written)
    extractor = load_extractor(arguments.evaluator, arguments.weights).to(state.device)
    processes = Processes(state.process_index, state.num_processes, gather_object)
    reference = arguments.reference
    if arguments.reference_split is not None:
        source = load_image_dataset(reference, split=arguments.reference_split)
        reference = ImageSet(source, name=f"{reference} ({arguments.reference_split})", resolution=resolution)

    if is_pipeline(arguments.samples):
        made = generated(arguments, options, state)
        samples = Collected.join(gather_object([collect(extractor, made)]))
        facts, rules, resize_rule = {**made.settings, "model": str(path), **run_facts(path)}, made.protocol, "none"
    else:
        warn_without_effect(options, vars(options), "the samples exist already")
        images = open_images(path, limit=arguments.num_samples, resolution=resolution if path.is_dir() else None)
        samples = processes.measure(extractor, images, batch_size=arguments.batch_size)
        (facts, rules), resize_rule = sampling_facts(path), images.resize_rule
    target = load_reference(
        reference, extractor, batch_size=arguments.batch_size, resolution=resolution, processes=processes
    )
    if not state.is_main_process:
        return None
    result = evaluate_generation(samples, target, extractor=extractor)
    protocol = {**network_facts(extractor), **rules, "reference_hash": target.hash, "resize_rule": resize_rule}
    protocol["num_samples"] = len(samples.digests)
    provenance = {"reference": target.name, "samples_hash": samples.hash}
    provenance |= hardware(state.device)
    card = ResultCard(result.metrics, protocol, facts, result.marks, provenance)
    card.save(output)
    if arguments.save_reference:
        target.save(arguments.save_reference)
    print(card.summary(), f"card: {output}", sep="\n")
    return card


if __name__ == "__main__":
    run_script(main)
