"""What a finished transformer run leaves behind: the pipeline, its normalisation and the facts about it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import diffusers
import torch
from PIL import Image

from ...data.latent_data import LatentData
from ...hub import RunFacts, write_run_facts
from ...latents import LatentNormalization
from ...models.transformer_sit import SIT_PRESETS
from ...pipelines.pipeline_class_conditional import ClassConditionalPipeline
from ..run import TrainingRun
from .arguments import FlowArguments, SamplingArguments, TransformerArguments


def sample_grid(pipeline: ClassConditionalPipeline, sampling: SamplingArguments, *, seed: int) -> list[Image.Image]:
    """The same noise at every call: what changes from grid to grid is the model."""
    labels = [label for label in sampling.validation_labels if label < pipeline.transformer.config.num_classes]
    return pipeline(
        labels or [0],
        num_images_per_prompt=sampling.num_validation_images,
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
    flow: FlowArguments,
    sampling: SamplingArguments,
    latents: LatentData,
) -> None:
    """model_index.json, transformer/, vae/ (with mean_std.json where it has one), scheduler/ and run_facts.json."""
    pipeline.save_pretrained(directory)
    normalization = LatentNormalization.from_vae(latents.vae)
    if normalization.mean is not None:
        normalization.save_json(directory / "vae" / "mean_std.json")
    drawn = f"validation/{run.step:08d}_samples.png"
    caption = f"Samples after {run.step} steps, guidance scale {sampling.guidance_scale}"
    images = [{"path": drawn, "caption": caption}] if (run.output_dir / drawn).exists() else []
    facts = RunFacts(
        model_class=type(pipeline.transformer).__name__,
        architecture=arguments.model if arguments.model in SIT_PRESETS else None,
        objective=f"{flow.objective}, {flow.path} path, sigma {flow.sigma_distribution}",
        vae=arguments.vae,
        dataset=latents.name,
        steps=run.step,
        batch_size=run.global_batch_size,
        learning_rate=run.arguments.learning_rate,
        mixed_precision=run.accelerator.mixed_precision,
        ema_decay=run.arguments.ema_decay if run.arguments.use_ema else None,
        seed=run.arguments.seed,
        num_classes=latents.num_classes,
        sampling={
            "guidance_scale": sampling.guidance_scale,
            "guidance_interval": sampling.guidance_interval,
            "num_inference_steps": sampling.num_inference_steps,
        },
        images=images,
        versions={"torch": torch.__version__, "diffusers": diffusers.__version__},
        command=f"{sys.argv[0]} {shlex.join(sys.argv[1:])}",
    )
    write_run_facts(directory / "run_facts.json", facts)
