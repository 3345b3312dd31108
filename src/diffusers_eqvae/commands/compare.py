"""Lines up result cards and says whether their numbers may be compared; exit status 1 says that they may not."""

from __future__ import annotations

from collections.abc import Sequence

from ..metrics.result_card import ResultCard, compare_cards
from . import command_parser


def main(argv: Sequence[str]) -> int:
    parser = command_parser("compare", __doc__)
    parser.add_argument("cards", nargs="+", help="two or more of those that the evaluate_ scripts or inspect wrote")
    arguments = parser.parse_args(argv)

    result = compare_cards(arguments.cards, [ResultCard.load(path) for path in arguments.cards])
    print("\n".join(result.table))
    if not result.incomparable:
        print("\nThe numbers may be compared.")
        return 0
    print("\nThe numbers cannot be compared:", *result.incomparable, sep="\n- ")
    return 1
