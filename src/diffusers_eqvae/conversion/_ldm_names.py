"""Names of latent diffusion's encoder and decoder <-> diffusers': one table for KL and VQ autoencoders.

    encoder.down.0.block.1.conv1.weight   encoder.down_blocks.0.resnets.1.conv1.weight
    decoder.up.3.upsample.conv.weight     decoder.up_blocks.0.upsamplers.0.conv.weight

Published decoder levels count from the image, and attention's projections are published as 1x1 convolutions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# Of one block, published <-> ours; what is not named is called alike.
_RESNET = {"nin_shortcut": "conv_shortcut"}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_LEVEL = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.(block|attn|downsample|upsample)\.(.+)")
_MIDDLE = re.compile(r"(encoder|decoder)\.mid\.(block|attn)_(\d)\.(.+)")
_KINDS = {"resnets": "block", "attentions": "attn", "downsamplers": "downsample", "upsamplers": "upsample"}
_ROOMS = {kind: room for room, kind in _KINDS.items()}
_OUR_LEVEL = re.compile(rf"(encoder\.down|decoder\.up)_blocks\.(\d+)\.({'|'.join(_KINDS)})\.(\d+)\.(.+)")
_OUR_MIDDLE = re.compile(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d)\.(.+)")
# Of both halves: what every checkpoint of this kind has.
MARKS = {"encoder.down.0.block.0.conv1.weight", "decoder.mid.block_1.conv1.weight"}


def inferred_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes tell of encoder and decoder, as constructor arguments; a KeyError names what is missing."""
    levels = _count(tensors, r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight")
    attended = [f"encoder.down.{level}.attn.0.norm.weight" in tensors for level in range(levels)]
    rising = [f"decoder.up.{level}.attn.0.norm.weight" in tensors for level in reversed(range(levels))]
    return {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors["decoder.conv_out.weight"].shape[0],
        "down_block_types": ["AttnDownEncoderBlock2D" if each else "DownEncoderBlock2D" for each in attended],
        "up_block_types": ["AttnUpDecoderBlock2D" if each else "UpDecoderBlock2D" for each in rising],
        "block_out_channels": [
            tensors[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)
        ],
        "layers_per_block": _count(tensors, r"encoder\.down\.0\.block\.(\d+)\.conv1\.weight"),
        "mid_block_add_attention": "encoder.mid.attn_1.norm.weight" in tensors,
    }


def renamed_to_ours(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Published tensors under diffusers' names."""
    levels = len(config["block_out_channels"])
    return {_ours(name, levels): _projection(name, tensor, 2) for name, tensor in tensors.items()}


def renamed_to_published(state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inverse of `renamed_to_ours`."""
    levels = len(config["block_out_channels"])
    renamed = {_published(name, levels): tensor for name, tensor in state_dict.items()}
    return {name: _projection(name, tensor, 4) for name, tensor in renamed.items()}


def _ours(name: str, levels: int) -> str:
    if match := _LEVEL.fullmatch(name):
        half, level, kind, rest = match.groups()
        place = int(level) if half == "encoder.down" else levels - 1 - int(level)
        prefix = f"{half}_blocks.{place}"
        if kind in ("downsample", "upsample"):
            return f"{prefix}.{_ROOMS[kind]}.0.{rest}"
        number, _, layer = rest.partition(".")
        return f"{prefix}.{_ROOMS[kind]}.{number}.{_layer(kind, layer)}"
    if match := _MIDDLE.fullmatch(name):
        half, kind, number, layer = match.groups()
        number = 0 if kind == "attn" else int(number) - 1
        return f"{half}.mid_block.{_ROOMS[kind]}.{number}.{_layer(kind, layer)}"
    return re.sub(r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out.", name)


def _published(name: str, levels: int) -> str:
    if match := _OUR_LEVEL.fullmatch(name):
        half, place, room, number, layer = match.groups()
        level = int(place) if half == "encoder.down" else levels - 1 - int(place)
        kind = _KINDS[room]
        if kind in ("downsample", "upsample"):
            return f"{half}.{level}.{kind}.{layer}"
        return f"{half}.{level}.{kind}.{number}.{_layer(kind, layer, back=True)}"
    if match := _OUR_MIDDLE.fullmatch(name):
        half, room, place, layer = match.groups()
        return f"{half}.mid.{_KINDS[room]}_{int(place) + 1}.{_layer(_KINDS[room], layer, back=True)}"
    return re.sub(r"^(encoder|decoder)\.conv_norm_out\.", r"\1.norm_out.", name)


def _layer(kind: str, layer: str, *, back: bool = False) -> str:
    """A layer of a resnet or an attention, with its .weight or .bias, under the other name."""
    names = _RESNET if kind == "block" else _ATTENTION
    name, _, value = layer.rpartition(".")
    return f"{({ours: each for each, ours in names.items()} if back else names).get(name, name)}.{value}"


def _projection(published: str, tensor: Tensor, dimensions: int) -> Tensor:
    """The weight of an attention's projection with as many dimensions: 4 as published, 2 as ours."""
    if not re.search(r"\.attn[._]\d+\.(q|k|v|proj_out)\.weight$", published):
        return tensor
    return tensor[:, :, 0, 0] if dimensions == 2 else tensor[:, :, None, None]


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    found = [int(match[1]) for match in map(re.compile(pattern).fullmatch, tensors) if match]
    if not found:
        raise KeyError(pattern.replace("\\", ""))
    return 1 + max(found)
