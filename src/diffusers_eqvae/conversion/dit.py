"""Weights of DiT (arXiv:2212.09748, https://github.com/facebookresearch/DiT)."""

from __future__ import annotations

from typing import Any, ClassVar

from ._transformers import PLAIN_BLOCK, TransformerConverter
from .base import register_converter


@register_converter("dit")
class DiTConverter(TransformerConverter):
    """The network predicts the noise (and its variance) at steps 0 .. 999; no weight changes."""

    conventions: ClassVar[dict[str, Any]] = {"objective": "denoising", "prediction_type": "epsilon", **PLAIN_BLOCK}
