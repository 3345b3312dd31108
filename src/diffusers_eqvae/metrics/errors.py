"""Sampling errors of figures that are not means: how far they move with the images they are measured on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .distances import FeatureStatistics

GROUPS = 10  # disjoint sets of images that are left out in turn: own choice


def jackknife_error(values: Sequence[float]) -> float | None:
    """Standard error of a figure from its values without each of g disjoint groups of images (delete-d jackknife).

        sqrt((g - 1) / g * sum_j (value_j - mean)^2)

    (Shao and Wu 1989). The bias of a Fréchet distance by the number of images is nearly that of all of them, and so
    does not enter; a bootstrap, which repeats images, would shift it. None where a value is not finite.
    """
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt((len(values) - 1) / len(values) * math.fsum((value - mean) ** 2 for value in values))


def without_each(features: Tensor, groups: int = GROUPS) -> Iterator[FeatureStatistics]:
    """Statistics of (N, D) without the rows j, j + groups, ... in turn; nothing where a group would have one row."""
    if len(features) < 2 * groups:
        return
    parts = []
    for first in range(groups):
        parts.append(FeatureStatistics(features.shape[1]))
        parts[-1].update(features[first::groups])
    for left_out in range(groups):
        rest = FeatureStatistics(features.shape[1])
        for index, part in enumerate(parts):
            if index != left_out:
                rest.merge(part)
        yield rest


def kept_without_each(count: int, groups: int = GROUPS) -> Iterator[Tensor]:
    """Places of 0 .. count - 1 without j, j + groups, ... in turn; nothing where a group would have one."""
    places = torch.arange(count)
    yield from (places[places % groups != left_out] for left_out in range(groups if count >= 2 * groups else 0))


def disjoint_error(
    statistic: Callable[[slice], float], count: int, *, most: int, groups: int = GROUPS
) -> float | None:
    """Standard error of an unbiased figure from its values on disjoint groups of images, each of at most `most`.

    The deviation of the groups by the square root of their number, and of the images left out of large groups.
    """
    size = count // groups
    if size < 2:
        return None
    used = min(size, most)
    values = [statistic(slice(first, first + groups * used, groups)) for first in range(groups)]
    return float(torch.tensor(values, dtype=torch.float64).std()) / math.sqrt(groups * size / used)


def share_error(share: float, count: int) -> float | None:
    """Standard error of a share of `count` images, what it is counted by held fixed."""
    return math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None
