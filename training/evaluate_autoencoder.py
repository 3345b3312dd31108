"""Measures an autoencoder on exactly N centre-cropped pictures of a data set and writes the figures as JSON.

    accelerate launch training/evaluate_autoencoder.py --vae runs/eq-vae --train_data_dir PICTURES \
        --resolution 256 --num_images 5000 --output eq-vae.json

PSNR, SSIM, LPIPS (where its weights are given), equivariance errors and what transforming latents costs, intrinsic
dimension, spectrum and channel statistics of the latents. Neither the number of processes nor the batch size changes
which pictures, noises or sums are used.
"""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import diffusers
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

import diffusers_eqvae
from diffusers_eqvae.autoencoders import downsampling_factor, latent_channels
from diffusers_eqvae.data.images import ImageSource, adm_center_crop, load_image_dataset, to_pixels
from diffusers_eqvae.latents import vae_fingerprint
from diffusers_eqvae.losses.perceptual import LPIPS
from diffusers_eqvae.metrics.autoencoder import picture_figures, summarize
from diffusers_eqvae.training_utils.arguments import DataArguments, parse
from diffusers_eqvae.training_utils.transformer_parts import load_autoencoder


@dataclass
class PictureArguments(DataArguments):
    """Which pictures to measure on; always ADM's centre crop."""

    center_crop: bool = field(init=False, default=True)
    random_flip: bool = field(init=False, default=False)


@dataclass
class EvaluateArguments:
    """What to measure, and where the figures go."""

    vae: str = field(metadata={"help": "Autoencoder or pipeline: a directory or Hub name in diffusers layout."})
    output: str = field(metadata={"help": "JSON file to write."})
    num_images: int | None = field(
        default=None, metadata={"help": "Measure on the first so many pictures; unset measures on all."}
    )
    batch_size: int = field(default=16, metadata={"help": "Pictures per forward."})
    sample_posterior: bool = field(
        default=False, metadata={"help": "Reconstruct a sample of the posterior instead of its mean."}
    )
    seed: int = field(default=0, metadata={"help": "Of the samples; every picture has noise of its own."})
    max_points: int = field(default=10_000, metadata={"help": "Latents that the intrinsic dimension is taken of."})
    lpips_net: Literal["vgg", "alex", "squeeze"] = field(default="vgg", metadata={"help": "LPIPS network."})
    lpips_backbone_weights: str | None = field(
        default=None, metadata={"help": "Its ImageNet weights; LPIPS is measured if these are given."}
    )
    lpips_linear_weights: str | None = field(default=None, metadata={"help": "Its linear heads, v0.1."})


def read_pixels(source: ImageSource, index: int, resolution: int) -> torch.Tensor:
    image, _, used = source.read(index)
    if used != index:
        raise ValueError(f"{source.name(index)} cannot be read, and a measurement replaces no picture; remove it.")
    return to_pixels(adm_center_crop(image, resolution))


def noise_of(index: int, seed: int, shape: tuple[int, int, int]) -> torch.Tensor:
    """Depends on the seed and the picture's place in the data set alone."""
    state = int(np.random.SeedSequence((seed, index)).generate_state(1)[0])
    return torch.randn(shape, generator=torch.Generator().manual_seed(state))


def main(argv: list[str] | None = None) -> None:
    arguments, data = parse(EvaluateArguments, PictureArguments, argv=argv, description=__doc__)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    state = PartialState()
    vae = load_autoencoder(arguments.vae).requires_grad_(False)
    fingerprint = vae_fingerprint(vae)
    with state.main_process_first():
        source = load_image_dataset(
            data.dataset_name,
            data.dataset_config_name,
            data.train_data_dir,
            split=data.split,
            image_column=data.image_column,
            label_column=data.label_column,
            cache_dir=data.cache_dir,
        )
    count = len(source) if arguments.num_images is None else arguments.num_images
    if not 0 < count <= len(source):
        raise ValueError(f"--num_images must be 1..{len(source)}, the pictures there are; got {count}.")
    factor = downsampling_factor(vae)
    if data.resolution % factor:
        raise ValueError(f"--resolution must be a multiple of the stride {factor}; got {data.resolution}.")
    shape = (latent_channels(vae), data.resolution // factor, data.resolution // factor)

    vae.to(state.device)
    perceptual = None
    if arguments.lpips_backbone_weights is not None:
        weights = {"backbone_weights": arguments.lpips_backbone_weights}
        perceptual = LPIPS.from_pretrained(
            arguments.lpips_net, **weights, linear_weights=arguments.lpips_linear_weights
        ).to(state.device)

    # Rows are gathered with their index and joined in order, so that every sum runs in one order on any machine.
    own, rows = list(range(count))[state.process_index :: state.num_processes], []
    batches = [own[start : start + arguments.batch_size] for start in range(0, len(own), arguments.batch_size)]
    for batch in tqdm(batches, unit="batch", disable=not state.is_main_process):
        pixels = torch.stack([read_pixels(source, index, data.resolution) for index in batch]).to(state.device)
        noise = None
        if arguments.sample_posterior:
            noise = torch.stack([noise_of(index, arguments.seed, shape) for index in batch]).to(state.device)
        figures = picture_figures(vae, pixels, perceptual=perceptual, noise=noise)
        rows += [(index, {name: values[k] for name, values in figures.items()}) for k, index in enumerate(batch)]
    rows = [row for _, row in sorted(gather_object(rows), key=lambda pair: pair[0])]
    if state.is_main_process:
        joined = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        content = {
            "evaluator": f"diffusers_eqvae {diffusers_eqvae.__version__}",
            "libraries": {"torch": torch.__version__, "diffusers": diffusers.__version__},
            "vae": {"name": arguments.vae, "class": type(vae).__name__, "fingerprint": fingerprint},
            "data": Path(data.train_data_dir or data.dataset_name).name,
            "split": data.split,
            "crop": f"ADM centre crop of {data.resolution} px",
            "posterior": f"sample, seed {arguments.seed}" if arguments.sample_posterior else "mean",
            "dtype": "float32",
            "lpips": arguments.lpips_net if perceptual is not None else None,
            "ssim": "Gaussian window of 11 px, sigma 1.5, range 2",
            "figures": summarize(joined, max_points=arguments.max_points),
        }
        Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.output).write_text(json.dumps(content, indent=2) + "\n")
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main()
