"""The health card of `eqvae inspect`, drawn: card.png, and card.html around it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..autoencoders import decode, downsampling_factor, encode
from ..equivariance import rotation, scaling
from ..files import write_text
from ..images import latent_pca, to_image
from ..metrics.reconstruction import psnr
from ..templates import render_template
from .health import PUBLISHED, TABLE, Inspection

COLUMNS = (
    "image",
    "reconstruction",
    "image rotated 90°,\ndecoded, and back",
    "latent rotated 90°,\ndecoded, and back",
    "latent rotated 180°,\ndecoded, and back",
    "latent rotated 90°,\na detail",
    "latent rotated 90°,\nerror x 4",
    "latent x 0.5,\ndecoded",
    "latent x 0.25,\ndecoded",
    "latent,\n3 components",
)
COLOURS = ("#c2410c", "#0f766e")
LEVEL_COLOURS = {"good": "#15803d", "mixed": "#b45309", "poor": "#b91c1c"}
DETAIL_SHARE = 3  # a detail is a third of the side
ERROR_GAIN = 4.0
SHOWN_IMAGES = 2
NAME_LENGTH = 15  # letters that have room at full size
FINDING_LENGTH = 56  # and that leave room for its evidence


class Tile(NamedTuple):
    """One image of the strip and what stands below it."""

    image: Image.Image
    caption: str = ""


@torch.no_grad()
def strips(vaes: list[nn.Module], pixels: Tensor) -> list[list[list[Tile]]]:
    """For each image of (N, 3, S, S) in [-1, 1], for each autoencoder: the tiles named in `COLUMNS`.

    The detail lies where the first autoencoder's image suffers most from rotating the latent; it is the same place
    for all.

    Example:
        >>> len(strips([vae], pixels)[0][0]) == len(COLUMNS)
        True
    """
    columns = [_columns(vae, pixels) for vae in vaes]
    corners = [_worst_window(*images) for images in zip(columns[0][1], columns[0][0], pixels, strict=True)]
    side = pixels.shape[-1] // DETAIL_SHARE

    def tiles(model: int, index: int) -> list[Tile]:
        plain, rotated, colours, bound, half_turn, *smaller = columns[model]
        (y, x), image = corners[index], pixels[index]
        error = (rotated[index] - image).abs().mean(0, keepdim=True).expand(3, -1, -1)
        return [
            Tile(to_image(image)),
            *(_compared(decoded[index], image) for decoded in (plain, bound, rotated, half_turn)),
            Tile(to_image(rotated[index, :, y : y + side, x : x + side])),
            Tile(to_image(error * ERROR_GAIN - 1)),
            *(_compared(decoded[index], target[index]) for decoded, target in smaller),
            Tile(to_image(colours[index])),
        ]

    return [[tiles(model, index) for model in range(len(vaes))] for index in range(len(pixels))]


def _columns(vae: nn.Module, pixels: Tensor) -> tuple[Any, ...]:
    """Reconstruction, decoded rotated latents, colours of the latents, decoded rotated images, decoded latents of a
    half turn, (decoded scaled latents, target) twice; what was rotated is rotated back, EQ-VAE's figures 2 and 6."""
    raw_latents = encode(vae, pixels).mode()
    size = (raw_latents.shape[-2], raw_latents.shape[-1])

    def back(decoded: Tensor, quarter_turns: int) -> Tensor:
        return torch.rot90(decoded, -quarter_turns, (-2, -1)).clamp(-1, 1)

    rotated, half_turn = (back(decode(vae, rotation(size, n).apply_to_latents(raw_latents)), n) for n in (1, 2))
    turned = rotation(size, 1).apply_to_pixels(pixels, downsampling_factor(vae))
    bound = back(decode(vae, encode(vae, turned).mode()), 1)
    smaller = []
    for tau in (scaling(size, 0.5), scaling(size, 0.25)):
        decoded = decode(vae, tau.apply_to_latents(raw_latents)).clamp(-1, 1)
        smaller.append((decoded, tau.apply_to_pixels(pixels, downsampling_factor(vae))))
    plain = decode(vae, raw_latents).clamp(-1, 1)
    return plain, rotated, latent_pca(raw_latents)[0], bound, half_turn, *smaller


def _compared(decoded: Tensor, target: Tensor) -> Tile:
    return Tile(to_image(decoded), f"{psnr(decoded[None], target[None]).item():.1f} dB")


def _worst_window(rotated: Tensor, plain: Tensor, image: Tensor) -> tuple[int, int]:
    """Upper left corner of the window in which rotating the latent adds most squared error."""
    side = image.shape[-1] // DETAIL_SHARE
    step = max(1, side // 8)
    added = ((rotated - image).square() - (plain - image).square()).sum(0)
    sums = F.avg_pool2d(added[None, None], side, stride=step)[0, 0]
    return int(sums.argmax()) // sums.shape[1] * step, int(sums.argmax()) % sums.shape[1] * step


def pyplot() -> Any:
    """matplotlib.pyplot that draws to files; matplotlib comes with the extra "demo".

    Example:
        >>> figure = pyplot().figure()
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_table(axes: Any, rows: Sequence[tuple[str, ...]], head: tuple[str, ...], widths: tuple[float, ...]) -> None:
    """A table of text in matplotlib axes; `widths` of the columns as shares of the axes' width.

    Example:
        >>> draw_table(axes, [("PSNR", "25.8")], ("metric", "value"), (0.7, 0.3))
    """
    table = axes.table(rows, colLabels=head, colWidths=widths, loc="center", cellLoc="left")
    table.auto_set_font_size(False)
    table.set_fontsize(8.5)
    for column, (text, width) in enumerate(zip(head, widths, strict=True)):
        table[0, column].set_fontsize(min(8.5, 8.5 * 80 * width / max(1, len(text))))
    table.scale(1, min(1.7, 16 / len(rows)))
    axes.set_axis_off()


def write_png(path: Path, inspections: list[Inspection], tiles: list[list[list[Tile]]]) -> None:
    """Draws card.png: findings, `strips`, bars of errors and of dB lost, spectra, and the table of `table_rows`.

    Example:
        >>> write_png(folder / "card.png", inspections, strips(vaes, pixels[:2]))
    """
    # A pair of $ in a name would be typeset as mathematics.
    inspections = [replace(each, name=each.name.replace("$", r"\$")) for each in inspections]
    rows = [strip for image in tiles for strip in image]
    heights = (1.25 * len(inspections) + 0.1, 1.6 * len(rows) + 0.5, 4.2)
    figure = pyplot().figure(figsize=(15.5, sum(heights)), layout="constrained")
    head, middle, bottom = figure.subfigures(3, 1, height_ratios=heights)
    _draw_findings(head, inspections)
    _draw_strips(middle, rows, [inspection.name for inspection in inspections])
    errors, losses, spectra, table = bottom.subplots(1, 4, width_ratios=(1, 1, 1.3, 1.9))
    _draw_bars(errors, inspections, {"equivariance_rotation": "rotation R", "equivariance_scale": "scale S"})
    errors.set_title("equivariance error (less is better)", fontsize=11)
    errors.set_xlabel("* published, ImageNet 256", fontsize=8)
    _draw_bars(losses, inspections, {"gap_rotated": "latent rotated 90°", "gap_halved": "latent x 0.5"})
    losses.set_title("dB lost by transforming latents\ninstead of images (less is better)", fontsize=11)
    _draw_spectra(spectra, inspections)
    names = tuple(inspection.name for inspection in inspections)
    widths = (0.5, *([0.34 / len(names)] * len(names)), 0.16)
    draw_table(table, table_rows(inspections), ("", *names, "better"), widths)
    table.set_title(f"{inspections[0].figures['num_images']} images", fontsize=11)
    figure.savefig(path, dpi=90)
    pyplot().close(figure)


def _draw_findings(figure: Any, inspections: list[Inspection]) -> None:
    """A line for each property of each model, with its first evidence where there is room; card.html has all of it."""
    line = 1 / (5 * len(inspections) + 0.4)
    for index, inspection in enumerate(inspections):
        top = 1 - (5 * index + 0.7) * line
        size = min(14, 14 * NAME_LENGTH / len(inspection.name))
        figure.text(0.012, top, inspection.name, fontsize=size, weight="bold", color=COLOURS[index], va="center")
        for row, finding in enumerate(inspection.findings):
            y = top - row * line
            colour = LEVEL_COLOURS.get(finding.level or "", "#222")
            figure.text(0.14, y, finding.name, fontsize=11, weight="bold", va="center")
            figure.text(0.24, y, finding.says, fontsize=11, color=colour, va="center")
            if len(finding.says) <= FINDING_LENGTH:
                figure.text(0.57, y, finding.evidence[0], fontsize=10, color="#444", va="center")


def _draw_strips(figure: Any, rows: list[list[Tile]], names: list[str]) -> None:
    grid = figure.subplots(len(rows), len(COLUMNS), squeeze=False)
    for axes, title in zip(grid[0], COLUMNS, strict=True):
        axes.set_title(title, fontsize=10)
    for index, (axes_row, row) in enumerate(zip(grid, rows, strict=True)):
        colour = COLOURS[index % len(names)]
        for axes, tile in zip(axes_row, row, strict=True):
            axes.imshow(tile.image, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(tile.caption, fontsize=9, labelpad=2)
            for spine in axes.spines.values():
                spine.set(color=colour, linewidth=2)
        axes_row[0].set_ylabel(names[index % len(names)], fontsize=11, weight="bold", color=colour)


def _draw_bars(axes: Any, inspections: list[Inspection], labels: dict[str, str]) -> None:
    """A group of bars for each key of `labels`, a bar for each autoencoder, and lines at published values."""
    width = 0.8 / len(inspections)
    for index, inspection in enumerate(inspections):
        places = [group + (index - (len(inspections) - 1) / 2) * width for group in range(len(labels))]
        bars = axes.bar(places, [inspection.figures[key] for key in labels], width, color=COLOURS[index])
        axes.bar_label(bars, fmt="%.2f", fontsize=9)
    axes.margins(y=0.12)
    axes.set_xticks(range(len(labels)), labels.values())
    for group, key in enumerate(labels):
        published = PUBLISHED.get(key, {})
        lines = [(f"{name} {paper}", value) for paper, each in published.items() for name, value in each.items()]
        for (name, value), style in zip(lines, ("-", "--") * 2, strict=False):
            axes.plot([group - 0.45, group + 0.45], [value, value], style, color="#555", linewidth=0.8)
            text = axes.text(group + 0.45, value, f"{name}*", fontsize=6, ha="right", va="bottom", color="#555")
            text.set_bbox({"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.2})


def _draw_spectra(axes: Any, inspections: list[Inspection]) -> None:
    for inspection, colour in zip(inspections, COLOURS, strict=False):
        spectrum = inspection.figures["spectrum"]
        label = f"{inspection.name}: {inspection.figures['high_frequency']:.0%} above .25"
        axes.plot(spectrum["frequency"], spectrum["power"], color=colour, label=label)
    axes.axvline(0.25, color="#999", linewidth=0.8, linestyle=":")
    axes.axhline(1.0, color="#999", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", yscale="log")
    lowest = min(min(inspection.figures["spectrum"]["frequency"]) for inspection in inspections)
    ticks = [tick for tick in (0.05, 0.1, 0.25, 0.5) if tick >= lowest]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel("cycles per latent position")
    axes.set_title("latent spectrum, relative (white noise: flat at 1)", fontsize=11)
    axes.legend(fontsize=8)


def table_rows(inspections: list[Inspection]) -> list[tuple[str, ...]]:
    """What it is, one value per autoencoder ("-" where it is undefined), which direction is better.

    Example:
        >>> table_rows([inspection])[0]
        ('reconstruction, PSNR in dB', '23.94', 'higher')
    """
    rows = []
    for key, (label, form, better) in TABLE.items():
        figures = [inspection.figures.get(key) for inspection in inspections]
        written = [format(value, form) if value is not None and math.isfinite(value) else "-" for value in figures]
        if set(written) != {"-"}:
            rows.append((label, *written, better))
    return rows


def write_html(path: Path, inspections: list[Inspection], measured_with: dict[str, Any]) -> None:
    """Writes the card as a page around card.png; `measured_with` is data, protocol, hardware, versions and date.

    Example:
        >>> write_html(folder / "card.html", inspections, {"data": "kodak", "date": "2026-11-20"})
    """
    page = render_template(
        "health_card.html",
        title=f"Health card: {' and '.join(inspection.name for inspection in inspections)}",
        inspections=inspections,
        rows=table_rows(inspections),
        colours=LEVEL_COLOURS,
        measured_with=measured_with,
    )
    write_text(path, page)
