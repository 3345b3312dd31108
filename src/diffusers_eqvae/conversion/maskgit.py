"""Weights of MaskGIT's PyTorch port (arXiv:2202.04200, https://github.com/valeoai/Maskgit-pytorch)."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..models.transformer_maskgit import MaskGITTransformer2DModel
from .base import Converter, register_converter

logger = logging.getLogger(__name__)

# Published <-> ours, as beginnings of names; {} is the number of a block.
_NAMES = {
    "tok_emb.": "token_embedder.",
    "pos_emb": "pos_embed",
    "first_layer.": "proj_in.",
    "last_layer.": "proj_out.",
    "transformer.layers.{}.0.norm.": "transformer_blocks.{}.norm1.",
    "transformer.layers.{}.0.fn.mha.in_proj_": "transformer_blocks.{}.attn.to_qkv.",
    "transformer.layers.{}.0.fn.mha.out_proj.": "transformer_blocks.{}.attn.to_out.",
    "transformer.layers.{}.1.norm.": "transformer_blocks.{}.norm2.",
    "transformer.layers.{}.1.fn.net.": "transformer_blocks.{}.ff.",
    "bias": "logit_bias",
}
PUBLISHED_CLASSES = 1000


@register_converter("maskgit")
class MaskGITConverter(Converter):
    """The port's network is ours under other names.

    The number of heads leaves no trace: it is that of the preset of the same width. Tokens, mask, classes and "no
    class" share one table, so how many of its rows are classes is taken as 1000 unless `num_classes` says otherwise.
    """

    target = MaskGITTransformer2DModel

    def matches(self, shapes: Mapping[str, torch.Size]) -> bool:
        return {"tok_emb.weight", "pos_emb", "bias", "transformer.layers.0.0.fn.mha.in_proj_weight"} <= shapes.keys()

    def config(self, tensors: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> dict[str, Any]:
        rows, width = tensors["tok_emb.weight"].shape
        presets = MaskGITTransformer2DModel.PRESETS.values()
        by_width = {p["num_attention_heads"] * p["attention_head_dim"]: p["num_attention_heads"] for p in presets}
        heads = overrides.get("num_attention_heads") or by_width.get(width)
        if heads is None:
            raise ValueError(f"No preset is {width} wide, so the heads are unknown. Give num_attention_heads.")
        num_classes = overrides.get("num_classes")
        if num_classes is None:
            num_classes = PUBLISHED_CLASSES
            logger.warning(
                "The table of %d rows is taken as %d classes, mask, no class and tokens.", rows, num_classes
            )
        if rows - num_classes - 2 < 1:
            raise ValueError(f"A table of {rows} rows has no place for {num_classes} classes. Give num_classes.")
        blocks = [re.fullmatch(r"transformer\.layers\.(\d+)\.0\.norm\.weight", name) for name in tensors]
        return {
            "sample_size": _side(tensors["pos_emb"].shape[1] - 1, overrides),
            "codebook_size": rows - num_classes - 2,
            "num_layers": 1 + max((int(match[1]) for match in blocks if match), default=-1),
            "num_attention_heads": heads,
            "attention_head_dim": width // heads,
            "mlp_ratio": tensors["transformer.layers.0.1.fn.net.0.weight"].shape[0] / width,
            "num_classes": num_classes,
            **overrides,
        }

    def to_ours(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        return {_renamed(name, _NAMES): tensor for name, tensor in tensors.items()}

    def from_ours(self, state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        names = {ours: published for published, ours in _NAMES.items()}
        return {_renamed(name, names): tensor for name, tensor in state_dict.items()}


def _side(tokens: int, overrides: Mapping[str, Any]) -> int:
    side = math.isqrt(tokens)
    if side * side != tokens and "sample_size" not in overrides:
        raise ValueError(f"{tokens} positions are not a square of tokens. Give sample_size.")
    return side


def _renamed(name: str, names: Mapping[str, str]) -> str:
    for theirs, ours in names.items():
        match = re.match(re.escape(theirs).replace(r"\{\}", r"(\d+)"), name)
        if match:
            return ours.format(*match.groups()) + name[match.end() :]
    return name
