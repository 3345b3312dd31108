"""What the demo shows: metrics.json, report.png and report.html, from what its stages left on disk."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data.image_datasets import PixelDataset, load_image_dataset
from ..files import write_json, write_text
from ..images import CAPTIONS, comparison_rows, evenly_spaced, grid, image_grid
from ..inspection.card import draw_table, pyplot
from ..model_card import METADATA_FILE, RunMetadata
from ..templates import render_template
from ..training_utils.autoencoder.arguments import AutoencoderArguments
from ..training_utils.autoencoder.build import build_autoencoder
from .stage import Stage

BRANCHES = {"plain": "without EQ", "eq": "with EQ"}
METRICS = {
    "psnr": ("reconstruction, dB", "higher"),
    "equivariance_rotation": ("rotation error R", "lower"),
    "equivariance_scale": ("scale error S", "lower"),
    "psnr_rotated_latent": ("decoding a rotated latent, dB", "higher"),
    "psnr_halved_latent": ("decoding a downscaled latent, dB", "higher"),
}
SAMPLES = {
    "samples_plain_interval": "SiT without EQ, guidance interval",
    "samples_eq_interval": "SiT with EQ, guidance interval",
    "samples_eq_full": "SiT with EQ, guidance everywhere",
}
SHOWN_IMAGES = 4
SHOWN_PX = 128


def write_report(output_dir: Path, stages: list[Stage], *, seconds: float) -> None:
    """Writes the three files; the numbers are those that the training scripts measured themselves.

    `seconds` is what the stages took, less than their sum where some ran side by side.
    """
    plain, eq = (_metrics(output_dir / f"autoencoder_{branch}") for branch in BRANCHES)
    nfe = {name: json.loads((output_dir / name / "sampling.json").read_text())["nfe"] for name in SAMPLES}
    metrics: dict[str, Any] = {f"{name}_before": plain[name] for name in METRICS}
    metrics |= {f"{name}_after": eq[name] for name in METRICS}
    metrics |= {"nfe_full": nfe["samples_eq_full"], "nfe_interval": nfe["samples_eq_interval"]}
    metrics["seconds"] = {stage.name: stage.record["seconds"] for stage in stages}
    write_json(output_dir / "metrics.json", metrics | {"seconds_in_all": seconds})

    rows = [(label, f"{plain[name]:.3f}", f"{eq[name]:.3f}", better) for name, (label, better) in METRICS.items()]
    rows.append(
        ("network evaluations per sample*", f"{metrics['nfe_full']:g}", f"{metrics['nfe_interval']:g}", "lower")
    )
    _write_png(output_dir, rows)
    commands = [(stage.name, stage.record["seconds"], shlex.join(_short(stage.command))) for stage in stages]
    page = render_template(
        "demo_report.html",
        title="What EQ-VAE does, on a few photographs",
        rows=rows,
        commands=commands,
        seconds=seconds,
    )
    write_text(output_dir / "report.html", page)


def _metrics(run: Path) -> dict[str, float]:
    return {entry["name"]: entry["value"] for entry in RunMetadata.load(run / METADATA_FILE).evaluation["metrics"]}


def _short(command: list[str]) -> list[str]:
    """A stage's command with its script named relative to the repository."""
    script = Path(command[0])
    return ["python", f"{script.parent.name}/{script.name}", *command[1:]]


def _shown_pixels(output_dir: Path) -> torch.Tensor:
    """A few evenly spaced validation images of the fine-tuning, (N, 3, S, S) in [-1, 1]."""
    arguments = json.loads((output_dir / "autoencoder_eq" / "resolved_arguments.json").read_text())
    source = load_image_dataset(
        arguments["dataset_name"], train_data_dir=arguments["validation_data_dir"] or arguments["train_data_dir"]
    )
    dataset = PixelDataset(source, resolution=arguments["resolution"])
    indices = evenly_spaced(len(dataset), SHOWN_IMAGES)
    return torch.stack([dataset[index]["pixel_values"] for index in indices])


def _comparison(run: Path, pixels: torch.Tensor) -> Image.Image:
    """What becomes of rotated and downscaled latents of a run's autoencoder, enlarged."""
    vae = build_autoencoder(AutoencoderArguments(pretrained_model_name_or_path=str(run)))
    image = grid(comparison_rows(vae, pixels))
    factor = max(1, SHOWN_PX * SHOWN_IMAGES // image.height)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _samples_by_class(path: Path) -> Image.Image:
    """One column per class (labels of balanced samples take turns)."""
    with np.load(path) as samples:
        images, labels = samples["arr_0"], samples["arr_1"]
    return image_grid([Image.fromarray(image) for image in images], columns=len(np.unique(labels)))


def _curve(run: Path, name: str) -> tuple[list[int], list[float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if record.get(name) is not None]
    return [record["step"] for record in records], [record[name] for record in records]


def _write_png(output_dir: Path, rows: Sequence[tuple[str, ...]]) -> None:
    """report.png: latents of both copies, the table, curves, samples."""
    figure = pyplot().figure(figsize=(14, 17), layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=(6.2, 3.6, 5.2))
    pixels = _shown_pixels(output_dir)
    for axes, (branch, title) in zip(top.subplots(1, 2), BRANCHES.items(), strict=True):
        image = _comparison(output_dir / f"autoencoder_{branch}", pixels)
        image.save(output_dir / f"latents_{branch}.png")
        axes.imshow(image)
        axes.set_title(f"The same fine-tuning {title}", fontsize=13)
        axes.set_yticks([])
        width = image.width / len(CAPTIONS)
        axes.set_xticks([(i + 0.5) * width for i in range(len(CAPTIONS))], CAPTIONS, fontsize=9)
        axes.tick_params(length=0)

    table, losses, generators = middle.subplots(1, 3, width_ratios=(1.6, 1, 1))
    draw_table(table, rows, ("", "without EQ", "with EQ", "better"), (0.5, 0.17, 0.17, 0.16))
    table.set_title("EQ fine-tuning\n* guidance everywhere, in the interval", fontsize=11)
    for axes, run, name, title in (
        (losses, "autoencoder", "loss/nll", "autoencoder loss, fine-tuning"),
        (generators, "sit", "loss", "SiT loss"),
    ):
        for branch, label in BRANCHES.items():
            axes.plot(*_curve(output_dir / f"{run}_{branch}", name), label=label)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("step")
        axes.set_yscale("log")
        axes.legend()

    for axes, (name, title) in zip(bottom.subplots(1, len(SAMPLES)), SAMPLES.items(), strict=True):
        axes.imshow(_samples_by_class(output_dir / name / "samples.npz"))
        axes.set_title(title, fontsize=11)
        axes.set_axis_off()
    figure.savefig(output_dir / "report.png", dpi=80)
    pyplot().close(figure)
