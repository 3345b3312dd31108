"""The networks that autoencoder training is made of, from its arguments."""

from __future__ import annotations

import logging
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from ...autoencoders import autoencoder_location, downsampling_factor, load_autoencoder, require_fitting
from ...data.image_datasets import PixelDataset, load_image_dataset
from ...losses.perceptual import LPIPS
from ...models.autoencoder_kl_aligned import AutoencoderKLAligned
from ...models.autoencoder_kl_eq import AutoencoderKLEQ
from ...models.discriminator import PatchDiscriminator
from ...objectives.autoencoder import AutoencoderLossWeights
from ...regularizers import REGULARIZERS, Regularizer
from ..arguments import DataArguments, read_model_config, warn_without_effect
from .arguments import (
    AutoencoderArguments,
    AutoencoderEvaluationArguments,
    AutoencoderLossArguments,
    RegularizerArguments,
)

logger = logging.getLogger(__name__)

KL_CLASSES = ("AutoencoderKL", "AutoencoderKLEQ", "AutoencoderKLAligned")


def build_autoencoder(
    arguments: AutoencoderArguments, *, aligned: bool = False, gradient_checkpointing: bool = False
) -> ModelMixin:
    """The autoencoder to train, in float32: fine-tuned from a checkpoint, or new from a JSON of init arguments.

    An `AutoencoderKL` becomes an `AutoencoderKLEQ`, or an `AutoencoderKLAligned` where `aligned`; both load as plain
    `AutoencoderKL`.

    Raises:
        ValueError: not exactly one of the two sources; options that the family does not have.
    """
    pretrained = arguments.pretrained_model_name_or_path
    if (pretrained is None) == (arguments.model_config is None):
        raise ValueError(
            "Say where the autoencoder comes from with exactly one of --pretrained_model_name_or_path (fine-tune) and "
            "--model_config (train from scratch)."
        )
    padding: dict[str, Any] = {"padding_mode": arguments.padding_mode} if arguments.padding_mode else {}
    family = AutoencoderKLAligned if aligned else AutoencoderKLEQ
    if pretrained is not None:
        vae = _load_pretrained(pretrained, arguments, family, padding)
    else:
        vae = family.from_config(read_model_config(str(arguments.model_config), family), **padding)
    if gradient_checkpointing:
        _enable_gradient_checkpointing(vae)
    if arguments.channels_last:
        vae = vae.to(memory_format=torch.channels_last)
    return vae.train()


def _load_pretrained(
    name: str, arguments: AutoencoderArguments, family: type[AutoencoderKLEQ], padding: dict[str, Any]
) -> ModelMixin:
    location = autoencoder_location(name, subfolder=arguments.subfolder, revision=arguments.revision)
    saved_class = family.load_config(name, **location).get("_class_name")
    if saved_class == "AutoencoderKLAligned" and family is not AutoencoderKLAligned:
        logger.warning("%s was aligned with a teacher; without --regularizers alignment its network is dropped.", name)
    if saved_class in KL_CLASSES:
        return family.from_pretrained(name, torch_dtype=torch.float32, **location, **padding)
    if padding:
        raise ValueError(f"--padding_mode exists for AutoencoderKL; {name} is an {saved_class}. Leave it out.")
    return load_autoencoder(name, **location)


def _enable_gradient_checkpointing(vae: ModelMixin) -> None:
    # diffusers 0.42.1: AutoencoderTiny's checkpointed path skips the input and output scaling, a different function.
    if type(vae).__name__ == "AutoencoderTiny":
        raise ValueError(
            "Gradient checkpointing changes what diffusers' AutoencoderTiny computes, so it is refused; the model is "
            "small enough to train without --gradient_checkpointing."
        )
    vae.enable_gradient_checkpointing()


def load_images(
    data: DataArguments, evaluation: AutoencoderEvaluationArguments, downsampling_factor: int
) -> tuple[PixelDataset, Tensor]:
    """Training images, and the validation images (N, 3, S, S) in [-1, 1].

    Raises:
        ValueError: a resolution that the autoencoder's stride does not divide; see `load_image_dataset` for the rest.
    """
    validation_px = evaluation.validation_resolution or data.resolution
    for name, value in (("resolution", data.resolution), ("validation_resolution", validation_px)):
        require_fitting(value, downsampling_factor, name=f"--{name}")
    source = data.load()
    images = PixelDataset(
        source, resolution=data.resolution, random_crop=not data.center_crop, random_flip=data.random_flip
    )
    if evaluation.validation_data_dir:
        source = load_image_dataset(train_data_dir=evaluation.validation_data_dir, cache_dir=data.cache_dir)
    chosen = PixelDataset(source, resolution=validation_px)
    count = min(evaluation.num_validation_images, len(chosen))
    return images, torch.stack([chosen[index]["pixel_values"] for index in range(count)])


def build_regularizers(arguments: RegularizerArguments, vae: nn.Module) -> dict[str, Regularizer]:
    """The regularizers named in `arguments.regularizers` ("none" for an empty list), in that order.

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
    for name in REGULARIZERS.keys() - set(names):
        warn_without_effect(arguments, arguments.of(name), f"--regularizers leaves out {name}")
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


def build_perceptual(arguments: AutoencoderLossArguments, *, smallest_px: int) -> LPIPS | None:
    """LPIPS, or None where its weight is 0.

    Args:
        smallest_px: shortest side of the smallest image that it will see (tau's smallest scale).

    Raises:
        ValueError: that side is below what the network's strides need.
    """
    if not arguments.perceptual_weight:
        own = ("perceptual_net", "lpips_backbone_weights", "lpips_linear_weights")
        warn_without_effect(arguments, own, "--perceptual_weight is 0")
        return None
    perceptual = LPIPS.from_pretrained(
        arguments.perceptual_net,
        backbone_weights=arguments.lpips_backbone_weights,
        linear_weights=arguments.lpips_linear_weights,
    )
    _check_smallest("LPIPS", perceptual.min_size_px, smallest_px, "choose another --perceptual_net")
    return perceptual


def build_discriminator(arguments: AutoencoderLossArguments, *, smallest_px: int) -> PatchDiscriminator | None:
    """The PatchGAN discriminator, or None where its weight is 0.

    Args:
        smallest_px: shortest side of the smallest image that it will see (tau's smallest scale).

    Raises:
        ValueError: that side is below what the discriminator's strides need.
    """
    if not arguments.disc_weight:
        own = [name for name in vars(arguments) if name.startswith("disc_") and name != "disc_weight"]
        warn_without_effect(arguments, own, "--disc_weight is 0")
        return None
    if arguments.disc_pretrained:
        own = ["disc_channels", "disc_num_layers", "disc_norm"]
        warn_without_effect(arguments, own, "--disc_pretrained has its own")
        discriminator = PatchDiscriminator.from_pretrained(arguments.disc_pretrained).train()
    else:
        discriminator = PatchDiscriminator(
            base_channels=arguments.disc_channels, num_layers=arguments.disc_num_layers, norm=arguments.disc_norm
        )
    _check_smallest("The discriminator", discriminator.min_size_px, smallest_px, "lower --disc_num_layers")
    return discriminator


def _check_smallest(who: str, needed_px: int, smallest_px: int, remedy: str) -> None:
    if smallest_px < needed_px:
        raise ValueError(
            f"{who} needs images of at least {needed_px} px, but tau's smallest image has {smallest_px} px; raise "
            f"--resolution, {remedy}, or give the term weight 0."
        )


def smallest_image_px(arguments: RegularizerArguments, vae: nn.Module, resolution: int) -> int:
    """Shortest side of the smallest image tau can produce: a quarter of the latent side, in pixels.

    Raises:
        ValueError: latents of a single cell, which tau cannot shrink.
    """
    if "equivariance" not in arguments.regularizers or arguments.tau_scale == "none":
        return resolution
    factor = downsampling_factor(vae)
    if resolution < 2 * factor:
        raise ValueError(
            f"tau's scale needs latents of at least 2 cells a side, and --resolution {resolution} gives 1 at stride "
            f"{factor}; use --resolution {2 * factor} or more, or --tau_scale none."
        )
    return max(resolution // factor // 4, 1) * factor
