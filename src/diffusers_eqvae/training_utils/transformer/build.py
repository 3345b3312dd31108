"""What transformer training is made of, from its arguments: latents, the transformer, the finished pipeline."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import diffusers_eqvae

from ...autoencoders import downsampling_factor, latent_channels, load_autoencoder, require_fitting
from ...classes import ClassTable, listed, parse_id2label
from ...data.image_datasets import PixelDataset
from ...data.latent_data import LatentData
from ...data.latent_store import LatentStore
from ...files import read_json
from ...images import require_channels
from ...models.alignment_network import AlignmentNetwork
from ...models.backbone import Backbone
from ...objectives.base import OBJECTIVES, Objective
from ...pipelines.labels import resolve_class_labels
from ...pipelines.pipeline_class_conditional import ClassConditionalPipeline
from ...pretrained import load_pretrained
from ...provenance import autoencoder_identity, require_same_autoencoder
from ...regularizers.base import build_regularizers
from ...tokens import codebook
from ..arguments import DataArguments, warn_without_effect
from ..lora import LORA, LoraArguments, add_adapters
from .arguments import SamplingArguments, TransformerArguments
from .model_source import ModelSource

logger = logging.getLogger(__name__)

SCALE_REMEDY = (
    "encode_latents.py --normalization channel measures them and writes an autoencoder that says so (vae/ of the "
    "store, for --vae); --normalization config keeps the config as it is."
)
STORED_AS = {"latents": "posteriors (encode_latents.py --kind posteriors)", "tokens": "tokens, by a VQ model"}


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
    if note := latents.classes.describe_empty():
        logger.warning("%s", note)
    if arguments.num_classes not in (None, len(latents.classes)):
        raise ValueError(
            f"The data have {len(latents.classes)} classes, but --num_classes says {arguments.num_classes}; "
            "leave it out, or train on the data it was meant for."
        )
    return latents


def _one_class(arguments: TransformerArguments, what: str, remedy: str, count: int) -> ClassTable:
    """Data without labels are one class, where that is asked for."""
    if arguments.num_classes != 1:
        raise ValueError(f"{what} no labels; {remedy}, or give --num_classes 1 for a model of one class, all images.")
    return ClassTable(("image",), (count,))


def _from_store(arguments: TransformerArguments) -> LatentData:
    path = Path(str(arguments.latents_dir))
    store = LatentStore(path)
    if arguments.vae is None and not (path / "vae").is_dir():
        raise ValueError(f"The store {path} holds no vae/; say with --vae which autoencoder encoded it.")
    vae = load_autoencoder(arguments.vae or str(path / "vae"))
    store = LatentStore(path, vae=vae)
    remedy = "encode a dataset with labels (--label_column, or one folder per class)"
    if beside := store.manifest["report"].get("beside"):
        remedy += f"; {beside['count']} {beside['text']} ({listed(beside['examples'])})"
    classes = store.classes or _one_class(arguments, f"The store {path} has", remedy, len(store))
    name = store.settings.source.get("dataset")
    return LatentData(store, vae, classes, store.latent_shape, name=name, scale_remedy=SCALE_REMEDY)


def _from_images(arguments: TransformerArguments, data: DataArguments) -> LatentData:
    if arguments.vae is None:
        raise ValueError("Training from images needs --vae, the autoencoder that encodes them.")
    vae = load_autoencoder(arguments.vae)
    factor = downsampling_factor(vae)
    require_fitting(data.resolution, vae, name="--resolution")
    source = data.load(channels=require_channels(vae))
    remedy = "name their column by --label_column, or give each class its own folder"
    classes = source.classes or _one_class(arguments, f"The images of {data.name} have", remedy, len(source))
    dataset = PixelDataset(source, resolution=data.resolution, random_flip=data.random_flip)
    source_of_model = ModelSource.find(arguments.model, arguments.config_overrides, objective=arguments.objective)
    side, tokens = data.resolution // factor, OBJECTIVES[source_of_model.objective].reads == "tokens"
    if tokens:
        codebook(vae)  # refused without one
    shape = (side, side) if tokens else (latent_channels(vae), side, side)
    return LatentData(dataset, vae, classes, shape, name=data.name, scale_remedy=SCALE_REMEDY)


def build_objective(
    arguments: TransformerArguments,
    methods: Mapping[str, Any],
    latents: LatentData,
    *,
    lora: LoraArguments | None = None,
    gradient_checkpointing: bool = False,
) -> Objective:
    """The transformer to train, inside its objective with the regularizers that were chosen.

    Args:
        methods: the objective's and the regularizers' own arguments, by name.
        lora: of adapters, where those are trained.

    Raises:
        ValueError: model, objective and data that do not belong together.
    """
    source = ModelSource.find(arguments.model, arguments.config_overrides, objective=arguments.objective)
    name = source.objective
    kind: Any = OBJECTIVES[name]
    if kind.reads != latents.reads:
        raise ValueError(
            f"The objective {name} reads {kind.reads}, and these data are {latents.reads}; choose a --model of "
            f"another objective, or encode the images as {STORED_AS[kind.reads]}."
        )
    model = build_transformer(arguments, source, latents, gradient_checkpointing=gradient_checkpointing)
    _adapt(model, arguments, source, lora or LoraArguments())
    regularizers = build_regularizers(
        arguments.regularizers,
        methods,
        model,
        features=latents.features,
        pixels=not latents.stored,
        remedy=lambda lacking: _how_to_give(arguments, lacking),
    )
    pixels = any(each.reads_pixels for each in regularizers.values())
    latents.want((name for each in regularizers.values() for name in each.features), pixels=pixels)
    objective: Objective = kind.from_arguments(methods.get(name), model, regularizers)
    _refuse_other_path(Path(arguments.model), objective)
    return objective


def _how_to_give(arguments: TransformerArguments, features: Sequence[str]) -> str:
    """The remedy for data without what a regularizer reads."""
    images = "train on images (--vae with --train_data_dir or --dataset_name)"
    if not features or arguments.latents_dir is None:
        return images
    given = f"--features {' '.join(features)}"
    return (
        f"add them by the command that encoded the store (encode_latents.py --output_dir {arguments.latents_dir} ...) "
        f"with {given}, where a vision model is named by its Hub name or directory, or {images}"
    )


def _refuse_other_path(pipeline: Path, objective: Objective) -> None:
    """A pipeline's scheduler says along which path from noise to data its weights were trained."""
    file = pipeline / "scheduler" / "scheduler_config.json"
    trained = read_json(file).get("path") if file.is_file() else None
    path = getattr(getattr(objective.scheduler(), "config", None), "path", None)
    if trained not in (None, path):
        raise ValueError(
            f"The pipeline {pipeline} was trained on the {trained} path, and this run would go on with {path}; give "
            f"--flow_path {trained}, or name {pipeline / 'transformer'} to change the path on purpose."
        )


def build_transformer(
    arguments: TransformerArguments, source: ModelSource, latents: LatentData, *, gradient_checkpointing: bool = False
) -> Backbone:
    """The transformer to train, in float32, whose config says which latents it belongs to.

    Raises:
        ValueError: a saved model for other latents or classes, or an override that its class does not take.
    """
    fitting = {**latents.model_config, "num_classes": len(latents.classes)}
    identity = autoencoder_identity(latents.vae)
    free = ("num_classes",) if arguments.new_classes else ()
    _refuse_mismatch(arguments.model, source.config, {key: fitting[key] for key in fitting if key not in free})
    if source.directory is not None:
        warn_without_effect(arguments, ["class_dropout_prob"], f"the saved model {source.directory} has its own")
        model = load_pretrained(source.cls.from_pretrained, source.directory, "a transformer", dtype=torch.float32)
        require_same_autoencoder(model.config.autoencoder, identity, whose=f"the model {source.directory}")
        model = _with_classes_of(latents, model, source.directory, new=arguments.new_classes)
    else:
        if arguments.new_classes:
            raise ValueError(f"--new_classes goes on from a saved model, and {arguments.model} is a new one.")
        dropout = arguments.class_dropout_prob
        given = source.config | ({} if dropout is None else {"class_dropout_prob": dropout})
        model = source.cls(**given | fitting)
    classes = latents.classes
    if source.directory is not None and model.class_table is not None:  # which may know further names
        classes = replace(classes, names=model.class_table.names)
    model.register_to_config(autoencoder=identity, **classes.to_config())
    _checkpoint_gradients(model, gradient_checkpointing, every=arguments.gradient_checkpointing_every)
    return model.train()


def _adapt(model: Backbone, arguments: TransformerArguments, source: ModelSource, lora: LoraArguments) -> None:
    """Adapters, where they are asked for."""
    if arguments.trainable != LORA:
        warn_without_effect(lora, vars(lora), f"--trainable is {arguments.trainable}")
        return
    if source.directory is None or arguments.new_classes:
        reason = f"{arguments.model} is a new one" if source.directory is None else "--new_classes starts labels anew"
        raise ValueError(
            f"--trainable lora changes what a saved model has learned, and {reason}, which adapters leave as it is; "
            "name a saved model with the classes of the data, or leave lora out."
        )
    add_adapters(model, lora)


def _checkpoint_gradients(model: Backbone, wanted: bool, *, every: int) -> None:
    if not wanted and every > 1:
        raise ValueError(f"--gradient_checkpointing_every {every} acts with --gradient_checkpointing; give both.")
    if every > model.num_layers:
        raise ValueError(
            f"--gradient_checkpointing_every {every} recomputes none of the {model.num_layers} blocks; give at most "
            f"{model.num_layers}, or leave --gradient_checkpointing out."
        )
    if wanted:
        model.enable_gradient_checkpointing()
        model.gradient_checkpointing_every = every


def _with_classes_of(latents: LatentData, model: Backbone, directory: Path, *, new: bool) -> Backbone:
    """A saved model on the data's classes: the same by name and id, or with a label table of its own."""
    classes, saved = latents.classes, model.class_table
    if new:
        kept = [classes.names[each] for each in classes.rows_from(saved)]
        others = [name for name in classes.names if name not in kept]
        logger.warning(
            "Every weight of %s is kept but its label table: %d of %d classes keep their embedding by name%s, %d "
            "start anew%s.",
            directory,
            len(kept),
            len(classes),
            f" ({listed(kept)})" if kept else "",
            len(others),
            f" ({listed(others)})" if others else "",
        )
        return model.with_classes(classes).train()
    if saved is None:
        logger.warning(
            "%s does not say what its classes are called; its embeddings 0..%d are taken to be %s.",
            directory,
            len(classes) - 1,
            listed(classes.names),
        )
    else:
        remedy = (
            f"use data of the same classes; where they are the same under other names, let id2label of "
            f'{directory / "config.json"} give both, as "tench, n01440764"; or give --new_classes to keep embeddings '
            "by name and start the others anew"
        )
        saved.require_same(classes, whose=f"the model {directory}", remedy=remedy)
    return model


def check_sampling(model: Backbone, sampling: SamplingArguments) -> None:
    """Raises ValueError where validation would guide a model that learns no null class, or show classes it lacks."""
    if sampling.validation_labels:
        names = parse_id2label(model.config.id2label)
        resolve_class_labels(sampling.validation_labels, model.config.num_classes, id2label=names)
    if sampling.guidance_scale != 1.0 and model.config.class_dropout_prob == 0.0:
        raise ValueError(
            f"--guidance_scale {sampling.guidance_scale} needs a model that learns to do without labels, but its "
            "class_dropout_prob is 0; raise --class_dropout_prob, or use --guidance_scale 1."
        )


def _refuse_mismatch(path: str, config: dict[str, Any], fitting: dict[str, Any]) -> None:
    for key, value in fitting.items():
        saved = config.get(key, value)
        saved = list(saved) if isinstance(saved, tuple) else saved
        saved = saved[0] if isinstance(saved, list) and len(set(saved)) == 1 else saved  # [32, 32] is 32
        if saved is not None and saved != value:
            remedy = " Give --new_classes to keep all but the label table." if key == "num_classes" else ""
            raise ValueError(
                f"The model {path} has {key} = {saved}, but the latents have {value}: they do not fit.{remedy}"
            )


def build_pipeline(objective: Objective, latents: LatentData, sampling: SamplingArguments) -> ClassConditionalPipeline:
    """The pipeline that samples what `objective` trains, and can be sampled as asked for."""
    kind: Any = getattr(diffusers_eqvae, objective.pipeline)
    pipeline = kind(
        transformer=objective.model,
        vae=latents.vae,
        scheduler=objective.scheduler(),
        alignment_network=AlignmentNetwork.beside(latents.vae),
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.check_inputs(
        sampling.num_validation_images,
        guidance_scale=sampling.guidance_scale,
        num_inference_steps=sampling.num_inference_steps,
        generator=None,
        output_type="pil",
    )
    return pipeline
