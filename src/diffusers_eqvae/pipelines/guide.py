"""Autoguidance (arXiv 2406.02070): a weaker model of the same task takes the place of the null class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..classes import parse_id2label, strangers
from ..provenance import require_same_autoencoder

_TASK = ("objective", "prediction_type", "in_channels", "codebook_size", "sample_size", "num_classes")
_REMEDY = "take an earlier checkpoint or a smaller model that was trained on the same latents and classes"


def check_guide(guide: Any, transformer: Any) -> None:
    """Refuses a guide that was not trained for what the transformer does.

    Objective, prediction, size of the latents or the codebook, classes and autoencoder must be the transformer's; what
    one of them does not state is unknown and passes. Depth, width and patch size are the guide's own.

    Example:
        >>> check_guide(SiTTransformer2DModel.from_preset("SiT-S/2"), SiTTransformer2DModel.from_preset("SiT-XL/2"))
    """
    its, wanted = guide.config, transformer.config
    for name in _TASK:
        given, expected = (_stated(config, name) for config in (its, wanted))
        if given != expected:
            raise ValueError(f"The guide has {name} {given!r} and the transformer {expected!r}: {_REMEDY}.")
    mine, others = (parse_id2label(config.get("id2label")) for config in (wanted, its))
    for class_id in strangers(mine, others):
        raise ValueError(
            f"The guide knows class {class_id} as {others[class_id][0]!r} and the transformer as "
            f"{mine[class_id][0]!r}: {_REMEDY}."
        )
    if its.get("autoencoder") and wanted.get("autoencoder"):
        try:
            require_same_autoencoder(wanted["autoencoder"], its["autoencoder"], whose="the transformer")
        except ValueError as error:
            raise ValueError(f"The guide is of other latents than the transformer: {_REMEDY}. {error}") from error


def check_guides_path(guides: Mapping[str, Any], scheduler: Mapping[str, Any]) -> None:
    """Refuses a guide whose pipeline's scheduler says another path from noise to data than the transformer's.

    Example:
        >>> check_guides_path(weaker.scheduler.config, pipeline.scheduler.config)
    """
    given, expected = (config.get("path", "linear") for config in (guides, scheduler))
    if given != expected:
        raise ValueError(f"The guide was trained on the {given} path and the transformer on {expected}: {_REMEDY}.")


def _stated(config: Mapping[str, Any], name: str) -> Any:
    """A config's entry; of a size (h, w), which a square may state by one side."""
    value = config.get(name)
    if name != "sample_size" or value is None:
        return value
    return (value, value) if isinstance(value, int) else tuple(value)
