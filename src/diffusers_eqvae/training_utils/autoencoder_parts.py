"""The networks that autoencoder training is made of, from its arguments."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoModel, ModelMixin
from torch import Tensor, nn

from ..autoencoders import downsampling_factor, encode
from ..latents import LatentStatistics
from ..losses.perceptual import LPIPS
from ..models.autoencoder_kl_eq import AutoencoderKLEQ
from ..models.discriminator import PatchDiscriminator
from ..regularizers import REGULARIZERS, Regularizer
from .autoencoder_arguments import AutoencoderArguments, AutoencoderLossArguments, RegularizerArguments
from .autoencoder_step import AutoencoderLossWeights

logger = logging.getLogger(__name__)


def build_autoencoder(arguments: AutoencoderArguments, *, gradient_checkpointing: bool = False) -> ModelMixin:
    """The autoencoder to train, in float32: fine-tuned from a checkpoint, or new from a JSON of init arguments.

    An `AutoencoderKL` becomes an `AutoencoderKLEQ`, which adds `padding_mode` and loads as plain `AutoencoderKL`.

    Raises:
        ValueError: not exactly one of the two sources; options that the family does not have.
    """
    if (arguments.pretrained_model_name_or_path is None) == (arguments.model_config is None):
        raise ValueError(
            "Say where the autoencoder comes from with exactly one of --pretrained_model_name_or_path (fine-tune) and "
            "--model_config (train from scratch)."
        )
    padding = {"padding_mode": arguments.padding_mode} if arguments.padding_mode else {}
    if arguments.model_config:
        vae = AutoencoderKLEQ.from_config(json.loads(Path(arguments.model_config).read_text()), **padding)
    else:
        vae = _load_pretrained(arguments, padding)
    vae = vae.to(torch.float32)
    if gradient_checkpointing:
        _enable_gradient_checkpointing(vae)
    if arguments.channels_last:
        vae = vae.to(memory_format=torch.channels_last)
    return vae.train()


def _load_pretrained(arguments: AutoencoderArguments, padding: dict[str, str]) -> ModelMixin:
    source = {"subfolder": arguments.subfolder, "revision": arguments.revision, "torch_dtype": torch.float32}
    source = {key: value for key, value in source.items() if value is not None}
    name = arguments.pretrained_model_name_or_path
    location = {key: value for key, value in source.items() if key != "torch_dtype"}
    family = AutoencoderKLEQ.load_config(name, **location).get("_class_name")
    if family in ("AutoencoderKL", "AutoencoderKLEQ"):
        return AutoencoderKLEQ.from_pretrained(name, **source, **padding)
    if padding:
        raise ValueError(f"--padding_mode exists for AutoencoderKL; {name} is an {family}. Leave the option out.")
    return AutoModel.from_pretrained(name, **source)


def _enable_gradient_checkpointing(vae: ModelMixin) -> None:
    # diffusers 0.42.1: AutoencoderTiny's checkpointed path skips the input and output scaling, a different function.
    if type(vae).__name__ == "AutoencoderTiny":
        raise ValueError(
            "Gradient checkpointing changes what diffusers' AutoencoderTiny computes, so it is refused; the model is "
            "small enough to train without --gradient_checkpointing."
        )
    vae.enable_gradient_checkpointing()


def build_regularizers(arguments: RegularizerArguments, vae: nn.Module) -> dict[str, Regularizer]:
    """The regularisers named in `arguments.regularizers` ("none" for an empty list), in that order.

    Raises:
        ValueError: an unknown or repeated name.
    """
    names = [name for name in arguments.regularizers if name != "none"]
    unknown = [name for name in names if name not in REGULARIZERS]
    if unknown or len(set(names)) != len(names):
        raise ValueError(
            f"--regularizers takes each of {', '.join(REGULARIZERS)} at most once, or none; got "
            f"{' '.join(arguments.regularizers)}."
        )
    return {name: REGULARIZERS[name].from_arguments(arguments, vae) for name in names}


def build_loss_weights(arguments: AutoencoderLossArguments) -> AutoencoderLossWeights:
    return AutoencoderLossWeights(
        reconstruction=arguments.reconstruction_loss,
        reduction=arguments.reduction,
        perceptual=arguments.perceptual_weight,
        kl=arguments.kl_weight,
        discriminator=arguments.disc_weight,
        discriminator_start=arguments.disc_start,
        discriminator_loss=arguments.disc_loss,
        adaptive=arguments.adaptive_disc_weight,
    )


def build_perceptual(arguments: AutoencoderLossArguments) -> LPIPS | None:
    """LPIPS, or None where its weight is 0."""
    if not arguments.perceptual_weight:
        return None
    return LPIPS.from_pretrained(
        arguments.perceptual_net,
        backbone_weights=arguments.lpips_backbone_weights,
        linear_weights=arguments.lpips_linear_weights,
    )


def build_discriminator(arguments: AutoencoderLossArguments, *, smallest_px: int) -> PatchDiscriminator | None:
    """The PatchGAN discriminator, or None where its weight is 0.

    Args:
        smallest_px: shortest side of the smallest picture that it will see (tau's smallest scale).

    Raises:
        ValueError: that side is below what the discriminator's strides need.
    """
    if not arguments.disc_weight:
        return None
    if arguments.disc_pretrained:
        discriminator = PatchDiscriminator.from_pretrained(arguments.disc_pretrained)
    else:
        discriminator = PatchDiscriminator(
            base_channels=arguments.disc_channels, num_layers=arguments.disc_num_layers, norm=arguments.disc_norm
        )
    if smallest_px < discriminator.min_size_px:
        raise ValueError(
            f"The discriminator needs pictures of at least {discriminator.min_size_px} px, but tau's smallest "
            f"picture has {smallest_px} px; raise --resolution, lower --disc_num_layers, or set --disc_weight 0."
        )
    return discriminator


def smallest_picture_px(arguments: RegularizerArguments, vae: nn.Module, resolution: int) -> int:
    """Shortest side of the smallest picture tau can produce: a quarter of the latent side, in pixels."""
    factor = downsampling_factor(vae)
    shrinks = "equivariance" in arguments.regularizers and arguments.tau_scale != "none"
    return max(resolution // factor // 4, 1) * factor if shrinks else resolution


@torch.no_grad()
def measure_normalization(vae: nn.Module, batches: Iterable[Tensor], num_samples: int) -> LatentStatistics:
    """Mean and standard deviation of the raw latents of `num_samples` pictures, posterior variance included."""
    statistics = LatentStatistics()
    was_training, seen = vae.training, 0
    vae.eval()
    for pixels in batches:
        posterior = encode(vae, pixels[: num_samples - seen])
        statistics.update(posterior.mean, posterior.logvar)
        seen += len(posterior.mean)
        if seen >= num_samples:
            break
    vae.train(was_training)
    return statistics
