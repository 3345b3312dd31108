"""What `training/train_transformer.py` can be told about the model, its latents and how it is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ...guidance import validate_interval
from ...objectives.base import OBJECTIVES
from ...options import Checked
from ...regularizers.base import GeneratorRegularizer
from ..arguments import warn_without_effect
from ..command_line import Choice, regularizer_choice
from .model_source import ModelSource


@dataclass
class TransformerArguments(Checked):
    """The transformer and the latents that it learns to generate."""

    model: str = field(
        default="SiT-B/2",
        metadata={
            "reads": True,
            "help": "A model name (SiT-S/2, SiT-B/2, SiT-L/2, SiT-XL/2; patch 1, 2, 4 or 8), a JSON file with the "
            "_class_name and constructor arguments of one, or the directory of a saved one or of its pipeline, to "
            "continue from.",
        },
    )
    latents_dir: str | None = field(
        default=None,
        metadata={
            "reads": True,
            "help": "Latent store of training/encode_latents.py; without it, images are encoded on the fly.",
        },
    )
    vae: str | None = field(
        default=None,
        metadata={
            "reads": True,
            "help": "Autoencoder (or pipeline with one), a directory or Hub name; needed without --latents_dir, and "
            "otherwise the one saved in the store.",
        },
    )
    num_classes: int | None = field(
        default=None,
        metadata={
            "help": "Number of classes; unset, that of the data. Checked where given; 1 takes images without labels.",
            "range": "(0, inf)",
        },
    )
    new_classes: bool = field(
        default=False,
        metadata={
            "help": "Go on from a saved model with other classes: every weight is kept but the label table, in which "
            "classes of equal names keep their embedding."
        },
    )
    class_dropout_prob: float | None = field(
        default=None,
        metadata={
            "help": "Share of samples trained without their label, for guidance; unset, the model's own (0.1).",
            "range": "[0, 1)",
        },
    )
    trainable: Literal["full", "lora"] = field(
        default="full",
        metadata={"help": "full, or lora: adapters on the layers of a saved model, of which all else is frozen."},
    )
    gradient_checkpointing_every: int = field(
        default=1,
        metadata={
            "help": "With --gradient_checkpointing: recompute every n-th block only: less time, more memory.",
            "range": "[1, inf)",
        },
    )
    config_overrides: list[str] = field(
        default_factory=list,
        metadata={"help": "Constructor arguments of the model over its preset's: KEY=VALUE ..., e.g. qk_norm=true."},
    )
    objective: str | None = field(
        default=None, metadata={"help": "What is minimised; unset, what the model was made for."}
    )
    regularizers: list[str] = field(
        default_factory=lambda: ["none"], metadata={"help": "Regularizers of the generator, or none; they compose."}
    )


def transformer_choices(given: Mapping[str, Any]) -> list[Choice]:
    """Whose options the script takes besides its own: the objective's and the regularizers'."""
    source = ModelSource.find(given["model"], given["config_overrides"], objective=given["objective"])
    return [
        Choice(OBJECTIVES, (source.objective,), "objective", lambda member: member.reads != "pixels"),
        regularizer_choice(given["regularizers"], GeneratorRegularizer),
    ]


@dataclass
class SamplingArguments(Checked):
    """How validation images are sampled."""

    validation_labels: list[str] | None = field(
        default=None,
        metadata={"help": "Classes shown, by id or name as sample takes them; unset, the first four with images."},
    )
    num_validation_images: int = field(
        default=4, metadata={"help": "Images per class; none at all with --validation_steps 0.", "range": "(0, inf)"}
    )
    guidance_scale: float = field(
        default=4.0, metadata={"help": "Classifier-free guidance; 1 switches it off.", "range": "[0, inf)"}
    )
    guidance_interval: list[float] = field(
        default_factory=lambda: [0.0, 1.0],
        metadata={
            "help": "Noise levels LOW HIGH in [0, 1] (1 = noise) between which guidance acts.",
            "range": "[0, 1]",
        },
    )
    num_inference_steps: int = field(default=50, metadata={"help": "Steps of the sampler.", "range": "(0, inf)"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.guidance_interval) != 2:
            raise ValueError(f"--guidance_interval takes two numbers, LOW and HIGH; got {self.guidance_interval}.")
        validate_interval(self.guidance_interval)


@dataclass
class GenerationEvaluationArguments(Checked):
    """How generated images are measured while the transformer trains."""

    evaluation_steps: int = field(
        default=0,
        metadata={
            "help": "Measure samples against --evaluation_reference every so many steps; 0 never.",
            "range": "[0, inf)",
        },
    )
    evaluation_reference: str | None = field(
        default=None,
        metadata={
            "reads": True,
            "help": "An ADM reference .npz, statistics kept by evaluate_generation.py --save_reference, or a folder "
            "of images (centre-cropped to the size of the samples).",
        },
    )
    num_evaluation_samples: int = field(
        default=1000,
        metadata={
            "help": "Samples per measurement. Curves of few compare with each other alone.",
            "range": "[2, inf)",
        },
    )
    feature_networks: list[str] = field(
        default_factory=lambda: ["inception"],
        metadata={
            "reads": True,
            "help": "NAME[=WEIGHTS] ... of what samples are measured by: inception (the one that gives FID), dinov2, "
            "squeezenet, cifar_resnet; the others name themselves in every number.",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.evaluation_steps and self.evaluation_reference is None:
            raise ValueError("--evaluation_steps needs --evaluation_reference: what are samples to be compared with?")
        if not self.evaluation_steps:
            warn_without_effect(self, vars(self), "--evaluation_steps is 0")
