"""Two settings over several training seeds: better, worse or inconclusive, with the interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .result_card import SETTINGS, ResultCard, compare_cards

CONFIDENCE = 0.95
# In which settings two arms differ; whatever else differs would be compared along with them.
_OF_AN_ARM = ("model", "model_class", "autoencoder", "transformer", "alignment_network", "head", "ema")


@dataclass(frozen=True)
class Difference:
    """The mean difference of a number over paired seeds, second less first.

    Attributes:
        values: mean of each arm.
        mean, half_width: of the differences; the interval of Student's t at 95 % is mean +- half_width.
        n: pairs.
        verdict: of the second arm: "better", "worse", "inconclusive" where the interval holds 0, and "higher" or
            "lower" of a number of which neither is better.
    """

    name: str
    values: tuple[float, float]
    mean: float
    half_width: float
    n: int
    verdict: str

    def line(self) -> tuple[str, ...]:
        """Cells of a table."""
        first, second = (f"{value:.5g}" for value in self.values)
        return self.name, first, second, f"{self.mean:+.3g} +- {self.half_width:.2g}", f"{self.n}", self.verdict


def compare_arms(arms: Mapping[str, Sequence[ResultCard]]) -> list[Difference]:
    """What two arms differ in, of the cards of their training seeds, in pairs as they are given.

    The pairs' differences d_1 .. d_n have the interval mean +- t(.975, n - 1) std / sqrt(n) (Student's t). Every card
    must state the same data, protocol and evaluator, and both of a pair the same sampling seed and settings.

    Raises:
        ValueError: not two arms of equally many cards, two or more; cards that cannot be compared, with what differs.

    Example:
        >>> compare_arms({"plain": plain_cards, "eq": eq_cards})[0].verdict
        'inconclusive'
    """
    if len(arms) != 2 or len({len(cards) for cards in arms.values()}) != 1 or min(map(len, arms.values())) < 2:
        given = ", ".join(f"{name}: {len(cards)}" for name, cards in arms.items())
        raise ValueError(
            "Two arms of equally many cards are compared, one card for each training seed, two or more, since one "
            f"says nothing of how far training again would move it; got {given}."
        )
    (first_name, first), (second_name, second) = arms.items()
    names = [f"{name} {index + 1}" for name, cards in arms.items() for index in range(len(cards))]
    if forbidden := compare_cards(names, [*first, *second]).incomparable:
        raise ValueError("These cards cannot be compared: " + "; ".join(forbidden) + ".")
    for index, pair in enumerate(zip(first, second, strict=True)):
        one, other = (card.settings for card in pair)
        if keys := [key for key in SETTINGS if key not in _OF_AN_ARM and one.get(key) != other.get(key)]:
            raise ValueError(
                f"Pair {index + 1} of {first_name} and {second_name} differs in {', '.join(keys)} as well, so that "
                "nobody knows which of them made the difference; measure both with the same."
            )
    cards = [*first, *second]
    shared = [name for name in cards[0].metrics if all(name in card.metrics for card in cards)]
    return [_difference(name, first, second) for name in shared]


def _difference(name: str, first: Sequence[ResultCard], second: Sequence[ResultCard]) -> Difference:
    from scipy.stats import t  # not needed by who only reads cards

    pairs = [(a.metrics[name], b.metrics[name]) for a, b in zip(first, second, strict=True)]
    differences, n = [b - a for a, b in pairs], len(pairs)
    mean = math.fsum(differences) / n
    deviation = math.sqrt(math.fsum((each - mean) ** 2 for each in differences) / (n - 1))
    half_width = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * deviation / math.sqrt(n)
    values = tuple(math.fsum(column) / n for column in zip(*pairs, strict=True))
    marked = any(name in card.caveats for card in (*first, *second))
    verdict = _verdict(mean, half_width, first[0].better.get(name)) + (" *" if marked else "")
    return Difference(name, (values[0], values[1]), mean, half_width, n, verdict)


def _verdict(mean: float, half_width: float, better: str | None) -> str:
    if abs(mean) <= half_width:
        return "inconclusive"
    direction = "higher" if mean > 0 else "lower"
    return direction if better is None else "better" if direction == better else "worse"
