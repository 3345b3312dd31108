"""What the layouts of DiT, SiT, REPA and LightningDiT share: one network, one set of names, three conventions.

| layout | time it embeds | what it predicts             | here                                         |
|--------|----------------|------------------------------|----------------------------------------------|
| SiT    | t = 1 - sigma  | d x / d t = -(d x / d sigma) | last layer negated                           |
| REPA   | sigma          | d x / d sigma                | first time layer reflected (`repa`)          |
| DiT    | step 0 .. 999  | noise (and variance)         | unchanged                                    |

LightningDiT follows SiT, with other parts in the block (`lightningdit`).
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..models.positions import sincos_position_embedding
from ..models.transformer_sit import SiTTransformer2DModel
from .base import Converter

logger = logging.getLogger(__name__)

_LAYERS = {
    "x_embedder.proj": "patch_embed",
    "t_embedder.mlp.0": "time_embedder.linear_1",
    "t_embedder.mlp.2": "time_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.norm_final": "norm_out",
}
_BLOCK_LAYERS = {
    "attn.qkv": "attn.to_qkv",
    "attn.proj": "attn.to_out",
    "attn.q_norm": "attn.norm_q",
    "attn.k_norm": "attn.norm_k",
    "norm1": "norm1",
    "norm2": "norm2",
}
_FEED_FORWARDS = {
    "gelu": {"mlp.fc1": "ff.linear_1", "mlp.fc2": "ff.linear_2"},
    "swiglu": {"mlp.w12": "ff.linear_1", "mlp.w3": "ff.linear_2"},
}
# Of which only LightningDiT has any.
LIGHTNING_PARTS = {"blocks.0.norm1.weight", "blocks.0.mlp.w12.weight", "feat_rope.freqs_cos"}
PLAIN_BLOCK = {"norm": "layer_norm", "feed_forward": "gelu", "rotary": False}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")
_OUR_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)\.(weight|bias)")
_MODULATION = "blocks.{}.adaLN_modulation.1"
_LAST_MODULATION = "final_layer.adaLN_modulation.1"
_LABELS = "y_embedder.embedding_table.weight"
_OUR_LABELS = "class_embedder.weight"


class TransformerConverter(Converter):
    """The shared names; a layout says its `conventions` (entries of the config) and how weights `change` for them."""

    target = SiTTransformer2DModel
    idle: ClassVar[tuple[str, ...]] = ("pos_embed",)  # fixed, and computed by our model
    conventions: ClassVar[dict[str, Any]] = {
        "objective": "flow_matching",
        "prediction_type": "flow_prediction",
        **PLAIN_BLOCK,
    }
    has_projectors: ClassVar[bool] = False

    def change(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Between the layout's conventions and ours; its own inverse."""
        return state_dict

    def matches(self, shapes: Mapping[str, torch.Size]) -> bool:
        projectors = any(name.startswith("projectors.") for name in shapes)
        other_parts = bool(LIGHTNING_PARTS & shapes.keys())
        names = {"x_embedder.proj.weight", _LABELS, "blocks.0.attn.qkv.weight"}
        return names <= shapes.keys() and projectors == self.has_projectors and not other_parts

    def config(self, tensors: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> dict[str, Any]:
        """From the shapes, and the latent size from the fixed position table.

        The number of heads leaves no trace: it is that of the preset of the same width. A label table of R rows is
        taken as R - 1 classes and the null class, or as R classes without one where `num_classes` says so.
        """
        patch = tensors["x_embedder.proj.weight"]
        hidden_size, in_channels, patch_size, _ = patch.shape
        heads = overrides.get("num_attention_heads") or _heads_by_width().get(hidden_size)
        if heads is None:
            raise ValueError(f"No preset is {hidden_size} wide, so the heads are unknown. Give num_attention_heads.")
        config = {
            "patch_size": patch_size,
            "in_channels": in_channels,
            "num_layers": _depth(tensors),
            "num_attention_heads": heads,
            "attention_head_dim": hidden_size // heads,
            "mlp_ratio": self.mlp_ratio(tensors, hidden_size),
            "learn_sigma": tensors["final_layer.linear.weight"].shape[0] == 2 * in_channels * patch_size**2,
            "qk_norm": "blocks.0.attn.q_norm.weight" in tensors,
            **_class_options(tensors[_LABELS].shape[0], overrides.get("num_classes")),
            **self.conventions,
            **overrides,
        }
        if "sample_size" not in config:
            config["sample_size"] = _sample_size(tensors, patch_size)
        return config

    def mlp_ratio(self, tensors: Mapping[str, Tensor], hidden_size: int) -> float:
        """Width of the MLP over that of the network."""
        return tensors["blocks.0.mlp.fc1.weight"].shape[0] / hidden_size

    def to_ours(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        state_dict = {}
        block_layers = _BLOCK_LAYERS | _FEED_FORWARDS[config["feed_forward"]]
        for name, tensor in tensors.items():
            ours = _renamed(name, _BLOCK, "transformer_blocks", _LAYERS, block_layers)
            if ours is not None:
                state_dict[ours] = tensor
        modulations = [*map(_MODULATION.format, range(config["num_layers"])), _LAST_MODULATION]
        for kind in ("weight", "bias"):
            state_dict[f"modulation.{kind}"] = torch.cat([tensors[f"{name}.{kind}"] for name in modulations])
        if not _has_null_class(config):
            table = state_dict[_OUR_LABELS]
            state_dict[_OUR_LABELS] = torch.cat([table, torch.zeros_like(table[:1])])
        return self.change(state_dict)

    def from_ours(self, state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        self._require_conventions(config)
        layers = {ours: name for name, ours in _LAYERS.items()}
        parts = _BLOCK_LAYERS | _FEED_FORWARDS[config.get("feed_forward", "gelu")]
        block_layers = {ours: name for name, ours in parts.items()}
        published: dict[str, Tensor] = {}
        for name, tensor in self.change(dict(state_dict)).items():
            renamed = _renamed(name, _OUR_BLOCK, "blocks", layers, block_layers)
            if renamed is not None:
                published[renamed] = tensor
            elif name.startswith("modulation."):
                published |= _split_modulation(tensor, name.removeprefix("modulation."), config["num_layers"])
            else:
                raise ValueError(
                    f"{name!r} is not a parameter of {self.target.__name__}. Pass its state_dict(), adapters merged."
                )
        if not _has_null_class(config):
            published[_LABELS] = published[_LABELS][:-1]
        hidden_size = config["num_attention_heads"] * config["attention_head_dim"]
        return published | {"pos_embed": sincos_position_embedding(*_grid(config), hidden_size)}

    def _require_conventions(self, config: Mapping[str, Any]) -> None:
        for key, value in self.conventions.items():
            if config.get(key, value) != value:
                raise ValueError(
                    f"A model with {key}={config[key]!r} cannot be written in this layout, which has {value!r}; "
                    "choose the layout of its family."
                )


def _renamed(
    name: str, block_pattern: re.Pattern[str], blocks: str, layers: dict[str, str], block_layers: dict[str, str]
) -> str | None:
    match = block_pattern.fullmatch(name)
    if match:
        layer = block_layers.get(match[2])
        return f"{blocks}.{match[1]}.{layer}.{match[3]}" if layer else None
    layer, _, kind = name.rpartition(".")
    return f"{layers[layer]}.{kind}" if layer in layers else None


def _split_modulation(tensor: Tensor, kind: str, depth: int) -> dict[str, Tensor]:
    """The one modulation layer, weight or bias, as 6 D rows for each block and 2 D for the last layer."""
    hidden_size = len(tensor) // (6 * depth + 2)
    *blocks, last = tensor.split(6 * hidden_size)
    names = [*map(_MODULATION.format, range(depth)), _LAST_MODULATION]
    return {f"{name}.{kind}": rows.clone() for name, rows in zip(names, [*blocks, last], strict=True)}


def _depth(tensors: Mapping[str, Tensor]) -> int:
    return 1 + max((int(match[1]) for match in map(_BLOCK.fullmatch, tensors) if match), default=-1)


def _class_options(rows: int, num_classes: int | None) -> dict[str, Any]:
    """`Embedding(num_classes + 1)` where labels were dropped in training, `Embedding(num_classes)` where not."""
    if num_classes is None:
        logger.warning(
            "The label table of %d rows is taken as %d classes and the null class; without one, give num_classes=%d.",
            *(rows, rows - 1, rows),
        )
        return {"num_classes": rows - 1}
    if rows not in (num_classes, num_classes + 1):
        raise ValueError(f"num_classes={num_classes} needs a label table of as many rows or one more; it has {rows}.")
    return {} if rows == num_classes + 1 else {"class_dropout_prob": 0.0}


def _has_null_class(config: Mapping[str, Any]) -> bool:
    return config.get("class_dropout_prob") != 0


def _heads_by_width() -> dict[int, int]:
    presets = SiTTransformer2DModel.PRESETS.values()
    return {p["num_attention_heads"] * p["attention_head_dim"]: p["num_attention_heads"] for p in presets}


def _grid(config: Mapping[str, Any]) -> tuple[int, int]:
    """Tokens along height and width."""
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return height // config["patch_size"], width // config["patch_size"]


def _sample_size(tensors: Mapping[str, Tensor], patch_size: int) -> int | tuple[int, int]:
    """Of the (rows, columns) whose fixed position table this is; nearest to a square first."""
    if "pos_embed" not in tensors:
        raise ValueError("Without pos_embed the size of the latents is unknown. Give sample_size.")
    _, tokens, hidden_size = tensors["pos_embed"].shape
    sides = [side for side in range(1, tokens + 1) if tokens % side == 0]
    for rows in sorted(sides, key=lambda side: abs(math.log(side * side / tokens))):
        columns = tokens // rows
        table = sincos_position_embedding(rows, columns, hidden_size).to(tensors["pos_embed"].device)
        if torch.allclose(tensors["pos_embed"].float(), table, atol=1e-3):
            return rows * patch_size if rows == columns else (rows * patch_size, columns * patch_size)
    raise ValueError(
        "The checkpoint's `pos_embed` is not the fixed 2-D sin-cos table of SiT and DiT; the model holds no other. "
        "Convert a checkpoint with fixed positions."
    )
