"""The work of `eqvae inspect`: from names and a folder to a health card."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..autoencoders import load_autoencoder
from ..data.image_datasets import load_image_dataset
from ..files import require_writable
from ..images import adm_center_crop, to_pixels, to_uint8
from ..losses.perceptual import LPIPS
from ..metrics.image_sets import hash_digests, image_digests
from ..provenance import hardware
from .card import SHOWN_IMAGES, strips, write_figures, write_html, write_png
from .health import Inspection, inspect_autoencoder, require_fitting, result_card

logger = logging.getLogger(__name__)


def load_images(directory: str | Path, *, resolution: int, num_images: int) -> Tensor:
    """`num_images` evenly spaced images of a folder, as centre crops (N, 3, S, S) in [-1, 1].

    A folder of fewer images gives all it has, with a warning.

    Raises:
        ValueError: an empty or unknown folder, a image that cannot be read, or numbers that are not positive.
    """
    if num_images < 1 or resolution < 1:
        raise ValueError(f"--num_images and --resolution must be positive; got {num_images} and {resolution}.")
    source = load_image_dataset(train_data_dir=directory)
    if len(source) < num_images:
        logger.warning("%s holds %d images, fewer than the %d asked for.", directory, len(source), num_images)
    indices = np.linspace(0, len(source) - 1, min(num_images, len(source))).round().astype(int).tolist()
    images = []
    for index in indices:
        image, _, used = source.read(index)
        if used != index:
            raise ValueError(f"{source.name(index)} cannot be read, and a measurement replaces no image; remove it.")
        images.append(to_pixels(adm_center_crop(image, resolution)))
    return torch.stack(images)


def run_inspection(
    *,
    model: str,
    data: str,
    output_dir: str,
    compare: str | None = None,
    subfolder: str | None = None,
    compare_subfolder: str | None = None,
    resolution: int = 256,
    num_images: int = 24,
    device: str = "cpu",
    lpips_net: str = "squeeze",
    lpips_backbone_weights: str | None = None,
    lpips_linear_weights: str | None = None,
) -> list[Inspection]:
    """The command: measures one or two autoencoders and writes to `output_dir`.

    card.json, card.png and card.html are the health card of all, card.NAME.json the result card of each.

    Raises:
        ValueError, OSError: a model, folder or weights file that cannot be read, an unfitting resolution, or an
            `output_dir` that cannot be written to.
    """
    if lpips_linear_weights is not None and lpips_backbone_weights is None:
        raise ValueError("--lpips_linear_weights needs --lpips_backbone_weights beside it; give both or neither.")
    folder = Path(output_dir)
    require_writable(folder / "card.json")
    images = load_images(data, resolution=resolution, num_images=num_images)
    provenance = {"data": Path(data).name}
    provenance |= hardware(device)
    protocol: dict[str, Any] = {"data_hash": hash_digests(image_digests(to_uint8(images).permute(0, 2, 3, 1).numpy()))}
    protocol["resize_rule"] = f"ADM centre crop to {resolution} px"
    lpips = None
    if lpips_backbone_weights is not None:
        lpips = LPIPS.from_pretrained(
            lpips_net, backbone_weights=lpips_backbone_weights, linear_weights=lpips_linear_weights
        ).to(device)
    locations = [(model, subfolder)] + ([(compare, compare_subfolder)] if compare is not None else [])
    models = ["/".join(filter(None, location)) for location in locations]
    names = _short_names([name for name, _ in locations])
    vaes = [
        load_autoencoder(name, subfolder=inside).to(device, memory_format=torch.channels_last)
        for name, inside in locations
    ]
    for vae in vaes:
        require_fitting(vae, resolution)
    images = images.to(device)
    inspections = [
        inspect_autoencoder(vae, images, name=name, perceptual=lpips) for vae, name in zip(vaes, names, strict=True)
    ]
    for file, name, inspection in zip(_card_names(names), models, inspections, strict=True):
        result_card(inspection, name, protocol=protocol, provenance=provenance).save(folder / file)
    measured = inspections[0].measurement
    settings = {"images": len(images), **protocol, **(measured.protocol if measured else {}), "posterior": "mean"}
    settings["ssim"] = "Gaussian window of 11 px, sigma 1.5, range 2"
    write_figures(folder / "card.json", inspections, settings, provenance)
    shown = np.linspace(0, len(images) - 1, min(SHOWN_IMAGES, len(images))).round().astype(int).tolist()
    write_png(folder / "card.png", inspections, strips(vaes, images[shown]))
    write_html(folder / "card.html", inspections, settings, provenance)
    return inspections


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
