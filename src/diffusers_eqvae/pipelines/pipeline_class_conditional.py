"""Class-conditional image generation: class labels -> latents -> images."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..autoencoders import decode_upcast, latent_channels, require_handled, uncompiled
from ..classes import ClassTable, parse_id2label, strangers
from ..guidance import IntervalGuidance
from ..images import require_finite, to_image
from ..latents import LatentNormalization
from ..models.alignment_network import AlignmentNetwork
from ..models.autoencoder_kl_eq import AutoencoderKLEQ
from ..provenance import require_same_autoencoder
from ..schedulers.capabilities import integrates_velocity, noise_levels, takes_variance
from .adapters import AdapterMixin
from .guide import check_guide
from .labels import resolve_class_labels, warn_of_untrained

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# Whether what an objective trains is sampled by integrating a velocity; of others the scheduler alone decides.
INTEGRATE_A_VELOCITY = {"flow_matching": True, "denoising": False}
Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class ClassConditionalPipelineOutput(ImagePipelineOutput):
    """What one call of `ClassConditionalPipeline` gives.

    Args:
        images: B PIL images; or (B, H, W, 3) float32 array in [0, 1] ("np"); or (B, 3, H, W) tensor in [0, 1]
            ("pt"); or normalised latents (B, C, h, w) float32 ("latent").
        nfe: model evaluations per image, in units of one conditional forward (a guided step counts 2).
        seconds: wall-clock time of the call, sampling and decoding.

    Example:
        >>> pipeline([3], num_inference_steps=50, guidance_scale=1.5).nfe
        100.0
    """

    nfe: float
    seconds: float


class ClassConditionalPipeline(AdapterMixin, DiffusionPipeline):
    """Samples images of given classes with a SiT/DiT transformer and any diffusers autoencoder.

    The scheduler owns the step, `IntervalGuidance` owns guidance and `LatentNormalization` owns the way from latents
    to raw latents. The state is kept in float32; only the transformer and the VAE run in their own dtype.

    Args:
        transformer: `SiTTransformer2DModel` or a model with its forward and config.
        vae: any diffusers autoencoder (AutoencoderKL, AutoencoderTiny, their subclasses) with the same channels.
        scheduler: a flow-matching one for a transformer of `objective="flow_matching"`, a DDPM-style one for
            "denoising".
        id2label: class id -> name (or names, or one string with commas); saved with the pipeline. Without it, the
            names in the transformer's config count; where both name a class, they must agree.
        alignment_network: the `AlignmentNetwork` that was trained with the VAE, where there is one; sampling does not
            use it, `perception.perception_image` does.

    Attributes:
        preview_decoder: None, or a small autoencoder (AutoencoderTiny) that decodes in place of `vae`. It is not the
            one that the transformer was trained with, and that it decodes the same latents is yours to know: it takes
            them normalised, as its own config says. It is not saved; settings and cards of samples name it.
        guide: None, or a weaker transformer of the same latents and classes, whose prediction for the same label takes
            the place of the unconditional one (autoguidance, arXiv 2406.02070). Not saved either.

    Raises:
        ValueError: transformer, VAE, scheduler or id2label do not belong together.

    Example:
        >>> pipeline = ClassConditionalPipeline.from_pretrained("runs/sit")
        >>> pipeline(class_labels=[1, 5], guidance_scale=1.8, guidance_interval=(0.0, 0.75)).images[0].save("x.png")
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components: ClassVar[list[str]] = ["alignment_network"]
    _callback_tensor_inputs = ("latents", "class_labels")

    def __init__(
        self,
        transformer: ModelMixin,
        vae: ModelMixin,
        scheduler: SchedulerMixin,
        id2label: dict | None = None,
        alignment_network: AlignmentNetwork | None = None,
    ) -> None:
        super().__init__()
        if alignment_network is not None and vae is not None:
            alignment_network.check_autoencoder(vae)
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.register_modules(alignment_network=alignment_network)
        self.register_to_config(id2label=id2label)
        self.preview_decoder: ModelMixin | None = None
        self.guide: ModelMixin | None = None
        self._checked_parts: tuple[Any, ...] = (None,) * 5
        self._warned_of: set[int] = set()
        self._called_with = (0, 1.0)  # steps and guidance scale
        self.check_parts()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        module = uncompiled(value)
        if isinstance(module, AutoencoderKLEQ) and module.is_stock:
            # What is saved is a plain AutoencoderKL, and loads where this package is not installed.
            self.register_to_config(**{name: ("diffusers", "AutoencoderKL")})

    @property
    def id2label(self) -> dict[int, tuple[str, ...]]:
        """Class id -> its names, the pipeline's own or those of its transformer; empty where neither has any."""
        if self.transformer is None:
            return parse_id2label(self.config.id2label)
        config = self.transformer.config
        return parse_id2label(self.config.id2label or getattr(config, "id2label", None), config.num_classes)

    @property
    def class_ids(self) -> list[int]:
        """The classes to sample where none are named: all, without those that the training data had no images of."""
        config = self.transformer.config
        table = ClassTable.from_config({key: getattr(config, key, None) for key in ("id2label", "class_counts")})
        return table.present if table and table.counts else list(range(config.num_classes))

    @property
    def num_timesteps(self) -> int:
        """Steps of the call that runs, or ran last, for callbacks."""
        return self._called_with[0]

    @property
    def guidance_scale(self) -> float:
        """Of the call that runs, or ran last, for callbacks."""
        return self._called_with[1]

    def resolve_class_labels(self, class_labels: Any) -> list[int]:
        """Flat class ids of ids, names or nested lists of them; see `labels.resolve_class_labels`."""
        ids = resolve_class_labels(class_labels, self.transformer.config.num_classes, id2label=self.id2label)
        warn_of_untrained(ids, trained=self.class_ids, said=self._warned_of)
        return ids

    def check_parts(self) -> None:
        """Refuses parts that do not belong together; runs once per set of parts, so components may be replaced.

        Raises:
            ValueError: in one sentence, what does not fit.
        """
        parts = (self.transformer, self.vae, self.scheduler, self.preview_decoder, self.guide)
        if any(part is None for part in parts[:3]) or all(
            new is old for new, old in zip(parts, self._checked_parts, strict=True)
        ):
            return
        self._check_autoencoder()
        identity = getattr(self.transformer.config, "autoencoder", None)
        require_same_autoencoder(identity, self.vae, whose="the transformer")
        self._check_scheduler()
        self._check_names()
        if self.guide is not None:
            check_guide(self.guide, self.transformer)
        self._checked_parts = parts

    def _check_autoencoder(self) -> None:
        expected = self.transformer.config.in_channels
        for decoder in (self.vae, self.preview_decoder):
            if decoder is None:
                continue
            require_handled(decoder)
            name, channels = type(uncompiled(decoder)).__name__, latent_channels(decoder)
            if channels != expected:
                raise ValueError(
                    f"The transformer works on {expected} latent channels but the {name} has {channels}: "
                    "load the VAE that the transformer was trained with."
                )

    def _check_scheduler(self) -> None:
        objective = getattr(self.transformer.config, "objective", "flow_matching")
        flow = INTEGRATE_A_VELOCITY.get(objective)
        if flow is not None and flow != integrates_velocity(self.scheduler):
            remedy = "a flow-matching scheduler" if flow else "a DDPM-style scheduler (DDPM, DDIM)"
            raise ValueError(
                f"The transformer was trained with objective={objective!r}, whose prediction "
                f"{type(self.scheduler).__name__} does not integrate: use {remedy}."
            )
        predicts = getattr(self.transformer.config, "prediction_type", None)
        takes = self.scheduler.config.get("prediction_type", "flow_prediction" if flow else None)
        if None not in (predicts, takes) and predicts != takes:
            raise ValueError(
                f"The transformer predicts {predicts!r}, and the {type(self.scheduler).__name__} takes {takes!r}: set "
                f"it up with prediction_type={predicts!r}, or use a scheduler that has it."
            )

    def _check_names(self) -> None:
        own = parse_id2label(self.config.id2label, self.transformer.config.num_classes)
        trained = parse_id2label(getattr(self.transformer.config, "id2label", None))
        for class_id in strangers(own, trained):
            raise ValueError(
                f"The transformer was trained with class {class_id} as {trained[class_id][0]!r}, and the pipeline's "
                f"id2label calls it {own[class_id][0]!r}: leave id2label out, or use the transformer that these names "
                "belong to."
            )

    def check_inputs(
        self,
        batch_size: int,
        *,
        guidance_scale: float,
        num_inference_steps: int,
        generator: Generators,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str] = (),
        guided_channels: int | None = None,
    ) -> None:
        """Raises ValueError for anything the loop could only trip over later; `IntervalGuidance` checks its own."""
        dropped = getattr(self.transformer.config, "class_dropout_prob", None)
        if guidance_scale != 1.0 and self.guide is None and dropped == 0.0:
            raise ValueError(
                "Guidance needs a null class, but the transformer was trained with class_dropout_prob=0; "
                "use guidance_scale=1.0, or a weaker model as the guide."
            )
        if batch_size < 1 or num_inference_steps < 1:
            raise ValueError(
                "num_images_per_label and num_inference_steps must be at least 1; "
                f"got {batch_size} images and {num_inference_steps} steps."
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {OUTPUT_TYPES}; got {output_type!r}.")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"A list of generators must hold one per image; got {len(generator)} for {batch_size} images."
            )
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(f"Callbacks may ask for {list(self._callback_tensor_inputs)}; got {unknown}.")

    def prepare_latents(
        self, batch_size: int, *, generator: Generators, latents: Tensor | None, device: torch.device
    ) -> Tensor:
        """Initial noise (B, C, h, w) in float32, drawn per image where `generator` is a list.

        Raises:
            ValueError: given latents have the wrong batch size or channels.
        """
        channels = self.transformer.config.in_channels
        if latents is None:
            size = self.transformer.config.sample_size
            height, width = (size, size) if isinstance(size, int) else size
            shape = (batch_size, channels, height, width)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif latents.ndim != 4 or latents.shape[:2] != (batch_size, channels):
            raise ValueError(
                f"latents must have shape ({batch_size}, {channels}, h, w), one per image; got {tuple(latents.shape)}."
            )
        return latents.to(device, torch.float32) * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) float32, nominally in [-1, 1], of normalised latents.

        A float16 VAE whose config says `force_upcast` is decoded in float32; see `autoencoders.decode_upcast`. A
        `preview_decoder` decodes in place of the VAE.
        """
        decoder = self.vae if self.preview_decoder is None else self.preview_decoder
        latents = latents.to(decoder.device, torch.float32)
        return decode_upcast(decoder, LatentNormalization.from_vae(decoder).denormalize(latents))

    def _images(self, latents: Tensor, output_type: str) -> Any:
        """What the caller asked for, of latents; NaN and infinity are refused, which images would show as black."""
        if output_type == "latent":
            return latents
        decoder = self.vae if self.preview_decoder is None else self.preview_decoder
        pixels = self.decode_latents(latents)
        require_finite(pixels, whose=f"{type(uncompiled(decoder)).__name__} in {decoder.dtype}")
        return _to_output(pixels, output_type)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Any,
        *,
        num_images_per_label: int = 1,
        guidance_scale: float = 4.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guided_channels: int | None = None,
        num_inference_steps: int = 50,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        sequential_guidance: bool = False,
    ) -> ClassConditionalPipelineOutput | tuple[Any, float, float]:
        """Generates B = (number of labels) * num_images_per_label images, the images of one label side by side.

        Args:
            class_labels: class id, label name, tensor, or nested lists of them.
            num_images_per_label: images per label.
            guidance_scale: 1 = no guidance, one forward per step.
            guidance_interval: (lo, hi) in noise level sigma in [0, 1], 1 = noise: guidance where lo <= sigma <= hi,
                elsewhere the unconditional forward is skipped. For DDPM schedules sigma = t / num_train_timesteps.
            guided_channels: None guides all latent channels, n the first n (3 in the DiT and SiT papers).
            num_inference_steps: steps of the scheduler.
            generator: one generator, or one per image.
            latents: initial noise (B, C, h, w) instead of drawn noise.
            output_type: "pil", "np", "pt" or "latent" (normalised latents, before the VAE).
            return_dict: False gives the tuple (images, nfe, seconds).
            callback_on_step_end: called as (pipeline, step, timestep, tensors) after every step; the tensors it
                returns replace the loop's.
            callback_on_step_end_tensor_inputs: which tensors it gets, of "latents" and "class_labels".
            sequential_guidance: two forwards of batch B instead of one of 2B: half the memory.

        Raises:
            ValueError: an argument out of range, or parts that do not belong together.
        """
        started = time.perf_counter()
        self.check_parts()
        label_ids = self.resolve_class_labels(class_labels)
        batch_size = len(label_ids) * num_images_per_label
        self.check_inputs(
            batch_size,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            generator=generator,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            guided_channels=guided_channels,
        )
        guidance = IntervalGuidance(
            self._denoise,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            null_class=self.transformer.config.num_classes,
            guided_channels=guided_channels,
            latent_channels=self._predicted_channels,
            batched=not sequential_guidance,
            num_train_timesteps=self._model_timesteps,
            guide=None if self.guide is None else partial(self._denoise, model=self.guide),
        )
        device = self._execution_device
        labels = torch.tensor(label_ids).repeat_interleave(num_images_per_label).to(device)
        self._set_timesteps(num_inference_steps)
        self._called_with = (len(self.scheduler.timesteps), guidance_scale)
        latents = self.prepare_latents(batch_size, generator=generator, latents=latents, device=device)
        step_kwargs = {"generator": generator} if accepts(self.scheduler.step, "generator") else {}

        with self.progress_bar(total=len(self.scheduler.timesteps)) as progress:
            calls = zip(self.scheduler.timesteps, noise_levels(self.scheduler), strict=True)
            for index, (timestep, sigma) in enumerate(calls):
                guidance.guidance_scale = self._guidance_scale(guidance_scale, index)
                latents = self._advance(guidance, latents, timestep, sigma, labels, **step_kwargs)
                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "class_labels": labels}
                    asked = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    tensors.update(callback_on_step_end(self, index, timestep, asked) or {})
                    latents, labels = tensors["latents"], tensors["class_labels"]
                progress.update()

        images = self._images(latents, output_type)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.maybe_free_model_hooks()
        output = ClassConditionalPipelineOutput(
            images=images, nfe=float(guidance.nfe), seconds=time.perf_counter() - started
        )
        return output if return_dict else output.to_tuple()

    @property
    def _predicted_channels(self) -> int:
        """Channels of the prediction that guidance acts on."""
        return self.transformer.config.in_channels

    def _guidance_scale(self, guidance_scale: float, step: int) -> float:
        """Of one step, for a call with `guidance_scale`."""
        return float(guidance_scale)

    @property
    def _model_timesteps(self) -> int:
        """What noise level 1 is on the transformer's time axis: 1000 for flow, the schedule's length for diffusion."""
        flow = integrates_velocity(self.scheduler)
        return 1000 if flow else self.scheduler.config.num_train_timesteps

    def _set_timesteps(self, num_inference_steps: int) -> None:
        # On the CPU for every device: schedulers index their tables by the timestep, and a timestep on the GPU would
        # make the host wait for the GPU in every step.
        if isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            # Its own grid ends ..., 0.001, 0 and so spends a step on nothing.
            sigmas = np.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps)
            self.scheduler.set_timesteps(sigmas=sigmas, device="cpu")
        else:
            self.scheduler.set_timesteps(num_inference_steps, device="cpu")

    def _advance(
        self,
        guidance: IntervalGuidance,
        latents: Tensor,
        timestep: Tensor,
        sigma: float,
        labels: Tensor,
        **options: Any,
    ) -> Tensor:
        """The latents after one step of the scheduler, or after all of those that it chooses itself."""

        def predict(x: Tensor, level: float | Tensor) -> Tensor:
            return self._drop_variance(guidance(x, level, labels), latents)

        if hasattr(self.scheduler, "integrate"):
            return self.scheduler.integrate(predict, latents)
        prediction = predict(self._scale(latents, timestep), sigma)
        return self.scheduler.step(prediction, timestep, latents, **options, return_dict=False)[0]

    def _denoise(self, latents: Tensor, timestep: Tensor, class_labels: Tensor, *, model: Any = None) -> Tensor:
        model = model or self.transformer
        hidden_states = latents.to(model.dtype)
        return model(hidden_states, timestep=timestep, class_labels=class_labels, return_dict=False)[0].float()

    def _scale(self, latents: Tensor, timestep: Tensor) -> Tensor:
        scale = getattr(self.scheduler, "scale_model_input", None)
        return latents if scale is None else scale(latents, timestep)

    def _drop_variance(self, prediction: Tensor, latents: Tensor) -> Tensor:
        return prediction if takes_variance(self.scheduler) else prediction[:, : latents.shape[1]]


def accepts(function: Callable, name: str) -> bool:
    return name in inspect.signature(function).parameters


def _to_output(pixels: Tensor, output_type: str) -> Any:
    """Pixels in [-1, 1] as the caller wants them."""
    if output_type == "pil":
        return [to_image(image) for image in pixels.cpu()]
    images = (pixels / 2 + 0.5).clamp(0, 1)
    return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()
