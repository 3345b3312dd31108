"""Measures mean and standard deviation of an autoencoder's raw latents on images, and writes them into a copy of it.

eqvae statistics runs/eq-vae --data_dir IMAGES
eqvae statistics runs/eq-vae --data_dir IMAGES --normalization scalar --output_dir exports/eq-vae-scalar

Prints the entries of config.json. The posterior's variance is included, as it is in a training run. A copy is in
float32, with mean_std.json beside its config; the source is never written to.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

from ..autoencoders import channels_last, load_autoencoder, require_fitting
from ..data.image_datasets import PixelDataset, load_image_dataset
from ..directories import OutputDirectory
from ..files import share
from ..images import require_channels
from ..latents import LatentNormalization
from ..options import Checked, inputs_of
from ..stated_normalization import scale_complaint
from ..tokens import has_codebook
from ..training_utils.autoencoder.save import measure_normalization
from ..training_utils.command_line import parse
from ..training_utils.console import start_logging
from ..training_utils.launch import require_device


@dataclass
class StatisticsArguments(Checked):
    """An autoencoder, and the images that its latents are measured on.

    Example:
        >>> StatisticsArguments(vae="runs/eq-vae", data_dir="photographs").normalization
        'channel'
    """

    vae: str = field(
        metadata={
            "reads": True,
            "help": "Diffusers autoencoder, or pipeline with one in vae/: a directory or Hub name.",
        }
    )
    data_dir: str = field(metadata={"reads": True, "help": "Folder of images to measure on."})
    output_dir: str | None = field(default=None, metadata={"help": "Where a copy with the result is written."})
    normalization: Literal["channel", "scalar"] = field(
        default="channel",
        metadata={
            "help": "latents_mean and latents_std per channel, or scalar: one shift_factor and scaling_factor (what "
            "pipelines of SD3 and FLUX read)."
        },
    )
    resolution: int = field(default=256, metadata={"help": "Side of the centre crops in pixels.", "range": "(0, inf)"})
    num_images: int = field(
        default=10_000, metadata={"help": "Images, evenly spaced in data_dir.", "range": "(0, inf)"}
    )
    device: str = field(default="cpu", metadata={"help": "Where the autoencoder runs, e.g. cuda."})


def main(argv: Sequence[str]) -> int:
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        argv.insert(0, "--vae")
    description = f"{__doc__}\n`eqvae statistics VAE ...` is short for `eqvae statistics --vae VAE ...`."
    (arguments,) = parse(StatisticsArguments, argv=argv, description=description)
    start_logging(format="%(levelname)s: %(message)s")
    output = arguments.output_dir and OutputDirectory(
        arguments.output_dir, kind="copy of an autoencoder", inputs=inputs_of(arguments)
    )
    device = require_device(arguments.device)
    vae = channels_last(load_autoencoder(arguments.vae)).to(device)  # as the scripts do
    if has_codebook(vae):
        raise ValueError(f"{arguments.vae} has a codebook, and its tokens need no normalisation; name one without.")
    require_fitting(arguments.resolution, vae)
    source = load_image_dataset(train_data_dir=arguments.data_dir, channels=require_channels(vae))
    images = PixelDataset(source, resolution=arguments.resolution)
    statistics = measure_normalization(vae, images, arguments.num_images)
    came = LatentNormalization.from_vae(vae)
    normalization = LatentNormalization.from_statistics(statistics, scalar=arguments.normalization == "scalar")
    normalization.apply_to(vae)
    print(json.dumps(normalization.to_config(), indent=2))
    print(f"measured on {statistics.num_samples} images of {arguments.resolution} px")
    for note in (scale_complaint(came, statistics), normalization.unread(vae)):
        if note:
            print(f"- {note.rstrip('.')}.")
    if output:
        output.claim("config.json", SAFETENSORS_WEIGHTS_NAME, "mean_std.json")
        vae.save_pretrained(output.path)
        share(output.path)
        normalization.save_json(output.path / "mean_std.json", num_samples=statistics.num_samples)
        output.release()
        print(f"written to {output.path}")
    return 0
