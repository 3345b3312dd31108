"""The precision of every loss: float32 at least, whatever the model computed in."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or unchanged where it is float64: a sum of thousands of bf16 terms is not worth having."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def require_equal_shapes(first: Tensor, second: Tensor, names: tuple[str, str]) -> None:
    """Raises a ValueError where broadcasting would silently compare the wrong elements."""
    if first.shape != second.shape:
        raise ValueError(
            f"{names[0]} and {names[1]} must have equal shapes; got {tuple(first.shape)} and {tuple(second.shape)}."
        )
