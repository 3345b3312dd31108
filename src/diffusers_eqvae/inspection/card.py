"""The health card of `eqvae inspect`, drawn: card.png and card.html beside card.json."""

from __future__ import annotations

import html
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..autoencoders import decode, downsampling_factor, encode
from ..equivariance import rotation, scaling
from ..files import write_json
from ..images import latent_pca, to_image
from ..metrics.reconstruction import psnr
from . import health as measuring
from .health import PUBLISHED, Inspection, compare

COLUMNS = (
    "image",
    "reconstruction",
    "latent turned 90°,\ndecoded, turned back",
    "... a detail of it",
    "... its error, x 4",
    "latent x 0.5, decoded",
    "latent x 0.25, decoded",
    "latent, 3 components",
)
COLOURS = ("#c2410c", "#0f766e")
LEVEL_COLOURS = {"good": "#15803d", "mixed": "#b45309", "poor": "#b91c1c"}
DETAIL_SHARE = 3  # a detail is a third of the side
ERROR_GAIN = 4.0
SHOWN_IMAGES = 2
# Figures of the table: key -> what it is, how it is written, whether more is better (None: neither).
TABLE: dict[str, tuple[str, str, bool | None]] = {
    "psnr": ("reconstruction, PSNR in dB", ".2f", True),
    "ssim": ("reconstruction, SSIM", ".3f", True),
    "lpips": ("reconstruction, LPIPS", ".3f", False),
    "equivariance_rotation": ("rotation error R", ".3f", False),
    "equivariance_rotation_centred": ("R around the channel means", ".3f", False),
    "equivariance_scale": ("scale error S", ".3f", False),
    "equivariance_scale_centred": ("S around the channel means", ".3f", False),
    "psnr_rotated_latent": ("decoding rotated latents, dB", ".2f", True),
    "gap_rotated": ("... lost by it, dB", ".2f", False),
    "psnr_halved_latent": ("decoding halved latents, dB", ".2f", True),
    "gap_halved": ("... lost by it, dB", ".2f", False),
    "high_frequency": ("share of high frequencies", ".3f", False),
    "intrinsic_dimension": ("intrinsic dimension (TwoNN)", ".1f", False),
}


@dataclass(frozen=True)
class Tile:
    """One image of the strip and what stands below it."""

    image: Image.Image
    caption: str = ""


@torch.no_grad()
def strips(vaes: list[nn.Module], images: Tensor) -> list[list[list[Tile]]]:
    """For each image of (N, 3, S, S), for each autoencoder: the tiles named in `COLUMNS`.

    The detail lies where the first autoencoder's image suffers most from turning the latent; it is the same place
    for all.
    """
    result: list[list[list[Tile]]] = [[] for _ in images]
    corners: list[tuple[int, int]] = []
    for vae in vaes:
        latents = encode(vae, images).mode()
        plain = decode(vae, latents).clamp(-1, 1)
        size = (latents.shape[-2], latents.shape[-1])
        turned = torch.rot90(decode(vae, rotation(size, 1).apply_to_latents(latents)), -1, (-2, -1)).clamp(-1, 1)
        corners = corners or [_worst_place(*triple) for triple in zip(turned, plain, images, strict=True)]
        smaller = [_scaled(vae, latents, images, scale) for scale in (0.5, 0.25)]
        colours, _ = latent_pca(latents)
        for index, (y, x) in enumerate(corners):
            side = images.shape[-1] // DETAIL_SHARE
            error = (turned[index] - images[index]).abs().mean(0, keepdim=True).expand(3, -1, -1)
            result[index].append(
                [
                    Tile(to_image(images[index])),
                    Tile(to_image(plain[index]), _decibels(plain, images, index)),
                    Tile(to_image(turned[index]), _decibels(turned, images, index)),
                    Tile(to_image(turned[index, :, y : y + side, x : x + side])),
                    Tile(to_image(error * ERROR_GAIN - 1)),
                    *(
                        Tile(to_image(decoded[index]), _decibels(decoded, target, index))
                        for decoded, target in smaller
                    ),
                    Tile(to_image(colours[index])),
                ]
            )
    return result


def _scaled(vae: nn.Module, latents: Tensor, images: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """What a scaled latent decodes to, and what it should be."""
    tau = scaling((latents.shape[-2], latents.shape[-1]), scale)
    decoded = decode(vae, tau.apply_to_latents(latents)).clamp(-1, 1)
    return decoded, tau.apply_to_pixels(images, downsampling_factor(vae))


def _worst_place(turned: Tensor, plain: Tensor, image: Tensor) -> tuple[int, int]:
    """Upper left corner of the window in which turning the latent adds most squared error."""
    side = image.shape[-1] // DETAIL_SHARE
    added = ((turned - image).square() - (plain - image).square()).sum(0)
    sums = F.avg_pool2d(added[None, None], side, stride=max(1, side // 8))[0, 0]
    best = int(sums.argmax())
    step = max(1, side // 8)
    return best // sums.shape[1] * step, best % sums.shape[1] * step


def _decibels(images: Tensor, targets: Tensor, index: int) -> str:
    return f"{psnr(images[index : index + 1], targets[index : index + 1]).item():.1f} dB"


def write_figures(
    path: Path, inspections: list[Inspection], settings: dict[str, Any], provenance: dict[str, Any]
) -> None:
    """Every figure (null where undefined), how, where and when it was measured, and the published values beside it."""
    content: dict[str, Any] = {
        "settings": settings,
        "provenance": provenance,
        "published": PUBLISHED,
        "thresholds": {
            "small_gap_db": measuring.SMALL_GAP_DB,
            "large_gap_db": measuring.LARGE_GAP_DB,
            "poor_psnr_db": measuring.POOR_PSNR_DB,
            "dead_channel_share": measuring.DEAD_CHANNEL_SHARE,
        },
        "models": [asdict(replace(inspection, measurement=None)) for inspection in inspections],
    }
    if len(inspections) == 2:
        content["comparison"] = compare(*inspections)
    write_json(path, content)


def write_png(path: Path, inspections: list[Inspection], tiles: list[list[list[Tile]]]) -> None:
    """The card as one image; matplotlib is imported here and nowhere else."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [strip for image in tiles for strip in image]
    heights = (0.55 * len(inspections) + 0.3, 1.95 * len(rows) + 0.5, 4.2)
    figure: Any = pyplot.figure(figsize=(15.5, sum(heights)), layout="constrained")
    head, middle, bottom = figure.subfigures(3, 1, height_ratios=heights)
    _draw_verdicts(head, inspections)
    _draw_strips(middle, rows, [inspection.name for inspection in inspections])
    panels = bottom.subplots(1, 4, width_ratios=(1, 1, 1.3, 1.9))
    _draw_bars(panels[0], inspections, "error")
    _draw_bars(panels[1], inspections, "gap")
    _draw_spectrum(panels[2], inspections)
    _draw_table(panels[3], inspections)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _draw_verdicts(figure: Any, inspections: list[Inspection]) -> None:
    count = len(inspections)
    for index, inspection in enumerate(inspections):
        y = 1 - (index + 0.6) / (count + 0.3)
        verdict, figures = inspection.verdict, inspection.figures
        figure.text(0.012, y, inspection.name, fontsize=15, weight="bold", color=COLOURS[index], va="center")
        figure.text(
            0.26,
            y,
            f"{verdict.level.upper()}: {verdict.headline}",
            fontsize=14,
            weight="bold",
            color=LEVEL_COLOURS[verdict.level],
            va="center",
        )
        lost = f"turned latents lose {figures['gap_rotated']:.1f} dB, halved ones {figures['gap_halved']:.1f} dB"
        figure.text(0.68, y, lost, fontsize=12, va="center")


def _draw_strips(figure: Any, rows: list[list[Tile]], names: list[str]) -> None:
    grid = figure.subplots(len(rows), len(COLUMNS), squeeze=False)
    for index, (axes_row, row) in enumerate(zip(grid, rows, strict=True)):
        colour = COLOURS[index % len(names)]
        for axes, tile, title in zip(axes_row, row, COLUMNS, strict=True):
            axes.imshow(tile.image, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(tile.caption, fontsize=9, labelpad=2)
            if index == 0:
                axes.set_title(title, fontsize=10)
            for spine in axes.spines.values():
                spine.set(color=colour, linewidth=2)
        axes_row[0].set_ylabel(names[index % len(names)], fontsize=11, weight="bold", color=colour)


def _draw_bars(axes: Any, inspections: list[Inspection], kind: str) -> None:
    keys = {
        "error": ("equivariance_rotation", "equivariance_scale"),
        "gap": ("gap_rotated", "gap_halved"),
    }[kind]
    width = 0.8 / len(inspections)
    for index, inspection in enumerate(inspections):
        places = [group + (index - (len(inspections) - 1) / 2) * width for group in range(2)]
        bars = axes.bar(places, [inspection.figures[key] for key in keys], width, color=COLOURS[index])
        axes.bar_label(bars, fmt="%.2f", fontsize=9)
    axes.margins(y=0.12)
    if kind == "error":
        axes.set_xticks([0, 1], ["rotation R", "scale S"])
        for group, published in enumerate(PUBLISHED.values()):
            for (name, value), style in zip(published.items(), ("-", "--"), strict=True):
                axes.plot([group - 0.45, group + 0.45], [value, value], style, color="#555", linewidth=1)
                text = axes.text(group + 0.45, value, f"{name}*", fontsize=7, ha="right", va="bottom", color="#555")
                text.set_bbox({"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.5})
        axes.set_title("equivariance error (less is better)", fontsize=11)
        axes.set_xlabel("* published, ImageNet 256", fontsize=8)
    else:
        axes.set_xticks([0, 1], ["latent turned 90°", "latent halved"])
        axes.set_title("dB lost by transforming latents\ninstead of images (less is better)", fontsize=11)


def _draw_spectrum(axes: Any, inspections: list[Inspection]) -> None:
    for index, inspection in enumerate(inspections):
        spectrum = inspection.figures["spectrum"]
        share = inspection.figures["high_frequency"]
        label = f"{inspection.name}: {share:.0%} above .25"
        axes.plot(spectrum["frequency"], spectrum["power"], color=COLOURS[index], label=label)
    axes.axvline(0.25, color="#999", linewidth=0.8, linestyle=":")
    axes.axhline(1.0, color="#999", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", yscale="log")
    lowest = min(min(inspection.figures["spectrum"]["frequency"]) for inspection in inspections)
    ticks = [tick for tick in (0.05, 0.1, 0.25, 0.5) if tick >= lowest]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel("cycles per latent cell")
    axes.set_title("latent spectrum, relative (white noise: flat at 1)", fontsize=11)
    axes.legend(fontsize=8)


def _draw_table(axes: Any, inspections: list[Inspection]) -> None:
    rows = table_rows(inspections)
    labels = ["", *(inspection.name for inspection in inspections), "better"]
    widths = (0.5, *([0.34 / len(inspections)] * len(inspections)), 0.16)
    drawn = axes.table([list(row) for row in rows], colLabels=labels, loc="center", cellLoc="left", colWidths=widths)
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(8.5)
    drawn.scale(1, 1.25)
    axes.set_axis_off()
    figures = inspections[0].figures
    axes.set_title(f"{figures['num_images']} images", fontsize=11)


def table_rows(inspections: list[Inspection]) -> list[tuple[str, ...]]:
    """What it is, one value per autoencoder, which direction is better."""
    rows = []
    for key, (label, form, more) in TABLE.items():
        figures = [inspection.figures.get(key) for inspection in inspections]
        values = [value if value is not None and math.isfinite(value) else None for value in figures]
        if all(value is None for value in values):
            continue
        written = ["-" if value is None else format(value, form) for value in values]
        rows.append((label, *written, "" if more is None else "higher" if more else "lower"))
    return rows


def write_html(
    path: Path, inspections: list[Inspection], settings: dict[str, Any], provenance: dict[str, Any]
) -> None:
    """The card as a page that shows card.png."""
    sections = "".join(_section(inspection) for inspection in inspections)
    names = "".join(f"<th>{html.escape(inspection.name)}</th>" for inspection in inspections)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table_rows(inspections)
    )
    channels = "".join(_channels(inspection) for inspection in inspections)
    changed = ""
    if len(inspections) == 2:
        first, second = inspections
        items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in compare(first, second))
        changed = f"<h2>{html.escape(second.name)} against {html.escape(first.name)}</h2><ul>{items}</ul>"
    facts = {**settings, **provenance, **provenance["versions"]}
    del facts["versions"]
    described = ", ".join(f"{html.escape(key)}: {html.escape(str(value))}" for key, value in facts.items())
    title = html.escape(" and ".join(inspection.name for inspection in inspections))
    path.write_text(
        f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Health card: {title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 85rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; text-align: left; margin: 1rem 0 }}
td, th {{ padding: .2rem .8rem; border-bottom: 1px solid #ddd }} img {{ max-width: 100% }}
</style>
<h1>Health card: {title}</h1>
{sections}{changed}
<img src="card.png" alt="decoded transformed latents, equivariance errors, losses in dB, spectrum and figures">
<table><tr><th></th>{names}<th>better</th></tr>{rows}</table>
<p>A point of the intrinsic dimension is one flattened latent. From N images it scatters by about its value / sqrt(N)
and falls short when N is small: compare it only between cards of the same images.</p>
{channels}
<p>Measured with {described}. All figures: card.json.</p>
</html>
""",
        encoding="utf-8",
    )


def _section(inspection: Inspection) -> str:
    verdict = inspection.verdict
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in verdict.reasons)
    return (
        f'<h2>{html.escape(inspection.name)}: <span style="color: {LEVEL_COLOURS[verdict.level]}">{verdict.level}. '
        f"{html.escape(verdict.headline)}</span></h2><ul>{reasons}</ul>"
    )


def _channels(inspection: Inspection) -> str:
    figures = inspection.figures["channels"]
    rows = "".join(
        f"<tr><td>{index}</td><td>{mean:.3f}</td><td>{std:.3f}</td><td>{kurtosis:.2f}</td></tr>"
        for index, (mean, std, kurtosis) in enumerate(
            zip(figures["mean"], figures["std"], figures["kurtosis"], strict=True)
        )
    )
    return (
        f"<h2>Raw latents of {html.escape(inspection.name)}, per channel</h2><table><tr><th>channel</th><th>mean</th>"
        f"<th>std</th><th>excess kurtosis (Gaussian: 0)</th></tr>{rows}</table>"
    )
