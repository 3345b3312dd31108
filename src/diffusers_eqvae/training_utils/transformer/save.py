"""What a finished transformer run leaves behind: the pipeline, its normalisation and the metadata of the run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from ...data.latent_data import LatentData
from ...files import read_json
from ...latents import LatentNormalization
from ...model_card import METADATA_FILE, RunMetadata
from ...models.backbone import backbones
from ...objectives.base import OBJECTIVES, Objective
from ...pipelines.pipeline_class_conditional import ClassConditionalPipeline
from ..card import how_it_was_made, settings_of
from ..lora import LORA, adapter_settings, fused, save_adapter
from ..run import TrainingRun
from ..tracking import drawn_images
from .arguments import SamplingArguments, TransformerArguments

_NO_ARGUMENTS = SimpleNamespace()


def sample_grid(pipeline: ClassConditionalPipeline, sampling: SamplingArguments, *, seed: int) -> list[Image.Image]:
    """The same noise at every call: what changes from grid to grid is the model."""
    return pipeline(
        sampling.validation_labels or pipeline.class_ids[:4],
        num_images_per_label=sampling.num_validation_images,
        guidance_scale=sampling.guidance_scale,
        guidance_interval=(sampling.guidance_interval[0], sampling.guidance_interval[1]),
        num_inference_steps=sampling.num_inference_steps,
        generator=torch.Generator().manual_seed(seed),
    ).images


def save_pipeline(
    directory: Path,
    pipeline: ClassConditionalPipeline,
    run: TrainingRun,
    *,
    arguments: TransformerArguments,
    objective: Objective,
    sampling: SamplingArguments,
    latents: LatentData,
) -> None:
    """model_index.json, transformer/, vae/ (with mean_std.json where it has one), scheduler/ and run_metadata.json.

    Adapters are fused into the transformer, and written beside it.
    """
    adapted: dict[str, Any] = {}
    transformer = pipeline.transformer
    if arguments.trainable == LORA:
        save_adapter(pipeline.transformer, directory / LORA, base=arguments.model, component="transformer")
        adapted = {"trainable": LORA, "lora": adapter_settings(pipeline.transformer)}
        pipeline.transformer = fused(transformer)
    pipeline.save_pretrained(directory)
    pipeline.transformer = transformer  # training may go on
    for folder, component in objective.components().items():
        component.save_pretrained(directory / folder)
    normalization = LatentNormalization.from_vae(latents.vae)
    if normalization.mean is not None:
        normalization.save_json(directory / "vae" / "mean_std.json")
    caption = f"Samples after {run.step} steps, guidance scale {sampling.guidance_scale}"
    RunMetadata(
        model={
            "architecture": arguments.model if arguments.model in backbones() else None,
            "autoencoder": arguments.vae or _autoencoder_of(Path(str(arguments.latents_dir))),
            "num_classes": len(latents.classes),
            "sampling": {
                "guidance_scale": sampling.guidance_scale,
                "guidance_interval": sampling.guidance_interval,
                "num_inference_steps": sampling.num_inference_steps,
            },
        },
        training={
            "objective": _describe(objective),
            **settings_of(run),
            **adapted,
        },
        data={"dataset": latents.name, "resolution_px": latents.resolution_px, "report": latents.report},
        evaluation={"images": drawn_images(run.output_dir, run.step, "samples", caption=caption, private=False)},
        provenance=how_it_was_made(),
    ).save(directory / METADATA_FILE)


def _autoencoder_of(store: Path) -> str | None:
    """What the autoencoder in a store was loaded from, as diffusers notes it."""
    source = read_json(store / "vae" / "config.json").get("_name_or_path")
    return source if isinstance(source, str) else None


def _describe(objective: Objective) -> str:
    """The objective and its options, for the card."""
    options = vars(getattr(objective, "arguments", None) or _NO_ARGUMENTS)
    return ", ".join([OBJECTIVES.name_of(type(objective)), *(f"{key} {value}" for key, value in options.items())])
