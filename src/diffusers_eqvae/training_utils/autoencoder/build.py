"""The networks that autoencoder training is made of, from its arguments."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from ...autoencoders import (
    autoencoder_location,
    channels_last,
    downsampling_factor,
    image_channels,
    load_autoencoder,
    require_fitting,
    takes_any_size,
)
from ...conversion._discriminator import read_taming_discriminator
from ...data.buckets import Buckets
from ...data.image_datasets import ImageSource, PixelDataset, load_image_dataset
from ...data.image_streams import ImageStream, PixelStream
from ...data.latent_store import LatentStore
from ...data.stored_images import StoredImages
from ...files import read_json
from ...images import require_channels
from ...losses.perceptual import LPIPS, require_seen_by_lpips
from ...models.autoencoder_kl_eq import AutoencoderKLEQ, as_class
from ...models.autoencoder_vq_eq import VQModelEQ
from ...models.discriminator import PatchDiscriminator
from ...models.feature_teacher import FeatureTeacher
from ...objectives._adversarial import ScoreMeans
from ...objectives.autoencoder import AutoencoderLossWeights, AutoencoderObjective
from ...pretrained import looking_for
from ...regularizers.base import Regularizer, build_regularizers, require_reach
from ..arguments import warn_without_effect
from ..command_line import read_model_config
from ..console import progress_bar
from ..lora import LORA
from .arguments import AutoencoderArguments, AutoencoderLossArguments, AutoencoderOptions
from .channels import refuse_unlearned_channels, with_latent_channels
from .trainable import freeze_all_but, keeps_latents, refuse_other_latents

logger = logging.getLogger(__name__)

# What a saved class is trained as; its own name, and that of diffusers' class under it.
TRAINED_AS = {name: cls for cls in (AutoencoderKLEQ, VQModelEQ) for name in (cls.__name__, cls.__base__.__name__)}


def build_autoencoder(arguments: AutoencoderArguments, *, gradient_checkpointing: bool = False) -> ModelMixin:
    """The autoencoder to train, in float32: fine-tuned from a checkpoint, or new from a JSON of init arguments.

    An `AutoencoderKL` becomes an `AutoencoderKLEQ` and a `VQModel` a `VQModelEQ`, which load as the plain classes.

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
    if pretrained is not None:
        vae = _load_pretrained(pretrained, arguments, padding)
    else:
        if arguments.latent_channels is not None:
            raise ValueError("--latent_channels adds to a pretrained autoencoder's; write them into --model_config.")
        kind = _class_of_config(str(arguments.model_config))
        vae = kind.from_config(read_model_config(str(arguments.model_config), kind), **padding)
    if gradient_checkpointing:
        _enable_gradient_checkpointing(vae)
    if arguments.channels_last:
        vae = channels_last(vae)
    return vae.train()


def _load_pretrained(name: str, arguments: AutoencoderArguments, padding: dict[str, Any]) -> ModelMixin:
    location = autoencoder_location(name, subfolder=arguments.subfolder, revision=arguments.revision)
    vae = load_autoencoder(name, **location)
    kind = TRAINED_AS.get(type(vae).__name__)
    if padding and kind is None:
        known = " and ".join(cls.__base__.__name__ for cls in dict.fromkeys(TRAINED_AS.values()))
        raise ValueError(f"--padding_mode exists for {known}; {name} is an {type(vae).__name__}. Leave it out.")
    if kind is not None and (padding or type(vae) is not kind):
        vae = as_class(kind, vae, **padding)
    if arguments.latent_channels is not None:
        return with_latent_channels(vae, arguments.latent_channels)
    vae.location = location  # where regularizers find the networks that were saved beside it
    return vae


def _class_of_config(path: str) -> Any:
    """The class that a JSON of init arguments says, AutoencoderKLEQ where it says none."""
    content = read_json(path) if Path(path).is_file() else {}
    name = content.get("_class_name", "AutoencoderKLEQ")
    if name not in TRAINED_AS:
        raise ValueError(f"{path} says the class {name!r}; a new autoencoder is one of {', '.join(TRAINED_AS)}.")
    return TRAINED_AS[name]


def _enable_gradient_checkpointing(vae: ModelMixin) -> None:
    # diffusers 0.42.1: AutoencoderTiny's checkpointed path skips the input and output scaling, a different function.
    if type(vae).__name__ == "AutoencoderTiny":
        raise ValueError(
            "Gradient checkpointing changes what diffusers' AutoencoderTiny computes, so it is refused; the model is "
            "small enough to train without --gradient_checkpointing."
        )
    vae.enable_gradient_checkpointing()


def load_images(
    given: AutoencoderOptions, objective: AutoencoderObjective, global_batch_size: int
) -> tuple[PixelDataset | PixelStream, Tensor]:
    """Training images with the stored features that regularizers read, and the validation images (N, C, S, S).

    Args:
        global_batch_size: images per optimizer step, which are of one shape.

    Raises:
        ValueError: a resolution that the autoencoder's stride does not divide; see `load_image_dataset` for the rest.
    """
    data, evaluation = given.data, given.evaluation
    validation_px = evaluation.validation_resolution or data.resolution
    for name, value in (("resolution", data.resolution), ("validation_resolution", validation_px)):
        require_fitting(value, objective.model, name=f"--{name}")
    channels = require_channels(objective.model)
    crops = {"random_crop": not data.center_crop, "random_flip": data.random_flip}
    images: PixelDataset | PixelStream
    if data.streaming:
        stream = _stream(given, channels)
        images = PixelStream(stream, resolution=data.resolution, block_size=data.shuffle_buffer_size, **crops)
    else:
        source = data.load(channels=channels)
        store = LatentStore(given.regularizing.features_dir) if given.regularizing.features_dir else None
        if store is not None:
            store.read_features(*(name for each in objective.regularizers.values() for name in each.features))
        buckets = None if data.aspect_buckets is None else _buckets(given, objective, source, global_batch_size)
        images = PixelDataset(source, resolution=data.resolution, features=store, buckets=buckets, **crops)
    if evaluation.validation_data_dir:
        source = load_image_dataset(
            train_data_dir=evaluation.validation_data_dir, cache_dir=data.cache_dir, channels=channels
        )
        chosen: PixelDataset | PixelStream = PixelDataset(source, resolution=validation_px)
    else:
        chosen = type(images)(images.source, resolution=validation_px)  # type: ignore[arg-type]
    return images, torch.stack(list(chosen.first(evaluation.num_validation_images)))


def _stream(given: AutoencoderOptions, channels: int) -> ImageStream:
    """That of --streaming, which has no images that stand beside the rows of a store."""
    stores = {"--latents_dir": given.model.latents_dir, "--features_dir": given.regularizing.features_dir}
    for flag in (name for name, value in stores.items() if value):
        raise ValueError(
            f"{flag} holds what belongs to images by their number, which those of --streaming have not; leave one of "
            "them out."
        )
    if given.run.max_train_steps is None:
        raise ValueError("--streaming does not say how many images an epoch has; give --max_train_steps.")
    return given.data.stream(channels=channels)


def _buckets(
    given: AutoencoderOptions, objective: AutoencoderObjective, source: ImageSource, global_batch_size: int
) -> Buckets:
    """Those of --aspect_buckets; in a dry run the largest alone."""
    vae, data = objective.model, given.data
    if not takes_any_size(vae):
        raise ValueError(
            f"--aspect_buckets gives images of several sizes, and {type(vae).__name__} takes one; leave it out."
        )
    source.check(
        len(source),
        partial(progress_bar, desc="sizes of images", unit="image", disable=not logger.isEnabledFor(logging.INFO)),
    )
    buckets = Buckets.fit(
        source.sizes,
        len(source),
        resolution=data.resolution,
        stride=downsampling_factor(vae),
        most=data.aspect_buckets or 0,
        batch_size=global_batch_size,
    )
    logger.info("Shapes of at least a global batch of %d images: %s.", global_batch_size, buckets)
    return buckets.largest() if given.run.dry_run else buckets


def training_data(
    given: AutoencoderOptions, images: PixelDataset | PixelStream, objective: AutoencoderObjective
) -> PixelDataset | PixelStream | StoredImages:
    """The images, or the latents of --latents_dir with them.

    Raises:
        ValueError: an encoder that is trained; a store of another autoencoder, of other images, or of other crops.
    """
    if given.model.latents_dir is None or isinstance(images, PixelStream):
        return images
    if not keeps_latents(objective.model):
        raise ValueError(
            "--latents_dir holds latents of an encoder that stays as it is; give --trainable decoder, or leave it out."
        )
    data, store = given.data, LatentStore(given.model.latents_dir, vae=objective.model)
    if (data.resolution, data.center_crop) != (store.settings.resolution, True):
        raise ValueError(
            f"The store {store.path} holds centre crops of {store.settings.resolution} px; add --center_crop "
            f"--resolution {store.settings.resolution}, so that images are cropped alike."
        )
    return StoredImages(store, images.source, random_flip=data.random_flip)


def build_objective(given: AutoencoderOptions) -> AutoencoderObjective:
    """The autoencoder to train, inside its objective with the regularizers that were chosen."""
    arguments, regularizing, methods = given.model, given.regularizing, given.methods
    vae = build_autoencoder(arguments, gradient_checkpointing=given.run.gradient_checkpointing)
    if LORA not in arguments.trainable:
        warn_without_effect(given.lora, vars(given.lora), f"--trainable is {' '.join(arguments.trainable)}")
    elif arguments.pretrained_model_name_or_path is None:
        raise ValueError(
            "--trainable lora changes what an autoencoder has learned, and one from --model_config has learned "
            "nothing; give --pretrained_model_name_or_path, or leave lora out."
        )
    freeze_all_but(vae, arguments.trainable, given.lora)
    if arguments.latent_channels is not None:
        refuse_unlearned_channels(vae, arguments.trainable, normalization=given.evaluation.normalization)
    refuse_other_latents(
        vae,
        pretrained=arguments.pretrained_model_name_or_path is not None,
        asked={"padding_mode": arguments.padding_mode, "normalization": given.evaluation.normalization},
    )
    store = LatentStore(regularizing.features_dir) if regularizing.features_dir else None
    held = {} if store is None else store.settings.features
    regularizers = build_regularizers(regularizing.regularizers, methods, vae, features=held, pixels=True)
    if store is not None:
        _require_features(store, regularizers, methods)
    for name, regularizer in regularizers.items():
        require_reach(name, regularizer, vae)
        _require_seen(name, regularizer, image_channels(vae))
    objective = AutoencoderObjective(
        vae, regularizers, sample_posterior=arguments.sample_posterior, reduction=given.losses.reduction
    )
    if given.losses.disc_weight and given.losses.disc_lecam_weight:
        objective.scores = ScoreMeans()
    return objective


def _require_seen(name: str, regularizer: Regularizer, channels: int) -> None:
    """Refuses a teacher of RGB images beside images that are neither that nor grey, which it sees three times."""
    if channels not in (1, 3) and any(isinstance(each, FeatureTeacher) for each in regularizer.frozen_modules()):
        raise ValueError(
            f"The teacher of the regularizer {name} sees RGB or grey images, and these have {channels} channels; "
            "leave the regularizer out."
        )


def _require_features(store: LatentStore, regularizers: Mapping[str, Any], methods: Mapping[str, Any]) -> None:
    """Refuses a store of features that no regularizer reads, and one whose images a regularizer would change."""
    reading = {name: each.features_of(methods.get(name)) for name, each in regularizers.items()}
    if not any(each.features for each in regularizers.values()):
        wanted = "; ".join(f"{name} would read {', '.join(names)}" for name, names in reading.items() if names)
        held = ", ".join(store.settings.features) or "none"
        raise ValueError(
            f"--features_dir {store.path} holds the features {held}, and no regularizer reads them"
            f"{wanted and f' ({wanted})'}; add what is missing by encode_latents.py --features, or leave it out."
        )
    for name, each in regularizers.items():
        if changed := each.changed_images():
            raise ValueError(
                f"The regularizer {name} encodes {changed}, and --features_dir holds features of the images as they "
                "are; switch that off, or leave --features_dir out."
            )


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
        lecam=arguments.disc_lecam_weight,
        lecam_decay=arguments.disc_lecam_decay,
        r1=arguments.disc_r1_weight,
        augment=tuple(arguments.disc_augment),
    )


def build_perceptual(arguments: AutoencoderLossArguments, *, smallest_px: int, channels: int = 3) -> LPIPS | None:
    """LPIPS, or None where its weight is 0.

    Args:
        smallest_px: shortest side of the smallest image that it will see (see `smallest_image_px`).
        channels: of the images; a single one is shown to it three times.

    Raises:
        ValueError: that side is below what the network's strides need; images of other channels.
    """
    if not arguments.perceptual_weight:
        own = ("lpips_net", "lpips_backbone_weights", "lpips_linear_weights")
        warn_without_effect(arguments, own, "--perceptual_weight is 0")
        return None
    require_seen_by_lpips(channels, remedy="give --perceptual_weight 0")
    if channels == 1:
        logger.info("LPIPS sees the one channel of the images three times.")
    perceptual = LPIPS.from_pretrained(
        arguments.lpips_net,
        backbone_weights=arguments.lpips_backbone_weights,
        linear_weights=arguments.lpips_linear_weights,
    )
    _check_smallest("LPIPS", perceptual.min_size_px, smallest_px, "choose another --lpips_net")
    return perceptual


def build_discriminator(
    arguments: AutoencoderLossArguments, *, smallest_px: int, channels: int = 3, compiled: bool = False
) -> PatchDiscriminator | None:
    """The PatchGAN discriminator, or None where its weight is 0.

    Args:
        smallest_px: shortest side of the smallest image that it will see (see `smallest_image_px`).
        channels: of the images.
        compiled: whether it will be.

    Raises:
        ValueError: that side is below what the discriminator's strides need; R1 of a compiled one; other channels.
    """
    if not arguments.disc_weight:
        own = [name for name in vars(arguments) if name.startswith("disc_") and name != "disc_weight"]
        warn_without_effect(arguments, own, "--disc_weight is 0")
        return None
    if arguments.disc_r1_weight and compiled:
        raise ValueError(
            "--disc_r1_weight differentiates the discriminator twice, which torch.compile cannot; leave --compile "
            "out, or give --disc_r1_weight 0."
        )
    if arguments.disc_pretrained:
        own = ["disc_channels", "disc_num_layers", "disc_norm"]
        warn_without_effect(arguments, own, "--disc_pretrained has its own")
        discriminator = _load_discriminator(arguments.disc_pretrained).train()
        if (theirs := discriminator.config.in_channels) != channels:
            raise ValueError(
                f"--disc_pretrained {arguments.disc_pretrained} judges images of {theirs} channels, and these have "
                f"{channels}; leave it out."
            )
    else:
        discriminator = PatchDiscriminator(
            in_channels=channels,
            base_channels=arguments.disc_channels,
            num_layers=arguments.disc_num_layers,
            norm=arguments.disc_norm,
        )
    if not arguments.disc_lecam_weight:
        warn_without_effect(arguments, ["disc_lecam_decay"], "--disc_lecam_weight is 0")
    _check_smallest("The discriminator", discriminator.min_size_px, smallest_px, "lower --disc_num_layers")
    return discriminator


def _load_discriminator(directory: str) -> PatchDiscriminator:
    if Path(directory).is_file():
        return read_taming_discriminator(directory)
    config = Path(directory) / "config.json"
    if not config.is_file():
        raise ValueError(f"--disc_pretrained {directory} does not hold a saved discriminator: there is no {config}.")
    name = read_json(config, needs={"_class_name": str})["_class_name"]
    if name != PatchDiscriminator.__name__:
        raise ValueError(
            f"--disc_pretrained {directory} is an {name}, not a {PatchDiscriminator.__name__}; name the "
            "discriminator/ of a run."
        )
    with looking_for(directory, "a discriminator"):
        return PatchDiscriminator.from_pretrained(directory)


def _check_smallest(who: str, needed_px: int, smallest_px: int, remedy: str) -> None:
    if smallest_px < needed_px:
        raise ValueError(
            f"{who} needs images of at least {needed_px} px, but the smallest here has {smallest_px} px; raise "
            f"--resolution, {remedy}, or give the term weight 0."
        )


def smallest_image_px(objective: AutoencoderObjective, shortest_px: int) -> int:
    """Shortest side of the smallest image that a regularizer makes of one whose shorter side is `shortest_px`.

    Raises:
        ValueError: latents of a single position, which no regularizer can shrink.
    """
    scale = min((regularizer.smallest_scale() for regularizer in objective.regularizers.values()), default=1.0)
    if scale == 1.0:
        return shortest_px
    factor = downsampling_factor(objective.model)
    side = shortest_px // factor
    if side < 2:
        raise ValueError(
            f"A regularizer that scales latents needs at least 2 positions a side, and {shortest_px} px give 1 at "
            f"stride {factor}; use --resolution {2 * factor} or more ({3 * factor} with --aspect_buckets), or leave "
            "scaling out."
        )
    require_fitting(shortest_px, objective.model, name="--resolution", smallest=2 * factor)
    return max(int(side * scale), 1) * factor
