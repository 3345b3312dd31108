"""What transformer training is made of, from its arguments: latents, the transformer, the finished pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...autoencoders import downsampling_factor, is_pipeline, latent_channels, load_autoencoder, require_fitting
from ...data.image_datasets import PixelDataset
from ...data.latent_data import LatentData
from ...data.latent_store import LatentStore
from ...models.transformer_sit import SIT_PRESETS, SiTTransformer2DModel
from ...pipelines.pipeline_class_conditional import ClassConditionalPipeline
from ...provenance import autoencoder_identity, require_same_autoencoder
from ...schedulers.scheduling_flow_match_ode import FlowMatchODEScheduler
from ..arguments import DataArguments, read_model_config, warn_without_effect
from .arguments import FLOW_PRESETS, SamplingArguments, TransformerArguments


def load_latents(arguments: TransformerArguments, data: DataArguments) -> LatentData:
    """The store of --latents_dir, or the images of --train_data_dir / --dataset_name with --vae.

    Raises:
        ValueError: both or neither; a store of another autoencoder; no labels; another number of classes than
            --num_classes; a resolution that the autoencoder does not divide.
    """
    images_given = bool(data.dataset_name or data.train_data_dir)
    if images_given == bool(arguments.latents_dir):
        raise ValueError("Give either --latents_dir, or --vae with --train_data_dir or --dataset_name.")
    if images_given:
        warn_without_effect(data, ["center_crop"], "generators are trained on centre crops always")
        latents = _from_images(arguments, data)
    else:
        warn_without_effect(data, vars(data), "--latents_dir fixes the images")
        latents = _from_store(arguments)
    if arguments.num_classes not in (None, latents.num_classes):
        raise ValueError(
            f"The data have {latents.num_classes} classes, but --num_classes says {arguments.num_classes}; "
            "leave it out, or train on the data it was meant for."
        )
    return latents


def _from_store(arguments: TransformerArguments) -> LatentData:
    path = Path(str(arguments.latents_dir))
    store = LatentStore(path)
    if arguments.vae is None and not (path / "vae").is_dir():
        raise ValueError(f"The store {path} holds no vae/; say with --vae which autoencoder encoded it.")
    vae = load_autoencoder(arguments.vae or str(path / "vae"))
    store = LatentStore(path, vae=vae)
    if not store.settings.labelled:
        raise ValueError(f"The store {path} has no labels; encode a dataset with labels (--label_column).")
    return LatentData(store, vae, store.num_classes, store.id2label, store.latent_shape, name=None)


def _from_images(arguments: TransformerArguments, data: DataArguments) -> LatentData:
    if arguments.vae is None:
        raise ValueError("Training from images needs --vae, the autoencoder that encodes them.")
    vae = load_autoencoder(arguments.vae)
    factor = downsampling_factor(vae)
    require_fitting(data.resolution, factor, name="--resolution")
    source = data.load(require_labels=True)
    dataset = PixelDataset(source, resolution=data.resolution, random_flip=data.random_flip)
    shape = (latent_channels(vae), data.resolution // factor, data.resolution // factor)
    return LatentData(dataset, vae, len(source.id2label), source.id2label, shape, name=data.name)


def build_transformer(
    arguments: TransformerArguments, latents: LatentData, *, gradient_checkpointing: bool = False
) -> SiTTransformer2DModel:
    """The transformer to train, in float32, whose config says which latents it belongs to.

    Raises:
        ValueError: an unknown preset, one of another objective, or a saved model for other latents or classes.
    """
    channels, height, width = latents.latent_shape
    fitting = {
        "sample_size": height if height == width else [height, width],
        "in_channels": channels,
        "num_classes": latents.num_classes,
    }
    identity = autoencoder_identity(latents.vae)
    options = {"class_dropout_prob": arguments.class_dropout_prob, "qk_norm": arguments.qk_norm}
    path = Path(arguments.model)
    if path.is_dir() and is_pipeline(arguments.model):
        path = path / "transformer"
    if path.is_dir():
        warn_without_effect(arguments, options, f"the saved model {path} has its own")
        kind = SiTTransformer2DModel.load_config(path)["_class_name"]
        if kind != SiTTransformer2DModel.__name__:
            raise ValueError(f"--model {path} holds an {kind}; a {SiTTransformer2DModel.__name__} is trained here.")
        model = SiTTransformer2DModel.from_pretrained(path, torch_dtype=torch.float32)
        _refuse_mismatch(path, dict(model.config), fitting)
        require_same_autoencoder(model.config.autoencoder, identity, whose=f"the model {path}")
        model.register_to_config(autoencoder=identity)
    elif path.is_file():
        config = read_model_config(path, SiTTransformer2DModel)
        _refuse_mismatch(path, config, fitting)
        model = SiTTransformer2DModel(**{**options, **config, **fitting, "autoencoder": identity})
    elif arguments.model in SIT_PRESETS and arguments.model not in FLOW_PRESETS:
        raise ValueError(
            f"{arguments.model} predicts noise, which --objective flow does not train; "
            f"use {arguments.model.replace('DiT', 'SiT')}."
        )
    else:
        model = SiTTransformer2DModel.from_preset(arguments.model, **options, **fitting, autoencoder=identity)
    if gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model.train()


def check_guidance(model: SiTTransformer2DModel, sampling: SamplingArguments) -> None:
    """Raises ValueError where validation would guide a model that learns no null class."""
    if sampling.guidance_scale != 1.0 and model.config.class_dropout_prob == 0.0:
        raise ValueError(
            f"--guidance_scale {sampling.guidance_scale} needs a model that learns to do without labels, but its "
            "class_dropout_prob is 0; raise --class_dropout_prob, or use --guidance_scale 1."
        )


def _refuse_mismatch(path: Path, config: dict[str, Any], fitting: dict[str, Any]) -> None:
    for key, value in fitting.items():
        saved = config.get(key, value)
        saved = list(saved) if isinstance(saved, tuple) else saved
        if saved is not None and saved != value:
            raise ValueError(f"The model {path} has {key} = {saved}, but the latents have {value}: they do not fit.")


def build_pipeline(
    transformer: SiTTransformer2DModel, latents: LatentData, *, path: str = "linear"
) -> ClassConditionalPipeline:
    """The pipeline that samples what was trained, with an Euler solver of the path's ODE."""
    pipeline = ClassConditionalPipeline(
        transformer=transformer,
        vae=latents.vae,
        scheduler=FlowMatchODEScheduler(path=path),
        id2label=latents.id2label or None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
