"""Class-conditional sampling as blocks of Modular Diffusers, to be mixed with blocks and guiders of others."""

from __future__ import annotations

from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import SchedulerMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.modular_pipelines import ModularPipelineBlocks, SequentialPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from torch import Tensor, nn

from ..schedulers.capabilities import noise_levels
from .guider_sigma_interval import SigmaIntervalGuidance
from .pipeline_class_conditional import ClassConditionalPipeline, accepts

_MODELS = [ComponentSpec("transformer", nn.Module), ComponentSpec("vae", nn.Module)]
_PARTS = [*_MODELS, ComponentSpec("scheduler", SchedulerMixin)]


_ASSEMBLED: WeakKeyDictionary[Any, ClassConditionalPipeline] = WeakKeyDictionary()


def _pipeline(components: Any) -> ClassConditionalPipeline:
    """The parts as the pipeline whose steps these blocks are, one for all blocks; refuses what does not fit."""
    parts = (components.transformer, components.vae, components.scheduler)
    pipeline = _ASSEMBLED.get(components)
    if pipeline is None:
        pipeline = _ASSEMBLED[components] = ClassConditionalPipeline(*parts)
    pipeline.transformer, pipeline.vae, pipeline.scheduler = parts  # which may have been replaced
    pipeline.check_parts()
    return pipeline


class ClassLabelsStep(ModularPipelineBlocks):
    """Class ids or names -> labels (B,), and initial noise (B, C, h, w) unless latents are given."""

    model_name = "class-conditional"
    expected_components = _PARTS
    inputs = [  # noqa: RUF012
        InputParam("class_labels", required=True, description="Class id, label name, or a list of them."),
        InputParam("num_images_per_label", default=1, description="Images per label, side by side."),
        InputParam("generator", description="One generator, or one per image."),
        InputParam("latents", description="Initial noise (B, C, h, w) instead of drawn noise."),
    ]
    intermediate_outputs = [  # noqa: RUF012
        OutputParam("labels", type_hint=torch.Tensor, description="Class ids (B,)."),
        OutputParam("latents", type_hint=torch.Tensor, description="Noise (B, C, h, w), float32."),
    ]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> Any:
        block, pipeline = self.get_block_state(state), _pipeline(components)
        ids = pipeline.resolve_class_labels(block.class_labels)
        device = components._execution_device
        block.labels = torch.tensor(ids).repeat_interleave(block.num_images_per_label).to(device)
        block.latents = pipeline.prepare_latents(
            len(block.labels), generator=block.generator, latents=block.latents, device=device
        )
        self.set_block_state(state, block)
        return components, state


class DenoiseStep(ModularPipelineBlocks):
    """Noise -> latents, guided by any guider of diffusers; it reads the noise level times 1000 as the timestep."""

    model_name = "class-conditional"
    expected_components = [  # noqa: RUF012
        *_PARTS,
        ComponentSpec(
            "guider",
            SigmaIntervalGuidance,
            config=FrozenDict({"guidance_scale": 4.0}),
            default_creation_method="from_config",
        ),
    ]
    inputs = [  # noqa: RUF012
        InputParam("labels", required=True),
        InputParam("latents", required=True),
        InputParam("generator"),
        InputParam("num_inference_steps", default=50, description="Steps of the scheduler."),
    ]
    intermediate_outputs = [OutputParam("latents", type_hint=torch.Tensor)]  # noqa: RUF012

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> Any:
        block, pipeline = self.get_block_state(state), _pipeline(components)
        if hasattr(pipeline.scheduler, "integrate"):
            raise ValueError(
                f"A guider is told one noise level a step, and {type(pipeline.scheduler).__name__} chooses its steps "
                "for each image: take another scheduler, or ClassConditionalPipeline."
            )
        pipeline._set_timesteps(block.num_inference_steps)
        options = {"generator": block.generator} if accepts(pipeline.scheduler.step, "generator") else {}
        steps = list(zip(pipeline.scheduler.timesteps, noise_levels(pipeline.scheduler), strict=True))
        for index, (timestep, sigma) in enumerate(steps):
            guidance: Any = partial(_guided, pipeline, components.guider, index, len(steps))
            block.latents = pipeline._advance(guidance, block.latents, timestep, sigma, block.labels, **options)
        self.set_block_state(state, block)
        return components, state


def _guided(
    pipeline: ClassConditionalPipeline, guider: Any, step: int, steps: int, latents: Tensor, sigma: float, labels: Any
) -> Tensor:
    """The guided prediction; what a transformer says of the variance is that of the condition, as in the pipeline."""
    transformer, channels = pipeline.transformer, latents.shape[1]
    timestep = torch.full((len(latents),), pipeline._model_timesteps * sigma, device=latents.device)
    guider.set_state(step=step, num_inference_steps=steps, timestep=timestep)
    null = torch.full_like(labels, transformer.config.num_classes)
    batches, predictions = guider.prepare_inputs({"class_labels": (labels, null)}), []
    for batch in batches:
        guider.prepare_models(transformer)
        predictions.append(pipeline._denoise(latents, timestep, batch.class_labels))
        guider.cleanup_models(transformer)
        batch.noise_pred = predictions[-1][:, :channels]
    return torch.cat([guider(batches).pred, predictions[0][:, channels:]], dim=1)


class DecodeStep(ModularPipelineBlocks):
    """Latents -> images."""

    model_name = "class-conditional"
    expected_components = _PARTS
    inputs = [InputParam("latents", required=True), InputParam("output_type", default="pil")]  # noqa: RUF012
    intermediate_outputs = [OutputParam("images")]  # noqa: RUF012

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> Any:
        block = self.get_block_state(state)
        block.images = _pipeline(components)._images(block.latents, block.output_type)
        self.set_block_state(state, block)
        return components, state


class ClassConditionalBlocks(SequentialPipelineBlocks):
    """`ClassConditionalPipeline` in three blocks for Modular Diffusers: labels and noise, denoising, decoding.

    They draw the same images as the pipeline from the same noise, bit for bit with `sequential_guidance=True`. A block
    may be replaced, and the guider be any of diffusers'; the default is `SigmaIntervalGuidance`.

    Example:
        >>> pipeline = ClassConditionalBlocks().init_pipeline("runs/sit")
        >>> pipeline.load_components()
        >>> pipeline.update_components(guider=SigmaIntervalGuidance(1.8, (0.0, 0.75)))
        >>> pipeline(class_labels=[1, 5], num_inference_steps=50, output="images")[0].save("sample.png")
    """

    model_name = "class-conditional"
    block_classes = [ClassLabelsStep, DenoiseStep, DecodeStep]  # noqa: RUF012
    block_names = ["labels", "denoise", "decode"]  # noqa: RUF012
