"""Weights of SiT (arXiv:2401.08740, https://github.com/willisma/SiT)."""

from __future__ import annotations

from torch import Tensor

from ._transformers import TransformerConverter
from .base import register_converter


@register_converter("sit")
class SiTConverter(TransformerConverter):
    """t = 1 - sigma as ours, and the velocity d x / d t = -(d x / d sigma): the last layer is negated."""

    def change(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        return state_dict | {name: -state_dict[name] for name in ("proj_out.weight", "proj_out.bias")}
