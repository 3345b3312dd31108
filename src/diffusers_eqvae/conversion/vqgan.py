"""Weights of VQ-GAN (arXiv:2012.09841, https://github.com/CompVis/taming-transformers) and MaskGIT's f16 tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..models.autoencoder_vq_eq import VQModelEQ
from .base import Converter, register_converter

_CODEBOOK = "quantize.embedding.weight"
# Of one block, published <-> ours; what is not named is called alike.
_RESNET = {"nin_shortcut": "conv_shortcut"}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_LEVEL = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.(block|attn|downsample|upsample)\.(.+)")
_MIDDLE = re.compile(r"(encoder|decoder)\.mid\.(block|attn)_(\d)\.(.+)")
_KINDS = {"resnets": "block", "attentions": "attn", "downsamplers": "downsample", "upsamplers": "upsample"}
_ROOMS = {kind: room for room, kind in _KINDS.items()}
_OUR_LEVEL = re.compile(rf"(encoder\.down|decoder\.up)_blocks\.(\d+)\.({'|'.join(_KINDS)})\.(\d+)\.(.+)")
_OUR_MIDDLE = re.compile(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d)\.(.+)")


@register_converter("vqgan")
class VQGANConverter(Converter):
    """taming's encoder, decoder and codebook are diffusers' under other names; decoder levels count from the image.

    Attention's projections are published as 1x1 convolutions. The losses' networks (LPIPS, discriminator) are left
    out. GroupNorm has 32 groups in every published model; another number leaves no trace (`norm_num_groups`).
    """

    target = VQModelEQ
    idle = ("loss.*", "colorize")

    def matches(self, shapes: Mapping[str, torch.Size]) -> bool:
        return {_CODEBOOK, "encoder.down.0.block.0.conv1.weight", "decoder.mid.block_1.conv1.weight"} <= shapes.keys()

    def config(self, tensors: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> dict[str, Any]:
        levels = _count(tensors, r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight")
        attended = [f"encoder.down.{level}.attn.0.norm.weight" in tensors for level in range(levels)]
        rising = [f"decoder.up.{level}.attn.0.norm.weight" in tensors for level in reversed(range(levels))]
        size, width = tensors[_CODEBOOK].shape
        return {
            "in_channels": tensors["encoder.conv_in.weight"].shape[1],
            "out_channels": tensors["decoder.conv_out.weight"].shape[0],
            "down_block_types": ["AttnDownEncoderBlock2D" if each else "DownEncoderBlock2D" for each in attended],
            "up_block_types": ["AttnUpDecoderBlock2D" if each else "UpDecoderBlock2D" for each in rising],
            "block_out_channels": [
                tensors[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)
            ],
            "layers_per_block": _count(tensors, r"encoder\.down\.0\.block\.(\d+)\.conv1\.weight"),
            "latent_channels": tensors["encoder.conv_out.weight"].shape[0],
            "num_vq_embeddings": size,
            "vq_embed_dim": width,
            "mid_block_add_attention": "encoder.mid.attn_1.norm.weight" in tensors,
            "scaling_factor": 1.0,
            **overrides,
        }

    def to_ours(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        levels = len(config["block_out_channels"])
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(("loss.", "colorize"))}
        return {_ours(name, levels): _projection(name, tensor, 2) for name, tensor in kept.items()}

    def from_ours(self, state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        if config.get("norm_type", "group") != "group":
            raise ValueError("A VQModel with norm_type='spatial' (MoVQ) cannot be written in this layout.")
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
