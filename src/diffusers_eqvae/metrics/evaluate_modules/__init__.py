"""Metric modules for Hugging Face `evaluate`, loaded by path and offline; `modules` holds their classes."""

from __future__ import annotations

from pathlib import Path

NAMES = ("equivariance_error", "gfid", "latent_health", "rfid")


def module_path(name: str) -> str:
    """What `evaluate.load` takes for one of `NAMES`.

    Example:
        >>> import evaluate
        >>> metric = evaluate.load(module_path("equivariance_error"))
    """
    if name not in NAMES:
        raise ValueError(f"The metric modules are {', '.join(NAMES)}; got {name!r}.")
    return str(Path(__file__).with_name(f"{name}.py"))
