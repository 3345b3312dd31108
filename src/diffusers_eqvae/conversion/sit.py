"""Published SiT, DiT and REPA weights <-> `SiTTransformer2DModel`, exactly and both ways.

The three families share one network and its parameter names, and differ in what goes in and what comes out:

| family | time it embeds | what it predicts             | here                                         |
|--------|----------------|------------------------------|----------------------------------------------|
| SiT    | t = 1 - sigma  | d x / d t = -(d x / d sigma) | last layer negated                           |
| REPA   | sigma          | d x / d sigma                | first time layer reflected (`_reflect_time`) |
| DiT    | step 0 .. 999  | noise (and variance)         | unchanged, objective="denoising"   |
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.embeddings import Timesteps
from torch import Tensor

from diffusers_eqvae.models.transformer_sit import (
    TIME_CHANNELS,
    SiTTransformer2DModel,
    sincos_position_embedding,
)

logger = logging.getLogger(__name__)

FAMILIES = ("SiT", "REPA", "DiT")

_LAYERS = {
    "x_embedder.proj": "patch_embed",
    "t_embedder.mlp.0": "time_embedder.linear_1",
    "t_embedder.mlp.2": "time_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder",
    "final_layer.linear": "proj_out",
}
_BLOCK_LAYERS = {
    "attn.qkv": "attn.to_qkv",
    "attn.proj": "attn.to_out",
    "attn.q_norm": "attn.norm_q",
    "attn.k_norm": "attn.norm_k",
    "mlp.fc1": "ff.linear_1",
    "mlp.fc2": "ff.linear_2",
}
_TO_OURS = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")
_TO_PUBLISHED = re.compile(r"transformer_blocks\.(\d+)\.(.+)\.(weight|bias)")
_BLOCK_MODULATION = "blocks.{}.adaLN_modulation.1"
_LAST_MODULATION = "final_layer.adaLN_modulation.1"


def convert_sit_state_dict(published: Mapping[str, Tensor], *, family: str = "SiT") -> dict[str, Tensor]:
    """The state dict of a `SiTTransformer2DModel` from published parameters (see `infer_sit_config` for its config).

    Args:
        published: parameters under the names of the SiT, DiT or REPA code. The position table is fixed and dropped;
            REPA's projectors serve its training only and are dropped with a warning that names them.
        family: whose conventions the weights follow: "SiT", "REPA" or "DiT".

    Raises:
        ValueError: for an unknown family, projectors in a family that has none, or missing parameters.
    """
    _check_family(family)
    depth = _depth(published)
    state_dict: dict[str, Tensor] = {}
    ignored = []
    for name, tensor in published.items():
        ours = _renamed(name, _TO_OURS, "transformer_blocks", _LAYERS, _BLOCK_LAYERS)
        if ours is not None:
            state_dict[ours] = tensor
        elif "adaLN_modulation" not in name and name != "pos_embed":
            ignored.append(name)
    _report_ignored(ignored, family)

    modulations = [_BLOCK_MODULATION.format(index) for index in range(depth)] + [_LAST_MODULATION]
    missing = [name for name in [*modulations, *_LAYERS] if f"{name}.weight" not in published]
    if missing:
        raise ValueError(f"The checkpoint lacks {', '.join(missing)}. Pass the whole (EMA) state dict of the model.")
    for kind in ("weight", "bias"):
        state_dict[f"modulation.{kind}"] = torch.cat([published[f"{name}.{kind}"] for name in modulations])
    return _change_conventions(state_dict, family)


def convert_sit_state_dict_to_published(
    state_dict: Mapping[str, Tensor], *, family: str = "SiT", grid: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """The inverse of `convert_sit_state_dict`.

    Args:
        state_dict: of a `SiTTransformer2DModel`.
        family: the conventions to write: "SiT", "REPA" or "DiT".
        grid: tokens along height and width; adds the `pos_embed` that the published code's strict loading asks for.
    """
    _check_family(family)
    state_dict = _change_conventions(dict(state_dict), family)
    layers = {ours: name for name, ours in _LAYERS.items()}
    block_layers = {ours: name for name, ours in _BLOCK_LAYERS.items()}
    published: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if name.startswith("modulation."):
            kind = name.removeprefix("modulation.")
            hidden_size = state_dict["modulation.weight"].shape[1]
            *blocks, last = tensor.split(6 * hidden_size)
            published.update(
                {f"{_BLOCK_MODULATION.format(i)}.{kind}": block.clone() for i, block in enumerate(blocks)}
            )
            published[f"{_LAST_MODULATION}.{kind}"] = last.clone()
            continue
        renamed = _renamed(name, _TO_PUBLISHED, "blocks", layers, block_layers)
        if renamed is None:
            raise ValueError(
                f"{name!r} is no parameter of SiTTransformer2DModel. Pass its state_dict(), adapters merged."
            )
        published[renamed] = tensor
    if grid is not None:
        published["pos_embed"] = sincos_position_embedding(*grid, state_dict["modulation.weight"].shape[1])
    return published


def infer_sit_config(
    published: Mapping[str, Tensor], *, family: str = "SiT", num_attention_heads: int | None = None
) -> dict[str, Any]:
    """The constructor arguments of the model that published weights belong to, from their shapes.

    The latent size comes from the position table. The number of heads leaves no trace in the shapes: it is that of
    the preset of the same width unless given. The label table is taken to have a null class (trained with dropout).

    Raises:
        ValueError: when heads or size cannot be told, or the position table is not the fixed one.
    """
    _check_family(family)
    hidden_size, in_channels, patch_size, _ = published["x_embedder.proj.weight"].shape
    heads = num_attention_heads or _heads_by_width().get(hidden_size)
    if heads is None:
        raise ValueError(f"No preset is {hidden_size} wide, so the heads are unknown. Pass `num_attention_heads`.")
    rows, columns = _grid_of(published["pos_embed"])
    out_channels = published["final_layer.linear.weight"].shape[0] // patch_size**2
    return {
        "sample_size": rows * patch_size if rows == columns else (rows * patch_size, columns * patch_size),
        "patch_size": patch_size,
        "in_channels": in_channels,
        "num_layers": _depth(published),
        "num_attention_heads": heads,
        "attention_head_dim": hidden_size // heads,
        "mlp_ratio": published["blocks.0.mlp.fc1.weight"].shape[0] / hidden_size,
        "num_classes": published["y_embedder.embedding_table.weight"].shape[0] - 1,
        "learn_sigma": out_channels == 2 * in_channels,
        "qk_norm": "blocks.0.attn.q_norm.weight" in published,
        "objective": "denoising" if family == "DiT" else "flow_matching",
        "prediction_type": "epsilon" if family == "DiT" else "flow_prediction",
    }


def _change_conventions(state_dict: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """Between a family's conventions and ours; its own inverse."""
    if family == "SiT":
        for kind in ("weight", "bias"):
            state_dict[f"proj_out.{kind}"] = -state_dict[f"proj_out.{kind}"]
    elif family == "REPA":
        name = "time_embedder.linear_1.weight"
        state_dict[name] = _reflect_time(state_dict[name])
    return state_dict


def _reflect_time(weight: Tensor) -> Tensor:
    """The layer that does on [cos | sin](f * t) what `weight` does on [cos | sin](f * (1 - t)).

    cos(f - ft) = cos f cos ft + sin f sin ft and sin(f - ft) = sin f cos ft - cos f sin ft, so a reflection of each
    frequency's two columns exchanges t and 1 - t; done twice it is the identity.
    """
    frequencies = Timesteps(TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
    cos, sin = frequencies(torch.ones(1, device=weight.device)).double().chunk(2, dim=1)
    norm = (cos.square() + sin.square()).sqrt()
    cos, sin = cos / norm, sin / norm
    by_cos, by_sin = weight.double().chunk(2, dim=1)
    return torch.cat([by_cos * cos + by_sin * sin, by_cos * sin - by_sin * cos], dim=1).to(weight.dtype)


def _renamed(
    name: str, block_pattern: re.Pattern[str], blocks: str, layers: dict[str, str], block_layers: dict[str, str]
) -> str | None:
    match = block_pattern.fullmatch(name)
    if match:
        layer = block_layers.get(match[2])
        return f"{blocks}.{match[1]}.{layer}.{match[3]}" if layer else None
    layer, _, kind = name.rpartition(".")
    return f"{layers[layer]}.{kind}" if layer in layers else None


def _depth(published: Mapping[str, Tensor]) -> int:
    indices = {int(match[1]) for match in map(_TO_OURS.fullmatch, published) if match}
    if indices != set(range(len(indices))) or not indices:
        raise ValueError(
            "The state dict must hold blocks.0 .. blocks.N-1 of a SiT, DiT or REPA model; got "
            f"{', '.join(list(published)[:5]) or 'nothing'}, ... Pass the checkpoint's 'ema' or 'model' entry."
        )
    return len(indices)


def _report_ignored(ignored: list[str], family: str) -> None:
    if any(name.startswith("projectors.") for name in ignored) and family != "REPA":
        raise ValueError(
            f"The checkpoint has projectors, a mark of REPA, whose time and sign differ from {family}'s. "
            'Pass family="REPA", or remove the projectors.* entries first.'
        )
    if ignored:
        logger.warning("Not part of the transformer, left out: %s", ", ".join(ignored))


def _check_family(family: str) -> None:
    if family not in FAMILIES:
        raise ValueError(f"`family` must be one of {FAMILIES}; got {family!r}.")


def _heads_by_width() -> dict[int, int]:
    presets = SiTTransformer2DModel.PRESETS.values()
    return {p["num_attention_heads"] * p["attention_head_dim"]: p["num_attention_heads"] for p in presets}


def _grid_of(pos_embed: Tensor) -> tuple[int, int]:
    """The (rows, columns) whose fixed position table this is; the squarest first."""
    _, tokens, hidden_size = pos_embed.shape
    sides = [side for side in range(1, tokens + 1) if tokens % side == 0]
    for rows in sorted(sides, key=lambda side: abs(math.log(side * side / tokens))):
        table = sincos_position_embedding(rows, tokens // rows, hidden_size).to(pos_embed.device)
        if torch.allclose(pos_embed.float(), table, atol=1e-3):
            return rows, tokens // rows
    raise ValueError(
        "The checkpoint's `pos_embed` is not the fixed 2-D sin-cos table of SiT and DiT; the model holds no other. "
        "Convert a checkpoint with fixed positions."
    )
