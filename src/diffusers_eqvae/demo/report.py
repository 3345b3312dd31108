"""What the demo shows: metrics.json, report.png and report.html, from what its stages left on disk."""

from __future__ import annotations

import html
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data.image_datasets import PixelDataset, load_image_dataset
from ..files import write_json, write_text
from ..images import CAPTIONS, comparison_rows, evenly_spaced, grid, image_grid
from ..training_utils.autoencoder.arguments import AutoencoderArguments
from ..training_utils.autoencoder.build import build_autoencoder

BRANCHES = {"plain": "without EQ", "eq": "with EQ"}
FIGURES = {
    "psnr": ("reconstruction, dB", True),
    "equivariance_rotation": ("rotation error R", False),
    "equivariance_scale": ("scale error S", False),
    "psnr_rotated_latent": ("decoding a rotated latent, dB", True),
    "psnr_halved_latent": ("decoding a halved latent, dB", True),
}
SAMPLES = {
    "samples_plain_interval": "SiT without EQ, guidance interval",
    "samples_eq_interval": "SiT with EQ, guidance interval",
    "samples_eq_full": "SiT with EQ, guidance everywhere",
}
SHOWN_IMAGES = 4
SHOWN_PX = 128


def write_report(output_dir: Path, stages: list[Any], *, seconds: float) -> None:
    """Writes the three files; the figures are those that the training scripts measured themselves.

    Args:
        output_dir: of the demo.
        stages: all that ran there.
        seconds: that they took, fewer than their sum where some ran side by side.
    """
    figures = {branch: _figures(output_dir / f"autoencoder_{branch}") for branch in BRANCHES}
    metrics: dict[str, Any] = {
        f"{name}_{when}": figures[branch][name]
        for name in FIGURES
        for branch, when in (("plain", "before"), ("eq", "after"))
    }
    samplings = {name: json.loads((output_dir / name / "sampling.json").read_text()) for name in SAMPLES}
    metrics |= {
        "nfe_full": samplings["samples_eq_full"]["nfe"],
        "nfe_interval": samplings["samples_eq_interval"]["nfe"],
        "seconds": {stage.name: stage.seconds for stage in stages},
        "seconds_in_all": seconds,
    }
    write_json(output_dir / "metrics.json", metrics)

    images = _shown_images(output_dir)
    for branch in BRANCHES:
        vae = build_autoencoder(
            AutoencoderArguments(pretrained_model_name_or_path=str(output_dir / f"autoencoder_{branch}"))
        )
        _enlarged(grid(comparison_rows(vae, images))).save(output_dir / f"latents_{branch}.png")
    _draw(output_dir, metrics)
    write_text(output_dir / "report.html", _page(metrics, stages))


def _figures(run: Path) -> dict[str, float]:
    return {figure["name"]: figure["value"] for figure in json.loads((run / "run_facts.json").read_text())["figures"]}


def _shown_images(output_dir: Path) -> torch.Tensor:
    """A few evenly spaced validation images of the fine-tuning, (N, 3, S, S)."""
    arguments = json.loads((output_dir / "autoencoder_eq" / "resolved_arguments.json").read_text())
    source = load_image_dataset(
        arguments["dataset_name"], train_data_dir=arguments["validation_data_dir"] or arguments["train_data_dir"]
    )
    dataset = PixelDataset(source, resolution=arguments["resolution"])
    indices = evenly_spaced(len(dataset), SHOWN_IMAGES)
    return torch.stack([dataset[index]["pixel_values"] for index in indices])


def _enlarged(image: Image.Image) -> Image.Image:
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


def _draw(output_dir: Path, metrics: dict[str, Any]) -> None:
    """report.png: latents of both copies, the table, curves, samples."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure: Any = pyplot.figure(figsize=(14, 17), layout="constrained")
    top, middle, bottom = list(figure.subfigures(3, 1, height_ratios=(6.2, 3.6, 5.2)))

    for axes, (branch, title) in zip(top.subplots(1, 2), BRANCHES.items(), strict=True):
        axes.imshow(Image.open(output_dir / f"latents_{branch}.png"))
        axes.set_title(f"The same fine-tuning {title}", fontsize=13)
        axes.set_xticks([])
        axes.set_yticks([])
        width = axes.images[0].get_size()[1] / len(CAPTIONS)
        axes.set_xticks([(i + 0.5) * width for i in range(len(CAPTIONS))], CAPTIONS, fontsize=9)
        axes.tick_params(length=0)

    table, losses, generators = middle.subplots(1, 3, width_ratios=(1.6, 1, 1))
    rows = [
        (label, f"{metrics[f'{name}_before']:.3f}", f"{metrics[f'{name}_after']:.3f}", "higher" if up else "lower")
        for name, (label, up) in FIGURES.items()
    ]
    rows.append(
        ("network evaluations per sample", f"{metrics['nfe_full']:g}", f"{metrics['nfe_interval']:g}", "lower")
    )
    drawn = table.table(
        rows,
        colLabels=("", "without", "with", "better"),
        loc="center",
        cellLoc="left",
        colWidths=(0.5, 0.17, 0.17, 0.16),
    )
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(9)
    drawn.scale(1, 1.7)
    table.set_axis_off()
    table.set_title("EQ fine-tuning; last row: guidance interval", fontsize=11)
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
    pyplot.close(figure)


def _page(metrics: dict[str, Any], stages: list[Any]) -> str:
    rows = "".join(
        f"<tr><td>{label}</td><td>{metrics[f'{name}_before']:.3f}</td><td>{metrics[f'{name}_after']:.3f}</td>"
        f"<td>{'higher' if up else 'lower'} is better</td></tr>"
        for name, (label, up) in FIGURES.items()
    )
    commands = "".join(
        f"<tr><td>{stage.name}</td><td>{stage.seconds:.0f} s</td>"
        f"<td><code>{html.escape(shlex.join(_short(stage.command)))}</code></td></tr>"
        for stage in stages
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>diffusers_eqvae: the demo</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; text-align: left }}
td, th {{ padding: .25rem .8rem; border-bottom: 1px solid #ddd }}
img {{ max-width: 100% }} code {{ font-size: 12px }}
</style>
<h1>What EQ-VAE does, on a few photographs</h1>
<p>A small autoencoder was trained, then two copies of it were fine-tuned for the same steps on the same images: one
plainly, one with the equivariance regularizer. Both then decode latents that were rotated or shrunk. The copy trained
with EQ gives the rotated or smaller image; the other does not. A small SiT was trained on the latents of each.</p>
<table><tr><th></th><th>without EQ</th><th>with EQ</th><th></th></tr>{rows}
<tr><td>network evaluations per sample, guided everywhere / in the interval</td><td>{metrics["nfe_full"]:g}</td>
<td>{metrics["nfe_interval"]:g}</td><td>lower is cheaper</td></tr></table>
<p>Measured on crops that were not trained on, of the same photographs: this is a demonstration, not a benchmark.</p>
<img src="report.png" alt="images, latents, curves and samples">
<h2>The commands</h2><p>{metrics["seconds_in_all"]:.0f} seconds in all; each line is a script of the repository.</p>
<table>{commands}</table>
</html>
"""


def _short(command: list[str]) -> list[str]:
    """A stage's command with its script named relative to the repository."""
    script = Path(command[0])
    return ["python", f"{script.parent.name}/{script.name}", *command[1:]]
