r"""Encodes a data set once into a store of posteriors, or of tokens, that train_transformer.py reads.

    eqvae encode-latents --vae runs/eq-vae --train_data_dir IMAGES \
        --resolution 256 --dtype bf16 --flip --output_dir latents/images

The finished directory holds the shards, manifest.json, mean_std.json and vae/ (the autoencoder with the measured
normalisation in its config): everything that training and a pipeline need. It does not depend on the number of
processes. An interrupted run continues where it stopped when started again with the same flags. --features stores
what a regularizer reads of the images (vae_encoder, or a vision model) beside the latents, also in a store that is
finished.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from diffusers_eqvae.autoencoders import channels_last, load_autoencoder
from diffusers_eqvae.data.encoding import (
    check_disk,
    describe_features,
    encode_shards,
    store_settings,
    verification_image,
    verify_store,
)
from diffusers_eqvae.data.image_datasets import ImageSource
from diffusers_eqvae.data.image_features import feature_networks
from diffusers_eqvae.data.latent_format import MANIFEST, StoreSettings
from diffusers_eqvae.data.latent_store import LatentStore
from diffusers_eqvae.data.latent_writer import LatentStoreWriter
from diffusers_eqvae.files import read_json, share
from diffusers_eqvae.images import require_channels
from diffusers_eqvae.latents import LatentNormalization
from diffusers_eqvae.models.alignment_network import ALIGNMENT_FOLDER, AlignmentNetwork
from diffusers_eqvae.options import Checked, inputs_of
from diffusers_eqvae.provenance import autoencoder_identity, require_same_data
from diffusers_eqvae.stated_normalization import scale_complaint
from diffusers_eqvae.tokens import describe_usage, has_codebook
from diffusers_eqvae.training_utils.arguments import DTYPES, DataArguments, warn_without_effect
from diffusers_eqvae.training_utils.command_line import parse
from diffusers_eqvae.training_utils.console import progress_bar, start_logging
from diffusers_eqvae.training_utils.launch import build_state, claim, run_script, runs_on_cpu

logger = logging.getLogger("encode_latents")


@dataclass
class ImageArguments(DataArguments):
    """Which images to encode; a store always holds the centre crop, and the mirror image with --flip."""

    center_crop: bool = field(init=False, default=True)
    random_flip: bool = field(init=False, default=False)


@dataclass
class EncodeArguments(Checked):
    """What to encode with, and what the store looks like."""

    vae: str = field(
        metadata={"reads": True, "help": "Autoencoder or pipeline: a directory or Hub name in diffusers layout."}
    )
    output_dir: str = field(metadata={"help": "Directory of the store."})
    batch_size: int = field(default=32, metadata={"help": "Images per forward of the encoder.", "range": "(0, inf)"})
    kind: Literal["posteriors", "tokens"] | None = field(
        default=None,
        metadata={
            "help": "What is stored: posteriors (latents before a codebook), or the tokens of a VQ model's codebook; "
            "unset, tokens where the autoencoder has a codebook."
        },
    )
    dtype: Literal["bf16", "fp16", "fp32"] = field(default="bf16", metadata={"help": "Number format on disk."})
    mixed_precision: Literal["no", "bf16"] = field(
        default="no", metadata={"help": "How the encoder computes: no is float32, bf16 is autocast (faster on a GPU)."}
    )
    flip: bool = field(default=False, metadata={"help": "Also store the mirrored image; training draws either."})
    features: list[str] = field(
        default_factory=list,
        metadata={
            "reads": True,
            "help": "Features stored beside the latents, for regularizers: vae_encoder (vae_repa), and teachers "
            "(repa, alignment): vision models, Hub names or directories, or NAME[=WEIGHTS] of a feature "
            "network that has a feature map. A store that lacks them gets them from the same command.",
        },
    )
    features_grid: int | None = field(
        default=None,
        metadata={
            "help": "Cells along a side that features stand for; unset, one for 2 x 2 latent positions, the patches "
            "of SiT-B/2. alignment reads one for each position.",
            "range": "(0, inf)",
        },
    )
    features_dtype: Literal["bf16", "fp16", "fp32"] = field(
        default="fp16", metadata={"help": "Number format of features on disk."}
    )
    features_before_norm: bool = field(
        default=False,
        metadata={
            "help": "Features of vision models before their last LayerNorm, and the global ones with them, as "
            "alignment reads them; without it, after it, as repa does."
        },
    )
    shard_size: int = field(
        default=4096, metadata={"help": "Images per file; what a restart may lose.", "range": "(0, inf)"}
    )
    normalization: Literal["channel", "scalar", "config"] = field(
        default="channel",
        metadata={
            "help": "What vae/ says about normalisation: measured mean and std per channel, one for all channels "
            "(as shift_factor and scaling_factor), or what the autoencoder's config says already."
        },
    )
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "Processes that decode images, per rank.", "range": "[0, inf)"}
    )
    cpu_threads: int = field(
        default=1,
        metadata={
            "help": "Of the encoder on a CPU; the last bits of its output depend on their number.",
            "range": "(0, inf)",
        },
    )
    verify: bool = field(
        default=False,
        metadata={
            "help": "Read all images and the whole store against their digests, encode a few rows again, and decode "
            "them beside the images into verify.png."
        },
    )
    break_lock: bool = field(
        default=False, metadata={"help": "Take output_dir from another program, which must not run any more."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Say how large the store will be, and exit."})


def main(argv: list[str] | None = None) -> None:
    arguments, data = parse(EncodeArguments, ImageArguments, argv=argv, description=__doc__, script=__file__)
    start_logging(logging.WARNING)
    output_dir = Path(arguments.output_dir)
    state = build_state()
    vae = load_autoencoder(arguments.vae).requires_grad_(False)
    with state.main_process_first():
        source = data.load(channels=require_channels(vae))
    networks = networks_of(arguments, data, vae)
    settings = settings_of(arguments, data, vae, source, networks=networks)
    plan = f"{len(source)} images, {settings.num_shards} shard(s), {settings.bytes(len(source)) / 1e9:.3f} GB in all"
    plan = "\n".join([*describe_features(settings), plan])
    content = source.full_identity()["everything"] if arguments.verify else None
    refuse_other_images(output_dir, content)
    if source.labels is None:
        state.print("No labels: the store is good for statistics, not for train_transformer.py.")
        state.print("(Except as one class of all images: --num_classes 1.)")
    writer = LatentStoreWriter(output_dir, settings, inputs=inputs_of(arguments, data))
    if arguments.dry_run:
        state.print(f"{plan}; {check_disk(output_dir, settings.bytes(len(source)))}")
        return

    missing = sum(len(settings.examples(shard)) for shard in writer.pending()[0])
    state.print(f"{plan}; {check_disk(output_dir, settings.bytes(missing)) if missing else 'all encoded before'}")
    shards, complaints = writer.pending(state.process_index, state.num_processes)
    for complaint in complaints:
        logger.warning("Encoding a shard again: %s", complaint)
    with state.main_process_first():
        claim(writer.output, *writer.names, lock=state.is_main_process, break_lock=arguments.break_lock)
    total = sum(len(settings.examples(shard)) for shard in shards)
    if runs_on_cpu():
        torch.set_num_threads(arguments.cpu_threads)  # torchrun and plain python start with different numbers
    channels_last(vae).to(state.device)
    networks.to(state.device)
    shown = bool(total and state.is_main_process)
    with progress_bar(total=total, unit="img", desc="encoding (this process)", disable=not shown) as bar:
        options = {"device": state.device, "num_workers": arguments.dataloader_num_workers}
        options |= {"networks": networks, "kept": writer.kept}
        for shard in encode_shards(vae, source, settings, shards, progress=bar.update, **options):
            writer.write_shard(**shard)
    state.wait_for_everyone()
    if state.is_main_process:
        vae.to("cpu", memory_format=torch.contiguous_format)
        finish(arguments, vae, source, writer, content=content, networks=networks.to("cpu"))
        state.print(f"The store is complete: {output_dir}")
        if settings.is_tokens:
            state.print(describe_usage(writer.token_counts()))
    state.destroy_process_group()


def networks_of(arguments: EncodeArguments, data: ImageArguments, vae: torch.nn.Module) -> torch.nn.ModuleList:
    if not arguments.features:
        own = ("features_grid", "features_dtype", "features_before_norm")
        warn_without_effect(arguments, own, "there are no --features")
    dtype, before_norm = DTYPES[arguments.features_dtype], arguments.features_before_norm
    options = {"grid": arguments.features_grid, "dtype": dtype, "before_norm": before_norm}
    networks = feature_networks(arguments.features, vae, resolution=data.resolution, **options)
    stored = [each.identity for network in networks for each in network.features.values()]
    if networks and all(each.get("final_norm") is None for each in stored):
        warn_without_effect(arguments, ["features_before_norm"], "no network of --features ends in a LayerNorm")
    return torch.nn.ModuleList(networks)


def settings_of(
    arguments: EncodeArguments,
    data: ImageArguments,
    vae: torch.nn.Module,
    source: ImageSource,
    *,
    networks: torch.nn.ModuleList,
) -> StoreSettings:
    tokens = has_codebook(vae) if arguments.kind is None else arguments.kind == "tokens"
    if tokens:
        warn_without_effect(arguments, ["dtype", "normalization"], "tokens are uint16 and have no normalisation")
    description = {"dataset": data.name, "config": data.dataset_config_name, "split": data.split}
    description |= {"image_column": data.image_column}
    description |= {"label_column": data.label_column if source.labels is not None else None}
    return store_settings(
        vae,
        source,
        resolution=data.resolution,
        description=description,
        tokens=tokens,
        dtype=DTYPES[arguments.dtype],
        views=2 if arguments.flip else 1,
        shard_size=arguments.shard_size,
        batch_size=arguments.batch_size,
        mixed_precision=arguments.mixed_precision,
        features={name: each for network in networks for name, each in network.features.items()},
    )


def refuse_other_images(output_dir: Path, content: str | None) -> None:
    """A finished store that knows every byte of its images is compared with what --verify has read of these."""
    known = read_json(output_dir / MANIFEST).get("content") if (output_dir / MANIFEST).is_file() else None
    remedy = "give another --output_dir, or delete the old store"
    require_same_data({"everything": known}, {"everything": content}, whose=f"the store {output_dir}", remedy=remedy)


def finish(
    arguments: EncodeArguments,
    vae: torch.nn.Module,
    source: ImageSource,
    writer: LatentStoreWriter,
    *,
    content: str | None,
    networks: torch.nn.ModuleList,
) -> None:
    """The normalisation from all shards into vae/ and mean_std.json, then the manifest, which completes the store."""
    normalization, measured_on = LatentNormalization.from_vae(vae), None
    if arguments.normalization != "config" and not writer.settings.is_tokens:
        scalar, measured_on = arguments.normalization == "scalar", writer.settings.num_examples
        normalization = LatentNormalization.from_statistics(writer.statistics(), scalar=scalar)
        normalization.apply_to(vae)
    elif not writer.settings.is_tokens and (complaint := scale_complaint(normalization, writer.statistics())):
        logger.warning("%s --normalization channel or scalar writes what is measured, config keeps this.", complaint)
    normalization.save_json(writer.path / "mean_std.json", num_samples=measured_on)
    vae.save_pretrained(writer.path / "vae")
    if network := AlignmentNetwork.beside(vae):
        network.save_pretrained(writer.path / "vae" / ALIGNMENT_FOLDER)
    share(writer.path / "vae")
    report = source.report.to_json()
    identity = autoencoder_identity(vae)
    manifest = writer.finish(autoencoder=identity, id2label=source.id2label, report=report, content=content)
    if manifest["skipped"]:
        logger.warning("%d unreadable images were replaced, see manifest.json", len(manifest["skipped"]))
    if arguments.verify:
        store = LatentStore(writer.path, vae=vae)
        verify_store(store, vae, source, networks=networks)
        verification_image(store, vae, source).save(writer.path / "verify.png")


if __name__ == "__main__":
    run_script(main)
