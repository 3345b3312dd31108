"""Writes a table of autoencoders from their result cards, in Markdown or HTML by the name of --output.

    eqvae leaderboard docs/leaderboard/*.json --output docs/leaderboard.md

Cards of one protocol (data, images, definitions) share a table; those of another have one of their own, for numbers
of different protocols are not lined up. Every number has its standard error, and an asterisk where its card has a
caveat.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..directories import require_replaceable
from ..files import write_text
from ..metrics.result_card import ResultCard, compare_cards
from ..templates import markdown
from . import command_parser

MARK = "<!-- written by eqvae leaderboard -->"
# Part of a table -> the numbers in it, by how their names begin; further ones that may be ranked come after them.
PARTS = {
    "reconstruction": ("psnr", "ssim", "lpips", "rfid", "rfd_"),
    "health": ("equivariance_rotation", "equivariance_scale", "gap_", "high_frequency", "intrinsic_dimension"),
    "diffusability": ("viv_per_dimension", "linear_loss", "sec", "lds", "lnc", "srss", "ifid", "ifd_"),
    "generation": ("fid", "fd_", "sfid", "kid", "kd_", "mind", "inception_score", "precision", "recall"),
}
LEFT_OUT = {"viv"}  # a sum over dimensions, which are more in one autoencoder than in another
Table = list[tuple[str, ...]]


def main(argv: Sequence[str]) -> int:
    parser = command_parser("leaderboard", __doc__)
    parser.add_argument("cards", nargs="+", help="result cards, of any number of autoencoders and protocols")
    parser.add_argument("--output", required=True, help="the table, a .md or .html file")
    arguments = parser.parse_args(argv)
    output = Path(arguments.output)
    if output.suffix not in (".md", ".html"):
        parser.error(f"--output names a .md or a .html file; got {output.name}")
    require_replaceable(output, ours=lambda path: path.read_text().startswith(MARK))
    cards = {Path(path).stem: ResultCard.load(path) for path in arguments.cards}
    if len(cards) < len(arguments.cards):
        parser.error("two cards have one file name, by which the table calls them; rename one")
    groups = grouped(cards)
    render = _markdown if output.suffix == ".md" else _html
    write_text(output, render([(_title(members), *tables(members)) for members in groups]))
    print(f"{len(cards)} cards in {len(groups)} tables: {output}")
    return 0


def grouped(cards: dict[str, ResultCard]) -> list[dict[str, ResultCard]]:
    """Cards that may be compared with each other, in the order in which the first of each group came."""
    groups: list[dict[str, ResultCard]] = []
    for name, card in cards.items():
        for group in groups:
            first = next(iter(group))
            if not compare_cards([first, name], [group[first], card]).incomparable:
                group[name] = card
                break
        else:
            groups.append({name: card})
    return groups


def tables(cards: dict[str, ResultCard]) -> tuple[Table, Table]:
    """Numbers and provenance of cards of one protocol, a row for each."""
    known = dict.fromkeys(name for card in cards.values() for name in card.metrics)
    columns = [name for starts in PARTS.values() for start in starts for name in known if name.startswith(start)]
    better = {name: sign for card in cards.values() for name, sign in card.better.items()}
    columns = list(dict.fromkeys([*columns, *(name for name in known if better.get(name) and name not in LEFT_OUT)]))
    signs = {"higher": " (more)", "lower": " (less)"}
    numbers = [("", *(f"{name}{signs.get(better.get(name, ''), '')}" for name in columns))]
    numbers += [(name, *(_number(card, column) for column in columns)) for name, card in cards.items()]
    head = ("", "class", "channels", "stride", "encoder", "decoder", "images", "measured")
    return numbers, [head, *(_provenance(name, card) for name, card in cards.items())]


def _number(card: ResultCard, name: str) -> str:
    value = card.metrics.get(name)
    if value is None:
        return "undefined" if name in card.caveats else "-"
    error = f" ± {card.errors[name]:.2g}" if name in card.errors else ""
    return f"{value:.4g}{error}{'*' if name in card.caveats else ''}"


def _provenance(name: str, card: ResultCard) -> tuple[str, ...]:
    identity = _mapping(card.settings.get("autoencoder"))
    hashes = (_mapping(identity.get(part)).get("float32", "-") for part in ("encoder", "decoder"))
    stated = (identity.get("class", card.settings.get("model_class", "-")), identity.get("latent_channels", "-"))
    count = card.protocol.get("num_images") or card.protocol.get("num_samples") or "-"
    date = str(card.provenance.get("date", "-"))[:10]
    return (name, *map(str, stated), str(identity.get("downsampling_factor", "-")), *hashes, str(count), date)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _title(cards: dict[str, ResultCard]) -> str:
    card = next(iter(cards.values()))
    data = card.provenance.get("data") or card.provenance.get("reference") or "unnamed data"
    count = card.protocol.get("num_images") or card.protocol.get("num_samples")
    network = card.protocol.get("feature_network")
    by = f", {network} ({card.protocol.get('feature_network_weights')})" if network else ""
    return f"{card.task}: {count} images of {data}, {card.protocol.get('image_size', 'unknown size')}{by}"


def _markdown(sections: Sequence[tuple[str, Table, Table]]) -> str:
    lines = [MARK, "# Leaderboard", "", INTRODUCTION, ""]
    for title, *two in sections:
        lines += [f"## {markdown(title)}", ""]
        for table in two:
            head, *rows = ([str(markdown(cell)) for cell in row] for row in table)
            lines += ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)] + [""]
    return "\n".join(lines)


def _html(sections: Sequence[tuple[str, Table, Table]]) -> str:
    parts = [MARK, "<!doctype html><meta charset=utf-8><title>Leaderboard</title>", f"<style>{STYLE}</style>"]
    parts.append("<h1>Leaderboard</h1>")
    parts.append(f"<p>{html.escape(INTRODUCTION)}</p>")
    for title, *two in sections:
        parts.append(f"<h2>{html.escape(title)}</h2>")
        for head, *rows in two:
            cells = [f"<tr>{_cells('th', head)}</tr>", *(f"<tr>{_cells('td', row)}</tr>" for row in rows)]
            parts.append("<table>" + "".join(cells) + "</table>")
    return "\n".join(parts) + "\n"


def _cells(kind: str, row: Sequence[str]) -> str:
    return "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in row)


# Of the HTML page: no font or script from elsewhere, and wide tables scroll by themselves.
STYLE = (
    "body{font:15px sans-serif;margin:2em}table{border-collapse:collapse;margin:1em 0;display:block;overflow-x:auto}"
    "td,th{padding:.25em .7em;text-align:left;white-space:nowrap;border-bottom:1px solid #ddd}"
)
INTRODUCTION = (
    "Autoencoders by their result cards. Numbers of one table have one protocol; what differs in it has a table of "
    "its own. ± is the standard error over images (of other training seeds it says nothing), * a caveat on the card, "
    "(more) and (less) which direction is better. Encoder and decoder are the hashes of their weights in float32. How "
    "to send a card: evaluation.md, Leaderboard."
)
