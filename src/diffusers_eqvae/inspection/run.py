"""`eqvae inspect`: from names of models and a folder of images to a health card."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..autoencoders import channels_last, downsampling_factor, load_autoencoder, require_fitting
from ..data.image_datasets import load_image_dataset
from ..directories import OutputDirectory, require_replaceable
from ..images import adm_center_crop, evenly_spaced, require_channels, to_pixels, to_uint8
from ..losses.perceptual import LPIPS, require_seen_by_lpips
from ..metrics.image_sets import hash_digests, image_digests
from ..metrics.result_card import is_card_of
from ..options import Checked, inputs_of
from ..perception.annotated_images import ImageMasks
from ..provenance import hardware, hub_commit, portable
from ..training_utils.command_line import parse
from ..training_utils.console import progress_bar, start_logging
from ..training_utils.launch import require_device
from .card import SHOWN_IMAGES, pyplot, strips, write_html, write_png
from .health import Inspection, inspect_autoencoder, result_card

logger = logging.getLogger(__name__)

DESCRIPTION = """What are this autoencoder's latents like: reconstruction, equivariance, diffusability, channels.

Writes card.html, card.png and, for `eqvae compare`, a result card of each model. `eqvae inspect MODEL ...` is short
for `eqvae inspect --vae MODEL ...`.
"""


@dataclass
class InspectArguments(Checked):
    """One or two autoencoders, and the images they are measured on.

    Example:
        >>> InspectArguments(vae="madebyollin/taesd", data_dir="kodak", output_dir="runs/card").resolution
        256
    """

    vae: str = field(
        metadata={
            "reads": True,
            "help": "Diffusers autoencoder, or pipeline with one in vae/: a directory or Hub name.",
        }
    )
    data_dir: str = field(metadata={"reads": True, "help": "Folder of images to measure on."})
    output_dir: str = field(metadata={"help": "Where the card is written."})
    compare: str | None = field(
        default=None, metadata={"reads": True, "help": "A second autoencoder, drawn beside the first."}
    )
    subfolder: str | None = field(default=None, metadata={"help": "Folder of the autoencoder inside vae."})
    compare_subfolder: str | None = field(default=None, metadata={"help": "The same for compare."})
    resolution: int = field(default=256, metadata={"help": "Side of the centre crops in pixels.", "range": "(0, inf)"})
    num_images: int = field(default=24, metadata={"help": "Images, evenly spaced in data_dir.", "range": "(0, inf)"})
    masks: str | None = field(
        default=None,
        metadata={
            "reads": True,
            "help": "Folder of 8-bit masks named as the images, for SRSS: 0 is background, 255 does not count.",
        },
    )
    device: str = field(default="cpu", metadata={"help": "Where the networks run, e.g. cuda."})
    lpips_net: Literal["vgg", "alex", "squeeze"] = field(default="squeeze", metadata={"help": "LPIPS network."})
    lpips_backbone_weights: str | None = field(
        default=None, metadata={"reads": True, "help": "Its ImageNet weights; LPIPS is measured if these are given."}
    )
    lpips_linear_weights: str | None = field(default=None, metadata={"reads": True, "help": "Its linear heads, v0.1."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lpips_linear_weights is not None and self.lpips_backbone_weights is None:
            raise ValueError("lpips_linear_weights needs lpips_backbone_weights beside it; give both or neither.")


def load_images(directory: str | Path, *, resolution: int, num_images: int, channels: int = 3) -> Tensor:
    """The "images" of `load_annotated_images`.

    Example:
        >>> load_images("kodak", resolution=256, num_images=24).shape
        torch.Size([24, 3, 256, 256])
    """
    options: dict[str, Any] = {"resolution": resolution, "num_images": num_images, "channels": channels}
    return load_annotated_images(directory, **options)["images"]


def load_annotated_images(
    directory: str | Path, *, resolution: int, num_images: int, masks: str | Path | None = None, channels: int = 3
) -> dict[str, Tensor]:
    """`num_images` evenly spaced images of a folder, as centre crops, and what is known of them.

    "images" (N, C, S, S) in [-1, 1], "labels" (N,) where the images have classes, and "masks" (N, S, S) where a folder
    of them is given (`ImageMasks`). A folder of fewer images gives all it has, with a warning; an image that cannot be
    read is an error.

    Example:
        >>> load_annotated_images("imagenette", resolution=128, num_images=500)["labels"].shape
        torch.Size([500])
    """
    source = load_image_dataset(train_data_dir=directory, channels=channels)
    if len(source) < num_images:
        logger.warning("%s holds %d images, fewer than the %d asked for.", directory, len(source), num_images)
    images, places = [], evenly_spaced(len(source), num_images)
    for index in places:
        image, _, used = source.read(index)
        if used != index:
            raise ValueError(f"{source.name(index)} cannot be read, and a measurement replaces no image; remove it.")
        images.append(to_pixels(adm_center_crop(image, resolution), channels))
    loaded = {"images": torch.stack(images)}
    if source.labels is not None:
        loaded["labels"] = torch.from_numpy(source.labels[places])
    if masks is not None:
        loaded["masks"] = ImageMasks(source, masks, resolution=resolution, places=places)(places)
    return loaded


def run_inspection(arguments: InspectArguments) -> list[Inspection]:
    """Measures one or two autoencoders and writes to `output_dir`.

    card.png and card.html are the health card of all, card.NAME.json the result card of each.

    Example:
        >>> arguments = InspectArguments(vae="madebyollin/taesd", data_dir="kodak", output_dir="runs/card")
        >>> run_inspection(arguments)[0].findings[1].says
        'the decoder does not follow transformed latents'
    """
    pyplot()  # what is not installed is missed here, not after measuring
    folder, resolution = Path(arguments.output_dir), arguments.resolution
    output = OutputDirectory(folder, kind="health card", inputs=inputs_of(arguments))
    locations = [(arguments.vae, arguments.subfolder)]
    if arguments.compare is not None:
        locations.append((arguments.compare, arguments.compare_subfolder))
    names = _short_names([name for name, _ in locations])
    models = ["/".join(filter(None, (portable(name), inside))) for name, inside in locations]
    for file, model in zip(_card_names(names), models, strict=True):
        require_replaceable(folder / file, ours=partial(is_card_of, model=model, data=Path(arguments.data_dir).name))
    device = require_device(arguments.device)
    vaes = [channels_last(load_autoencoder(name, subfolder=inside)).to(device) for name, inside in locations]
    channels = require_channels(vaes[0])
    for vae in vaes:
        require_channels(vae, channels)
        require_fitting(resolution, vae, smallest=4 * downsampling_factor(vae))  # at half and a quarter too
    if arguments.lpips_backbone_weights is not None:
        require_seen_by_lpips(channels, remedy="leave lpips_backbone_weights out")
    annotations = load_annotated_images(
        arguments.data_dir,
        resolution=resolution,
        num_images=arguments.num_images,
        masks=arguments.masks,
        channels=channels,
    )
    images = annotations.pop("images")
    provenance = {"data": Path(arguments.data_dir).name} | hardware(device)
    protocol, perceptual = _protocol(images, resolution), _perceptual(arguments, device)
    images = images.to(device)
    inspections = [
        inspect_autoencoder(
            vae,
            images,
            name=name,
            perceptual=perceptual,
            annotations=annotations,
            progress=partial(progress_bar, unit="image", desc=name),
        )
        for vae, name in zip(vaes, names, strict=True)
    ]
    output.claim("card.html", "card.png", *_card_names(names))
    commits = [hub_commit(name, subfolder=inside) for name, inside in locations]
    for file, model, commit, inspection in zip(_card_names(names), models, commits, inspections, strict=True):
        own = provenance | {"hub_commit": commit}
        result_card(inspection, model, protocol=protocol, provenance=own).save(folder / file)
    write_png(folder / "card.png", inspections, strips(vaes, images[evenly_spaced(len(images), SHOWN_IMAGES)]))
    said = {
        "images": len(images),
        **protocol,
        "posterior": "mean",
        **provenance,
        "hub_commit": dict(zip(models, commits, strict=True)),
    }
    write_html(folder / "card.html", inspections, said)
    output.release()
    return inspections


def _protocol(images: Tensor, resolution: int) -> dict[str, Any]:
    images_uint8 = to_uint8(images).permute(0, 2, 3, 1).numpy()
    return {
        "data_hash": hash_digests(image_digests(images_uint8)),
        "image_size": f"{resolution}x{resolution}",
        "resize_rule": f"ADM centre crop to {resolution} px",
    }


def _perceptual(arguments: InspectArguments, device: torch.device) -> LPIPS | None:
    if arguments.lpips_backbone_weights is None:
        return None
    return LPIPS.from_pretrained(
        arguments.lpips_net,
        backbone_weights=arguments.lpips_backbone_weights,
        linear_weights=arguments.lpips_linear_weights,
    ).to(device)


def _short_names(names: list[str]) -> list[str]:
    """The last part of each, or the whole where two would be called the same."""
    short = [name.rstrip("/").rsplit("/", 1)[-1] for name in names]
    if len(set(short)) == len(names):
        return short
    return names if len(set(names)) == len(names) else [f"{name} ({index + 1})" for index, name in enumerate(names)]


def _card_names(names: list[str]) -> list[str]:
    """A file name for each: card.NAME.json, numbered where two would be one file on some system."""
    plain = [re.sub(r"[^\w.+-]+", "_", name) for name in names]
    if len({name.lower() for name in plain}) < len(plain):
        plain = [f"{name}.{index + 1}" for index, name in enumerate(plain)]
    return [f"card.{name}.json" for name in plain]


def main(argv: Sequence[str]) -> int:
    """`eqvae inspect`: what was found, and where the card is."""
    argv = list(argv)
    if argv and not argv[0].startswith("-") and not argv[0].endswith((".yaml", ".yml")):
        argv.insert(0, "--vae")
    (arguments,) = parse(InspectArguments, argv=argv, description=DESCRIPTION)
    start_logging(format="%(levelname)s: %(message)s")
    for inspection in run_inspection(arguments):
        print(inspection.name)
        for finding in inspection.findings:
            print(f"  {finding.name}: {finding.says}", *(f"    - {each}" for each in finding.evidence), sep="\n")
    print(f"The card: {arguments.output_dir}/card.html")
    return 0
