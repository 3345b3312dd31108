"""From class labels to images by way of tokens: MaskGIT's transformer, its scheduler, and a VQ autoencoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..schedulers.scheduling_maskgit import MaskGITScheduler
from ..tokens import codebook, decode_tokens
from .pipeline_class_conditional import ClassConditionalPipeline, Generators


class MaskGITPipeline(ClassConditionalPipeline):
    """Samples images of given classes with a `MaskGITTransformer2DModel` and an autoencoder with a codebook (VQModel).

    A call is that of `ClassConditionalPipeline`, with these readings:

        guidance_scale      1 = none; rises linearly over the steps, 1 + (guidance_scale - 1) * i / (N - 1), so that
                            the first step is the conditional one and the last has all of it (MaskGIT's papers and code
                            count from 0: their w is guidance_scale - 1)
        guidance_interval   in the share of tokens that are masked, 1 = all
        latents             tokens (B, h, w) to begin with: those that are not the mask stay as they are
        output_type         "latent" gives the tokens (B, h, w)

    Args:
        transformer: whose output are logits of tokens.
        vae: VQModel, `VQModelEQ`: with the codebook that the transformer was trained on.
        scheduler: a `MaskGITScheduler`.

    The others are ClassConditionalPipeline's.

    Raises:
        ValueError: transformer, VAE, scheduler or id2label do not belong together.

    Example:
        >>> pipeline = MaskGITPipeline.from_pretrained("runs/maskgit")
        >>> pipeline([1, 5], num_inference_steps=8, guidance_scale=4.0).images[0].save("x.png")
    """

    def _check_autoencoder(self) -> None:
        if self.preview_decoder is not None:
            raise ValueError("Tokens are decoded by the codebook they belong to; leave preview_decoder at None.")
        expected, given = self.transformer.config.codebook_size, len(codebook(self.vae))
        if expected != given:
            raise ValueError(
                f"The transformer knows {expected} tokens but the codebook of the {type(self.vae).__name__} has "
                f"{given}: load the VAE that the transformer was trained with."
            )

    def _check_scheduler(self) -> None:
        if not isinstance(self.scheduler, MaskGITScheduler):
            raise ValueError(
                f"The transformer predicts tokens, which {type(self.scheduler).__name__} does not settle: use a "
                "MaskGITScheduler."
            )

    def check_inputs(
        self, batch_size: int, *, num_inference_steps: int, guided_channels: int | None = None, **options: Any
    ) -> None:
        """As ClassConditionalPipeline's; also refuses more steps than tokens, and channels, which tokens have not."""
        super().check_inputs(batch_size, num_inference_steps=num_inference_steps, **options)
        if guided_channels is not None:
            raise ValueError(f"Tokens have no channels to guide; leave guided_channels out, got {guided_channels}.")
        self.scheduler.set_timesteps(num_inference_steps)
        height, width = self.transformer.token_grid
        self.scheduler.counts(height * width)

    def prepare_latents(
        self, batch_size: int, *, generator: Generators, latents: Tensor | None, device: torch.device
    ) -> Tensor:
        """Tokens (B, h, w) int64, all masked where none are given.

        Raises:
            ValueError: given tokens of another shape, or that are none of the codebook and not the mask.
        """
        shape, mask = (batch_size, *self.transformer.token_grid), self.transformer.mask_token
        if latents is None:
            return torch.full(shape, mask, device=device)
        if tuple(latents.shape) != shape or latents.is_floating_point():
            raise ValueError(
                f"latents must be tokens {shape}, integers; got {tuple(latents.shape)} of {latents.dtype}."
            )
        if not 0 <= latents.min() <= latents.max() <= mask:
            raise ValueError(
                f"Tokens must lie in 0 .. {mask}, where {mask} is the mask; got {int(latents.min())} .. "
                f"{int(latents.max())}."
            )
        return latents.to(device, torch.int64)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) float32, nominally in [-1, 1], of tokens (B, h, w)."""
        return decode_tokens(self.vae, latents).float()

    @property
    def _predicted_channels(self) -> int:
        return self.transformer.config.codebook_size

    def _guidance_scale(self, guidance_scale: float, step: int) -> float:
        last = len(self.scheduler.timesteps) - 1
        return 1.0 + (guidance_scale - 1.0) * (step / last if last else 1.0)

    def _denoise(self, latents: Tensor, timestep: Tensor, class_labels: Tensor, *, model: Any = None) -> Tensor:
        return (model or self.transformer)(latents, None, class_labels, return_dict=False)[0].float()

    def _drop_variance(self, prediction: Tensor, latents: Tensor) -> Tensor:
        return prediction
