r"""Measures an autoencoder on exactly N centre-cropped images of a data set and writes a result card (JSON).

    eqvae evaluate-autoencoder --vae runs/eq-vae --data_dir IMAGES \
        --resolution 256 --num_images 5000 --output eq-vae.json
    eqvae evaluate-autoencoder --vae runs/eq-vae --data_dir IMAGES \
        --feature_networks inception --output eq-vae.json

PSNR, SSIM, LPIPS (where its weights are given), rFID (where a feature network is given), equivariance errors and what
transforming latents costs, intrinsic dimension, spectrum and channel statistics of the latents, all from one
reconstruction per image; --metrics computes others. `eqvae compare` reads the cards. The number of processes changes
no bit, the batch size changes last digits.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from diffusers_eqvae.autoencoders import load_autoencoder
from diffusers_eqvae.directories import require_replaceable
from diffusers_eqvae.extensions import loaded_extensions
from diffusers_eqvae.images import require_channels
from diffusers_eqvae.losses.perceptual import LPIPS_CHANNELS, require_seen_by_lpips
from diffusers_eqvae.metrics.autoencoder import (
    OFFERS,
    RECONSTRUCTION_METRICS,
    reconstruction_batches,
    reconstruction_card,
)
from diffusers_eqvae.metrics.base import METRICS, Measurement, build_groups, measure
from diffusers_eqvae.metrics.feature_networks import load_feature_network
from diffusers_eqvae.metrics.generation import ImageDigests
from diffusers_eqvae.metrics.image_sets import ImageSet
from diffusers_eqvae.metrics.result_card import ResultCard, is_card_of
from diffusers_eqvae.options import Checked, inputs_of
from diffusers_eqvae.perception.annotated_images import ImageMasks
from diffusers_eqvae.provenance import autoencoder_identity, hardware, hub_commit
from diffusers_eqvae.training_utils.arguments import DataArguments, warn_without_effect
from diffusers_eqvae.training_utils.command_line import Choice, parse
from diffusers_eqvae.training_utils.console import progress_bar, start_logging
from diffusers_eqvae.training_utils.launch import build_state, run_script


@dataclass
class ImageArguments(DataArguments):
    """Which images to measure on; always ADM's centre crop."""

    data_dir: str | None = field(
        default=None, metadata={"reads": True, "help": "Folder of images; or give --dataset_name."}
    )
    train_data_dir: str | None = field(init=False, default=None)
    center_crop: bool = field(init=False, default=True)
    random_flip: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.data_dir is None) == (self.dataset_name is None):
            raise ValueError("Give either --data_dir or --dataset_name.")
        self.train_data_dir = self.data_dir


@dataclass
class EvaluateArguments(Checked):
    """What to measure, and where the card goes."""

    vae: str = field(
        metadata={"reads": True, "help": "Autoencoder or pipeline: a directory or Hub name in diffusers layout."}
    )
    output: str = field(metadata={"help": "The card, a JSON file."})
    metrics: list[str] | None = field(
        default=None, metadata={"help": "NAME ... of what is computed; unset: all that it has the weights for."}
    )
    feature_networks: list[str] = field(
        default_factory=list,
        metadata={
            "reads": True,
            "help": "NAME[=WEIGHTS] ... for rFID, all in one pass: inception gives rfid; dinov2, squeezenet and "
            "cifar_resnet name themselves in the number. Several have a card each, beside OUTPUT.",
        },
    )
    num_images: int | None = field(
        default=None,
        metadata={"help": "Measure on the first so many images; unset measures on all.", "range": "(0, inf)"},
    )
    batch_size: int = field(
        default=16, metadata={"help": "Images per forward; changes last digits.", "range": "(0, inf)"}
    )
    sample_posterior: bool = field(
        default=False, metadata={"help": "Reconstruct a sample of the posterior instead of its mean."}
    )
    masks: str | None = field(
        default=None,
        metadata={
            "reads": True,
            "help": "Folder of 8-bit masks named as the images, for SRSS: 0 is background, 255 does not count.",
        },
    )
    seed: int = field(
        default=0, metadata={"help": "Of the samples; every image has noise of its own.", "range": "[0, 2**64)"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sample_posterior:
            warn_without_effect(self, ("seed",), "the posterior's mean is reconstructed")

    @property
    def card_names(self) -> list[str]:
        return [network.partition("=")[0] for network in self.feature_networks]

    @property
    def cards(self) -> list[Path]:
        """--output, or where there are several networks one beside it for each."""
        output = Path(self.output)
        if len(self.card_names) < 2:
            return [output]
        return [output.with_name(f"{output.stem}.{name}{output.suffix}") for name in self.card_names]


def chosen_metrics(given: Mapping[str, Any]) -> list[Choice]:
    names = tuple(given["metrics"] or RECONSTRUCTION_METRICS)
    return [Choice(METRICS, names, "metrics", lambda metric: metric.needs <= OFFERS)]


def metric_names(arguments: EvaluateArguments, options: Mapping[str, Any], channels: int) -> list[str]:
    """--metrics, or all but those without weights, and but LPIPS where images are neither RGB nor grey."""
    if "lpips" in (arguments.metrics or ()):
        require_seen_by_lpips(channels, remedy="leave lpips out of --metrics")
    if arguments.metrics is not None:
        return arguments.metrics
    without = []
    if channels not in LPIPS_CHANNELS:
        reason = f"LPIPS compares RGB or grey images, and these have {channels} channels"
        warn_without_effect(options["lpips"], vars(options["lpips"]), reason)
        without.append("lpips")
    elif options["lpips"].lpips_backbone_weights is None:
        warn_without_effect(options["lpips"], vars(options["lpips"]), "--lpips_backbone_weights is not given")
        without.append("lpips")
    if not arguments.feature_networks:
        without.append("rfid")
    return [name for name in RECONSTRUCTION_METRICS if name not in without]


def main(argv: list[str] | None = None) -> ResultCard | list[ResultCard] | None:
    """The card, or those of several networks; None on processes other than the first."""
    arguments, data, options = parse(
        EvaluateArguments, ImageArguments, argv=argv, description=__doc__, choices=chosen_metrics, script=__file__
    )
    start_logging(logging.WARNING)
    state = build_state()
    subject = {"task": "reconstruction", "model": arguments.vae, "num_images": arguments.num_images}
    subject |= {"data": data.name, "posterior": "sample" if arguments.sample_posterior else "mean"}
    ours = partial(is_card_of, **subject)
    require_replaceable(*arguments.cards, inputs=inputs_of(arguments, data), ours=ours)
    vae = load_autoencoder(arguments.vae).requires_grad_(False).to(state.device)
    channels = require_channels(vae, *([3] if arguments.feature_networks else []))
    networks = [load_feature_network(name).to(state.device) for name in arguments.feature_networks]
    names = metric_names(arguments, options, channels)
    if not any("masks" in METRICS[name].uses for name in names):
        warn_without_effect(arguments, ("masks",), "none of --metrics uses masks")
    shared, groups = build_groups(names, options, offers=OFFERS, networks=networks)
    with state.main_process_first():
        source = data.load(channels=channels)
        images = ImageSet(source, name=data.name, resolution=data.resolution, limit=arguments.num_images)
        masks = None
        if arguments.masks is not None:
            masks = ImageMasks(source, arguments.masks, resolution=data.resolution, places=range(len(images)))

    digests = ImageDigests()
    noise_seed = arguments.seed if arguments.sample_posterior else None
    own = progress_bar(images.batches(arguments.batch_size, state), disable=not state.is_main_process)
    given = {"networks": networks, "noise_seed": noise_seed, "labels": images.labels, "masks": masks}
    batches = reconstruction_batches(vae, own, **given)
    measure([*shared, *(metric for group in groups for metric in group), digests], batches, state)

    cards, common = [], Measurement(shared)
    if state.is_main_process:
        settings = {"model": arguments.vae, "model_class": type(vae).__name__, "dtype": "float32"}
        settings |= {"autoencoder": autoencoder_identity(vae)}
        settings |= {"seed": arguments.seed} if arguments.sample_posterior else {}
        provenance = {"data": images.name, "split": data.split, "hub_commit": hub_commit(arguments.vae)}
        provenance |= {"extensions": loaded_extensions(), **hardware(state.device)}
        for group, output in zip(groups, arguments.cards, strict=True):
            card = reconstruction_card(
                common | Measurement(group),
                data_hash=digests.hash,
                num_images=len(digests),
                image_size=digests.image_size,
                resize_rule=images.resize_rule,
                posterior="sample" if arguments.sample_posterior else "mean",
                settings=settings,
                provenance=provenance,
            )
            print(card.summary(), flush=True)  # first: a disk that is full now takes no card
            card.save(output)
            print(f"card: {output}")
            cards.append(card)
    state.wait_for_everyone()
    state.destroy_process_group()
    return cards if len(cards) > 1 else next(iter(cards), None)


if __name__ == "__main__":
    run_script(main)
