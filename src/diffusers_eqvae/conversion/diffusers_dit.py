"""DiT's weights as diffusers' DiTTransformer2DModel keeps them (facebook/DiT-XL-2-256 and -512)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .base import register_converter
from .dit import DiTConverter

_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)\.(weight|bias)")
_EMBEDDER = "norm1.emb."
_EMBEDDERS = {
    "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
}
_LAYERS = {"pos_embed.proj": "x_embedder.proj", "proj_out_1": "final_layer.adaLN_modulation.1"}
_LAYERS |= {"proj_out_2": "final_layer.linear"}
_BLOCK_LAYERS = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
_QUERY_KEY_VALUE = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
_POSITIONS = {"pos_embed.pos_embed": "pos_embed"}


@register_converter("diffusers_dit")
class DiffusersDiTConverter(DiTConverter):
    """DiT's network under other names, with one time and label embedder per block instead of one for all.

    Those of every block must be equal, as they are in the published weights; others are another network and refused.
    The position table, where it is there, says the size of the latents; otherwise `sample_size` must be given.

    Differs from the reference: diffusers' class embeds the step by other frequencies, exp(-ln(1e4) i / 127), than DiT
    was trained with, i / 128, and one norm of each block has another epsilon. Converted weights compute what DiT does;
    written in this layout they are read by that class with its own conventions.
    """

    idle = ("pos_embed.pos_embed",)

    def matches(self, shapes: Mapping[str, torch.Size]) -> bool:
        names = {"pos_embed.proj.weight", "proj_out_1.weight", "transformer_blocks.0.attn1.to_q.weight"}
        return {*names, "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight"} <= shapes.keys()

    def config(self, tensors: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> dict[str, Any]:
        _require_equal_embedders(tensors)
        return super().config(_as_dit(tensors), overrides)

    def to_ours(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        return super().to_ours(_as_dit(tensors), config)

    def from_ours(self, state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        published: dict[str, Tensor] = {}
        layers = {dit: name for name, dit in (_LAYERS | _POSITIONS).items()}
        block_layers = {dit: name for name, dit in _BLOCK_LAYERS.items()}
        embedders = {dit: name for name, dit in _EMBEDDERS.items()}
        for name, tensor in super().from_ours(state_dict, config).items():
            layer, _, kind = name.rpartition(".")
            block = re.fullmatch(r"blocks\.(\d+)\.(.+)", layer)
            if name in layers:
                published[layers[name]] = tensor
            elif layer in layers:
                published[f"{layers[layer]}.{kind}"] = tensor
            elif block is None:  # each block has a copy of the embedders
                every = range(config["num_layers"])
                published |= {f"transformer_blocks.{n}.{embedders[layer]}.{kind}": tensor.clone() for n in every}
            elif block[2] == "attn.qkv":
                parts = zip(_QUERY_KEY_VALUE, tensor.chunk(3), strict=True)
                published |= {f"transformer_blocks.{block[1]}.{part}.{kind}": rows.clone() for part, rows in parts}
            else:
                published[f"transformer_blocks.{block[1]}.{block_layers[block[2]]}.{kind}"] = tensor
        return published


def _as_dit(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under DiT's own names; what has none is left out, since `_require_tensors` names it."""
    found: dict[str, Tensor] = {ours: tensors[name] for name, ours in _POSITIONS.items() if name in tensors}
    for name, tensor in tensors.items():
        match = _BLOCK.fullmatch(name)
        layer, _, kind = name.rpartition(".")
        if layer in _LAYERS:
            found[f"{_LAYERS[layer]}.{kind}"] = tensor
        elif match and match[2] in _EMBEDDERS:
            found[f"{_EMBEDDERS[match[2]]}.{kind}"] = tensor
        elif match and match[2] == _QUERY_KEY_VALUE[0]:
            parts = [tensors[f"transformer_blocks.{match[1]}.{part}.{kind}"] for part in _QUERY_KEY_VALUE]
            found[f"blocks.{match[1]}.attn.qkv.{kind}"] = torch.cat(parts)
        elif match and match[2] in _BLOCK_LAYERS:
            found[f"blocks.{match[1]}.{_BLOCK_LAYERS[match[2]]}.{kind}"] = tensor
    return found


def _require_equal_embedders(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        match = _BLOCK.fullmatch(name)
        first = tensors.get(f"transformer_blocks.0.{match[2]}.{match[3]}") if match else None
        if match and match[2].startswith(_EMBEDDER) and first is not None and not torch.equal(first, tensor):
            raise ValueError(
                f"{name} differs from that of block 0, and DiT has one embedder for all blocks: these are the weights "
                "of another network, trained by diffusers' class; keep them with DiTTransformer2DModel."
            )
