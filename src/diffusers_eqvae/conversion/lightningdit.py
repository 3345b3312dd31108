"""Weights of LightningDiT (arXiv:2501.01423, https://github.com/hustvl/LightningDiT)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ._transformers import LIGHTNING_PARTS
from .base import register_converter
from .sit import SiTConverter

_ROTARY = "feat_rope.freqs_cos"
_GATED = "blocks.0.mlp.w12.weight"
_WEIGHTED_NORM = "blocks.0.norm1.weight"


@register_converter("lightningdit")
class LightningDiTConverter(SiTConverter):
    """SiT's conventions; RMSNorm, SwiGLU and rotary positions where the tensors show them.

    The rotary tables are fixed and computed by our model; written back, they are not among the tensors. A block
    without shifts (`wo_shift`) is refused by its shapes.
    """

    idle = ("pos_embed", "feat_rope.*")
    conventions: ClassVar[dict[str, Any]] = {"objective": "flow_matching", "prediction_type": "flow_prediction"}

    def matches(self, shapes: Mapping[str, torch.Size]) -> bool:
        return "blocks.0.attn.qkv.weight" in shapes and bool(LIGHTNING_PARTS & shapes.keys())

    def config(self, tensors: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> dict[str, Any]:
        block: dict[str, Any] = {
            "norm": "rms_norm" if _WEIGHTED_NORM in tensors else "layer_norm",
            "feed_forward": "swiglu" if _GATED in tensors else "gelu",
            "rotary": _ROTARY in tensors,
        }
        if _ROTARY in tensors:  # one angle for each channel of a head
            block["num_attention_heads"] = tensors["x_embedder.proj.weight"].shape[0] // tensors[_ROTARY].shape[1]
        return super().config(tensors, {**block, **overrides})

    def mlp_ratio(self, tensors: Mapping[str, Tensor], hidden_size: int) -> float:
        """Of a gated MLP three halves of its width over the network's, as a quarter where that gives its width."""
        if _GATED not in tensors:
            return super().mlp_ratio(tensors, hidden_size)
        inner = tensors[_GATED].shape[0] // 2
        ratio = 1.5 * inner / hidden_size
        rounded = round(4 * ratio) / 4
        return rounded if int(2 / 3 * int(hidden_size * rounded)) == inner else ratio
