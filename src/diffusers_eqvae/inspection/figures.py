"""Rows of images with captions as one piece of HTML, the images inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from PIL import Image

from ..templates import render_template
from .card import Tile


def data_address(image: Image.Image) -> str:
    """A PNG as a data: address, for pages that are one file.

    Example:
        >>> data_address(to_image(pixels[0]))[:22]
        'data:image/png;base64,'
    """
    stream = io.BytesIO()
    image.save(stream, format="png")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def figures_html(rows: Sequence[tuple[str, Sequence[Tile]]], heads: Sequence[str] = (), *, width_px: int = 220) -> str:
    """A table of images: for each row its name and its tiles, as many in each.

    Args:
        rows: (name, tiles).
        heads: of the columns.
        width_px: widest that a column becomes.

    Example:
        >>> figures_html([("taesd", edited.tiles())], EDIT_COLUMNS)
    """
    addressed = [
        (name, [{"address": data_address(tile.image), "caption": tile.caption} for tile in tiles])
        for name, tiles in rows
    ]
    columns = max(len(tiles) for _, tiles in addressed)
    return render_template("figures.html", rows=addressed, heads=list(heads), columns=columns, width_px=width_px)
