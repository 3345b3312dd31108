"""What the demo shows: metrics.json, report.png and report.html, from what its stages left on disk."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..autoencoders import decode, downsampling_factor, encode, evaluating, load_autoencoder
from ..classes import parse_id2label
from ..data.image_datasets import PixelDataset, load_image_dataset
from ..equivariance import Tau, rotation, scaling
from ..files import write_json, write_text
from ..images import evenly_spaced, image_grid, to_image, to_pixels
from ..inspection.card import pyplot
from ..metrics.distances import kernel_distance
from ..metrics.reconstruction import psnr
from ..model_card import METADATA_FILE, RunMetadata
from ..templates import render_template
from .emoji import ATTRIBUTION, SHOWN
from .stage import Stage

SAMPLE_ROWS = 5
BRANCHES = {"plain": "without EQ", "eq": "with EQ"}
FILES = ["metrics.json", "report.html", "report.png"]
FIGURES = ["comparison.png", "samples.png", "curves.png"]
FILES += [*FIGURES, *(f"latents_{branch}.png" for branch in BRANCHES)]
# Figure of a fine-tuned autoencoder's evaluation -> (what a reader calls it, unit, which direction is better).
METRICS = {
    "psnr": ("the image itself, encoded and decoded", "dB", "higher"),
    "psnr_rotated_latent": ("latent rotated by a quarter turn, decoded", "dB", "higher"),
    "psnr_halved_latent": ("latent at half its size, decoded", "dB", "higher"),
    "equivariance_rotation": ("rotation error R", "", "lower"),
    "equivariance_scale": ("scale error S", "", "lower"),
}
TRANSFORMS = {"rotated": "rotated by 90°", "halved": "at half the size"}
SHOWN_IMAGES = 5
# Disjoint parts of the samples, from which the error of the generation figure comes.
PARTS = 10
COLOURS = {"plain": "#9a3412", "eq": "#0f766e"}


class Column(NamedTuple):
    """Images (N, 3, H, W) in [-1, 1] under a head, with dB where they are compared with something."""

    head: str
    images: Tensor
    decibels: Tensor | None = None
    colour: str = "#222222"


def write_report(output_dir: Path, autoencoder: str, branches: Sequence[Sequence[Stage]], *, app: str) -> None:
    """Writes the report's files; what the stages have measured themselves is taken from them.

    Args:
        output_dir: the demo's directory.
        autoencoder: what both branches started from; its encoder gives the features of the generation figure.
        branches: the stages that have run, in the order of `BRANCHES`.
        app: command that opens both branches in the browser.
    """
    figures = {branch: _figures(output_dir / f"autoencoder_{branch}") for branch in BRANCHES}
    distances = {branch: generation_distance(output_dir, branch, autoencoder) for branch in BRANCHES}
    stages = [stage for branch in branches for stage in branch]
    seconds = max(sum(stage.record["seconds"] for stage in branch) for branch in branches)
    metrics = {
        "autoencoder": figures,
        "kernel_distance": {branch: {"value": value, "error": error} for branch, (value, error) in distances.items()},
        "seconds": {stage.name: stage.record["seconds"] for stage in stages} | {"in all": seconds},
    }
    write_json(output_dir / "metrics.json", metrics)
    _draw_columns(comparison(output_dir), output_dir / "comparison.png")
    _draw_samples(output_dir, output_dir / "samples.png")
    _draw_curves(output_dir, output_dir / "curves.png")
    _stack([output_dir / name for name in FIGURES[:2]], output_dir / "report.png")
    rows = [
        (label, *(format(figures[branch][name], ".2f" if unit else ".3f") for branch in BRANCHES), unit, better)
        for name, (label, unit, better) in METRICS.items()
    ]
    distance = tuple(f"{value:.2f} ± {error:.2f}" for value, error in distances.values())
    rows.append(("samples against training images*", *distance, "", "lower"))
    page = render_template(
        "demo_report.html",
        title="Rotate the latent, get the rotated image",
        verdict=verdict(figures, distances),
        steps=_resolved(output_dir)["max_train_steps"],
        rows=rows,
        figures={name: _embedded(output_dir / name) for name in FIGURES},
        commands=[(stage.name, stage.record["seconds"], "eqvae " + shlex.join(stage.command)) for stage in stages],
        seconds=seconds,
        app=app,
        attribution=ATTRIBUTION if _shows_emoji(output_dir) else "",
    )
    write_text(output_dir / "report.html", page)


def verdict(figures: dict[str, dict[str, float]], distances: dict[str, tuple[float, float]]) -> list[str]:
    """What the figures say, in sentences; a difference within two errors is called inconclusive.

    Example:
        >>> verdict(figures, {"plain": (0.3, 0.01), "eq": (0.31, 0.01)})[-1]
        'Samples: no difference between the two can be told from so few (0.30 ± 0.01 and 0.31 ± 0.01).'
    """
    gained = {name: figures["eq"][name] - figures["plain"][name] for name in METRICS}
    said = [
        f"A latent {TRANSFORMS[name]} decodes {abs(gained[key]):.1f} dB "
        f"{'closer to' if gained[key] > 0 else 'further from'} the image {TRANSFORMS[name]} with EQ."
        for name, key in (("rotated", "psnr_rotated_latent"), ("halved", "psnr_halved_latent"))
    ]
    price = gained["psnr"]
    said.append(
        f"The price: {-price:.1f} dB of plain reconstruction."
        if price < -0.05
        else f"Plain reconstruction lost nothing ({price:+.1f} dB)."
    )
    (plain, plain_error), (eq, eq_error) = distances["plain"], distances["eq"]
    both = f"{plain:.2f} ± {plain_error:.2f} and {eq:.2f} ± {eq_error:.2f}"
    if abs(plain - eq) <= 2 * (plain_error**2 + eq_error**2) ** 0.5:
        said.append(f"Samples: no difference between the two can be told from so few ({both}).")
    else:
        said.append(
            f"Samples: those {'with' if eq < plain else 'without'} EQ are nearer to the training images ({both}; one "
            "training each, so this may be luck)."
        )
    return said


@torch.no_grad()
def generation_distance(output_dir: Path, branch: str, autoencoder: str) -> tuple[float, float]:
    """Kernel distance of a branch's samples to its training images, and its standard error.

    KID's formula, unbiased at any number of samples, on latents of the autoencoder that both branches started from,
    averaged to 4 x 4 places and standardised over the training images: a network that is at hand, and no judge of
    beauty (own choice). The value is the mean over ten disjoint parts of the samples, the error their deviation over
    the root of ten: that of drawing samples, not that of training again.
    """
    with np.load(output_dir / f"samples_{branch}" / "samples.npz") as archive:
        samples = torch.stack([to_pixels(Image.fromarray(image)) for image in archive["arr_0"]])
    dataset = _images(output_dir, "train_data_dir")
    images = torch.stack([dataset[i]["pixel_values"] for i in evenly_spaced(len(dataset), 1000)])
    vae = load_autoencoder(autoencoder)

    def features(pixels: Tensor) -> Tensor:
        with evaluating(vae):
            latents = torch.cat([encode(vae, batch).mode() for batch in pixels.split(50)])
        return F.adaptive_avg_pool2d(latents, 4).flatten(1)

    reference, own = features(images), features(samples)
    centre, spread = reference.mean(0), reference.std(0).clamp_min(1e-6)
    reference, own = (reference - centre) / spread, (own - centre) / spread
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(own), generator=generator)
    values = torch.tensor(
        [kernel_distance(own[part], reference, generator=generator)[0] for part in order.chunk(PARTS)]
    )
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


@torch.no_grad()
def comparison(output_dir: Path, runs: Sequence[str] = tuple(BRANCHES)) -> list[Column]:
    """Held-out images, and what the branches decode of their transformed latents, beside the transformed images.

    What a small screen shows first is the point of it: the rotated latents.
    """
    pixels = _shown_pixels(output_dir)
    vaes = {branch: load_autoencoder(str(output_dir / f"autoencoder_{branch}")) for branch in runs}
    columns = [Column("image", pixels)]
    stride = downsampling_factor(next(iter(vaes.values())))
    size = (pixels.shape[-2] // stride, pixels.shape[-1] // stride)
    taus: list[tuple[str, Tau | None]] = [("latent rotated", rotation(size, 1)), ("latent halved", scaling(size, 0.5))]
    taus.append(("latent as it is", None))
    for name, tau in taus:
        target = pixels if tau is None else tau.apply_to_pixels(pixels, stride)
        for branch, vae in vaes.items():
            with evaluating(vae):
                raw_latents = encode(vae, pixels).mode()
                images = decode(vae, raw_latents if tau is None else tau.apply_to_latents(raw_latents)).clamp(-1, 1)
            columns.append(Column(f"{name},\n{BRANCHES[branch]}", images, psnr(images, target), COLOURS[branch]))
        if tau is not None:
            columns.append(Column(f"the image\n{name.split()[1]}", target))
    return columns


def write_comparison(output_dir: Path, run: Path) -> Path:
    """`comparison` of one fine-tuned autoencoder, as soon as it is there; returns the file."""
    branch = run.name.removeprefix("autoencoder_")
    path = output_dir / f"latents_{branch}.png"
    _draw_columns(comparison(output_dir, [branch]), path)
    return path


def _draw_columns(columns: list[Column], path: Path) -> None:
    rows = len(columns[0].images)
    figure = pyplot().figure(figsize=(1.45 * len(columns), 1.62 * rows + 0.55), layout="constrained")
    grid = figure.subplots(rows, len(columns), squeeze=False)
    for place, column in enumerate(columns):
        grid[0][place].set_title(column.head, fontsize=11, color=column.colour)
        for row in range(rows):
            axes = grid[row][place]
            axes.imshow(to_image(column.images[row]), interpolation="lanczos")
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set_visible(False)
            if column.decibels is not None:
                axes.set_xlabel(f"{column.decibels[row]:.1f} dB", fontsize=10, color=column.colour, labelpad=1)
    figure.savefig(path, dpi=100)
    pyplot().close(figure)


def _draw_samples(output_dir: Path, path: Path) -> None:
    """The first samples of both branches, a column for each class, named below."""
    drawn = {}
    for branch in BRANCHES:
        with np.load(output_dir / f"samples_{branch}" / "samples.npz") as archive:
            drawn[branch] = archive["arr_0"], archive["arr_1"]
    columns = max(len(np.unique(labels)) for _, labels in drawn.values())  # balanced: the labels take turns
    figure = pyplot().figure(figsize=(13, 6.5 * SAMPLE_ROWS / columns + 0.9), layout="constrained")
    for axes, (branch, (images, labels)) in zip(figure.subplots(1, 2), drawn.items(), strict=True):
        axes.imshow(image_grid(list(images[: columns * SAMPLE_ROWS]), columns, gap_px=2), interpolation="lanczos")
        axes.set_title(f"drawn by a small SiT on the latents {BRANCHES[branch]}", fontsize=12, color=COLOURS[branch])
        names = _class_names(output_dir / f"sit_{branch}")
        places = [(column + 0.5) * (images.shape[2] + 2) for column in range(columns)]
        axes.set_xticks(places, [names.get(int(label), str(label)) for label in labels[:columns]], fontsize=10)
        axes.set_yticks([])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=100)
    pyplot().close(figure)


def _draw_curves(output_dir: Path, path: Path) -> None:
    figure = pyplot().figure(figsize=(13, 3.4), layout="constrained")
    for axes, run, name, title in zip(
        figure.subplots(1, 2),
        ("autoencoder", "sit"),
        ("loss/nll", "loss"),
        ("loss of the autoencoders", "loss of the transformers (of two latent spaces: not to be compared)"),
        strict=True,
    ):
        for branch, label in BRANCHES.items():
            axes.plot(*_curve(output_dir / f"{run}_{branch}", name), label=label, color=COLOURS[branch])
        axes.set(title=title, xlabel="step", yscale="log")
        axes.legend()
    figure.savefig(path, dpi=100)
    pyplot().close(figure)


def _stack(paths: Sequence[Path], target: Path) -> None:
    """The images one above the other, equally wide."""
    images = [Image.open(path).convert("RGB") for path in paths]
    width, gap = max(image.width for image in images), 24
    scaled = [image.resize((width, round(image.height * width / image.width))) for image in images]
    canvas = Image.new("RGB", (width, sum(image.height + gap for image in scaled)), "white")
    for number, image in enumerate(scaled):
        canvas.paste(image, (0, sum(each.height + gap for each in scaled[:number])))
    canvas.save(target)


def _embedded(path: Path) -> str:
    """A data address, so that the report is one file."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _figures(run: Path) -> dict[str, float]:
    measured = RunMetadata.load(run / METADATA_FILE).evaluation["metrics"]
    return {entry["name"]: entry["value"] for entry in measured if entry["name"] in METRICS}


def _class_names(pipeline: Path) -> dict[int, str]:
    named = json.loads((pipeline / "transformer" / "config.json").read_text()).get("id2label")
    return {class_id: names[0] for class_id, names in parse_id2label(named).items()}


def _resolved(output_dir: Path) -> dict[str, Any]:
    arguments: dict[str, Any] = json.loads((output_dir / "autoencoder_eq" / "resolved_arguments.json").read_text())
    return arguments


def _shows_emoji(output_dir: Path) -> bool:
    return (output_dir / "images").is_dir()


def _images(output_dir: Path, folder: str) -> PixelDataset:
    arguments = _resolved(output_dir)
    source = load_image_dataset(arguments["dataset_name"], train_data_dir=arguments[folder])
    return PixelDataset(source, resolution=arguments["resolution"])


def _shown_pixels(output_dir: Path) -> Tensor:
    """A few images that nothing was trained on, else a few of the user's own; (N, 3, S, S) in [-1, 1]."""
    held_out = _resolved(output_dir)["validation_data_dir"] is not None
    dataset = _images(output_dir, "validation_data_dir" if held_out else "train_data_dir")
    if _shows_emoji(output_dir):
        names = [Path(dataset.source.name(index)).name for index in range(len(dataset))]
        indices = [names.index(name) for name in SHOWN]
    else:
        indices = evenly_spaced(len(dataset), SHOWN_IMAGES)
    return torch.stack([dataset[index]["pixel_values"] for index in indices])


def _curve(run: Path, name: str) -> tuple[list[int], list[float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if record.get(name) is not None]
    return [record["step"] for record in records], [record[name] for record in records]
