"""What the files of an autoencoder state about its latents, and what measured latents say of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .latents import ENTRIES, TOLERANCE, LatentNormalization, LatentStatistics, over_channels, repeated

logger = logging.getLogger(__name__)

EXPECTED_STD = (0.5, 2.0)  # of normalised latents; a generator begins at 1


def adopt_saved_normalization(vae: Any, stated: Mapping[str, Any], file: Path | None) -> None:
    """Brings what the files of an autoencoder state about its latents into `vae.config`, which is what others read.

    A scaling_factor that the config does not state, but its class fills in, is none beside a latents_mean. A
    mean_std.json wins over scaling_factor and shift_factor.

    Args:
        vae: as its class loads it.
        stated: its config.json.
        file: mean_std.json, or None.

    Raises:
        ValueError: the file and latents_mean or latents_std differ by more than 1 %.
    """
    says = {key for key in ENTRIES if stated.get(key) is not None}
    current = LatentNormalization.from_vae(vae)
    if "latents_mean" in says and "scaling_factor" not in says and current.scaling_factor != 1.0:
        logger.warning(
            "latents_mean and latents_std normalise alone: %s fills in scaling_factor=%g, which the config of this "
            "autoencoder does not state.",
            *(type(vae).__name__, current.scaling_factor),
        )
        vae.register_to_config(scaling_factor=1.0)
        current = LatentNormalization.from_vae(vae)
    if file is None:
        return
    found = LatentNormalization.from_json(file)
    if _agree(found, current):
        return
    if current.mean is not None and not _agree(found, LatentNormalization(current.mean, current.std)):
        raise ValueError(
            f"{file} and latents_mean and latents_std of the config beside it contradict each other: "
            f"{_described(found)} there, {_described(current)} here; correct one of them, or remove it."
        )
    try:
        found.apply_to(vae)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    logger.warning("%s (%s) normalises, not the config (%s).", file, _described(found), _described(current))


def scale_complaint(normalization: LatentNormalization, statistics: LatentStatistics) -> str | None:
    """A sentence where latents that were measured come out of `normalization` with a std beyond .5 to 2, else None.

    Example:
        >>> if complaint := scale_complaint(LatentNormalization.from_vae(vae), store.statistics()):
        ...     logger.warning(complaint)
    """
    low, high = EXPECTED_STD
    std = _std_after(normalization, statistics)
    if low <= std <= high:
        return None
    other = LatentNormalization.from_statistics(statistics)
    by = "their measured mean and std"
    if normalization.mean is not None and normalization.scaling_factor != 1.0:
        other, by = LatentNormalization(normalization.mean, normalization.std), "latents_mean and latents_std alone"
    return (
        f"Normalised latents have a standard deviation of {std:.3g}, where a generator expects about 1: the config of "
        f"the autoencoder ({_described(normalization)}) gives {std:.3g}, {by} would give "
        f"{_std_after(other, statistics):.3g}."
    )


def _std_after(normalization: LatentNormalization, statistics: LatentStatistics) -> float:
    """Of latents over all channels."""
    places = math.prod(normalization.tile)
    mean, std = (repeated(values, len(statistics.mean)) for values in normalization.mean_and_std)
    # Latents are measured per channel, so at every place of a tile alike.
    measured, measured_std = (np.repeat(values, places) for values in (statistics.mean, statistics.std))
    shifted = [(value - shift) / scale for value, shift, scale in zip(measured, mean, std, strict=True)]
    return over_channels(shifted, [value / scale for value, scale in zip(measured_std, std, strict=True)])[1]


def _agree(one: LatentNormalization, other: LatentNormalization) -> bool:
    """Within 1 %, per channel; one number for all agrees with different channels where it sums them up."""
    first, second = one.mean_and_std, other.mean_and_std
    lengths = {len(first[0]), len(second[0])}
    if len(lengths) == 2 and 1 in lengths:
        channels = max(lengths)
        pairs = [tuple(repeated(values, channels) for values in each) for each in (first, second)]
        summed = [tuple((value,) for value in over_channels(*each)) for each in (first, second)]
        return _near(*pairs) or (one.mean is not None and other.mean is not None and _near(*summed))
    return len(lengths) == 1 and one.tile == other.tile and _near(first, second)


def _near(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> bool:
    return all(
        abs(mean - other_mean) <= TOLERANCE * std and abs(std - other_std) <= TOLERANCE * std
        for mean, std, other_mean, other_std in zip(*first, *second, strict=True)
    )


def _described(normalization: LatentNormalization) -> str:
    stated = {key: value for key, value in normalization.to_config().items() if value not in (None, 0.0)}
    if normalization.mean is not None and normalization.scaling_factor == 1.0:
        del stated["scaling_factor"]
    shown = {key: [float(f"{each:.5g}") for each in np.atleast_1d(value)] for key, value in stated.items()}
    return ", ".join(f"{key} {value[0] if len(value) == 1 else value}" for key, value in shown.items())
