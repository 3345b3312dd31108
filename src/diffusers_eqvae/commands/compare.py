"""Lines up result cards, or two settings over training seeds, and says whether their numbers may be compared.

    eqvae compare a.json b.json
    eqvae compare --arm plain plain.0.json plain.1.json plain.2.json --arm eq eq.0.json eq.1.json eq.2.json

With --arm the i-th cards of both are a pair; the table says better, worse or inconclusive of the second, by Student's
t on the differences of the pairs. Exit status 1 says that the numbers may not be compared.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..classes import listed
from ..directories import require_replaceable
from ..files import atomic_path
from ..metrics.result_card import ResultCard, aligned, compare_cards
from ..metrics.seeds import CONFIDENCE, Difference, compare_arms
from . import command_parser

HEAD = ("", "difference", "n", "is")


def main(argv: Sequence[str]) -> int:
    parser = command_parser("compare", __doc__)
    parser.add_argument("cards", nargs="*", help="two or more of those that the evaluate_ scripts or inspect wrote")
    parser.add_argument(
        "--arm",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "CARD"),
        help="a name and the cards of its training seeds; twice",
    )
    parser.add_argument("--output", help="a PNG of the intervals, with --arm")
    arguments = parser.parse_args(argv)
    if arguments.output and not arguments.output.endswith(".png"):
        parser.error(f"--output names a .png file; got {arguments.output}")
    if bool(arguments.cards) == bool(arguments.arm):
        parser.error("give cards, or two --arm of cards")
    if arguments.arm:
        return _compare_arms(arguments.arm, arguments.output)
    if arguments.output:
        parser.error("--output draws intervals, which only --arm has")

    result = compare_cards(arguments.cards, [ResultCard.load(path) for path in arguments.cards])
    print("\n".join(result.table))
    if not result.incomparable:
        print("\nThe numbers may be compared.")
        return 0
    print("\nThe numbers cannot be compared:", *result.incomparable, sep="\n- ")
    return 1


def _compare_arms(arms: Sequence[Sequence[str]], output: str | None) -> int:
    if output:
        require_replaceable(output, ours=_is_png)
    paths = [Path(path).resolve() for _, *given in arms for path in given]
    if twice := [path.name for path in dict.fromkeys(paths) if paths.count(path) > 1]:
        raise ValueError(f"Each card is of one training seed of one arm; {listed(twice)} is given twice.")
    cards = {name: [ResultCard.load(path) for path in paths] for name, *paths in arms}
    try:
        differences = compare_arms(cards)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    rows = [(HEAD[0], *cards, *HEAD[1:]), *(each.line() for each in differences)]
    print("\n".join(aligned(rows)))
    print(f"\nDifferences of pairs with their {CONFIDENCE:.0%} interval (Student's t); * has a caveat on its card.")
    if output:
        _draw(Path(output), list(cards), differences)
    return 0


def _is_png(path: Path) -> bool:
    return path.suffix == ".png" and path.read_bytes()[:4] == b"\x89PNG"


def _draw(path: Path, names: Sequence[str], differences: Sequence[Difference]) -> None:
    """Every difference with its interval, in percent of the first arm's value."""
    from ..inspection.card import pyplot

    shown = list(reversed(differences))
    colours = {"better": "#15803d", "worse": "#b91c1c"}
    figure, axes = pyplot().subplots(figsize=(9, 0.32 * len(shown) + 1.4), layout="constrained")
    for place, each in enumerate(shown):
        if not each.values[0]:
            continue  # there is no percent of 0; its row says so
        scale = 100 / abs(each.values[0])
        colour = colours.get(each.verdict.split()[0], "#777")
        axes.errorbar(
            each.mean * scale, place, xerr=each.half_width * scale, fmt="o", color=colour, capsize=4, markersize=5
        )
    axes.axvline(0, color="#999", linewidth=0.8)
    notes = ["" if each.values[0] else f" ({each.mean:+.2g}; {names[0]} is 0)" for each in shown]
    axes.set_yticks(
        range(len(shown)), [f"{each.name}: {each.verdict}{note}" for each, note in zip(shown, notes, strict=True)]
    )
    axes.set_ylim(-0.5, len(shown) - 0.5)
    axes.set_xlabel(f"{names[1]} less {names[0]}, % of {names[0]}; 95 % interval over {differences[0].n} seeds")
    with atomic_path(path) as sibling:
        figure.savefig(sibling, dpi=110, format="png")
    pyplot().close(figure)
