"""TAESD's two files, taesd_encoder and taesd_decoder, or the one that ComfyUI makes of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from ._files import HALVES
from .base import Converter, register_converter

_ENCODER, _DECODER = HALVES
_BLOCK = re.compile(r"(\d+)\.conv\.0\.weight")
_LAYER = re.compile(r"(\d+)\.weight")


@register_converter("taesd")
class TAESDConverter(Converter):
    """diffusers' AutoencoderTiny under other names: the decoder counts its clamp as layer 0, diffusers does not.

    What the model gives are latents as the generator of SD, SDXL, SD3 or FLUX sees them, and no tensor of TAESD says
    of which; ComfyUI's file does, in vae_scale and vae_shift, which are left out.
    """

    target = AutoencoderTiny
    idle = ("vae_scale", "vae_shift")

    def matches(self, shapes: Mapping[str, torch.Size]) -> bool:
        return {f"{_ENCODER}0.weight", f"{_DECODER}1.weight"} <= shapes.keys()

    def config(self, tensors: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> dict[str, Any]:
        encoder, decoder = (_half(tensors, half) for half in HALVES)
        encoder_blocks, encoder_widths = _levels(encoder, opens_level=True)
        decoder_blocks, decoder_widths = _levels(decoder, opens_level=False)
        return {
            "in_channels": encoder["0.weight"].shape[1],
            "out_channels": decoder[f"{_last(decoder)}.weight"].shape[0],
            "latent_channels": decoder["1.weight"].shape[1],
            "encoder_block_out_channels": encoder_widths,
            "decoder_block_out_channels": decoder_widths,
            "num_encoder_blocks": encoder_blocks,
            "num_decoder_blocks": decoder_blocks,
            **overrides,
        }

    def to_ours(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        ours = {f"encoder.layers.{name}": tensor for name, tensor in _half(tensors, _ENCODER).items()}
        return ours | {
            f"decoder.layers.{_moved(name, -1)}": tensor for name, tensor in _half(tensors, _DECODER).items()
        }

    def from_ours(self, state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        encoder, decoder = (_half(state_dict, prefix) for prefix in ("encoder.layers.", "decoder.layers."))
        published = {f"{_ENCODER}{name}": tensor for name, tensor in encoder.items()}
        return published | {f"{_DECODER}{_moved(name, 1)}": tensor for name, tensor in decoder.items()}

    def notes(self, config: Mapping[str, Any]) -> list[str]:
        return [
            "ComfyUI takes two files in models/vae_approx, NAME_encoder and NAME_decoder; NAME is taesd, taesdxl, "
            "taesd3 or taef1 and says how latents are normalised. The destination NAME_encoder.safetensors gives both."
        ]


def _half(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _moved(name: str, places: int) -> str:
    layer, _, rest = name.partition(".")
    return f"{int(layer) + places}.{rest}"


def _last(half: Mapping[str, Tensor]) -> int:
    return max(int(name.partition(".")[0]) for name in half)


def _levels(half: Mapping[str, Tensor], *, opens_level: bool) -> tuple[list[int], list[int]]:
    """Residual blocks and width of each level; a convolution opens one in the encoder and ends one in the decoder."""
    blocks = sorted(int(match[1]) for match in map(_BLOCK.fullmatch, half) if match)
    convolutions = sorted(int(match[1]) for match in map(_LAYER.fullmatch, half) if match)
    bounds = list(pairwise(convolutions))
    counts = [sum(start < block < end for block in blocks) for start, end in bounds]
    places = [start if opens_level else end for start, end in bounds]
    axis = 0 if opens_level else 1
    return counts, [half[f"{place}.weight"].shape[axis] for place in places]
