"""Metric modules for Hugging Face `evaluate`, loaded by path and offline."""

from __future__ import annotations

from pathlib import Path

NAMES = ("equivariance_error", "latent_health", "rfid", "gfid")


def module_path(name: str) -> str:
    """What `evaluate.load` takes for one of `NAMES`.

    Example:
        >>> import evaluate
        >>> metric = evaluate.load(module_path("equivariance_error"))

    Raises:
        ValueError: a name that is not among them.
    """
    if name not in NAMES:
        raise ValueError(f"The metric modules are {', '.join(NAMES)}; got {name!r}.")
    return str(Path(__file__).parent / name)
