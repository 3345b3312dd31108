"""The single file of FLUX.2's autoencoder: latent diffusion's names, quant_conv inside a half, and a batch norm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2
from torch import Tensor

from ._ldm_names import MARKS, inferred_config, renamed_to_ours, renamed_to_published
from .base import Converter, register_converter

_COUNT = "bn.num_batches_tracked"
# Published <-> ours; where a half of the autoencoder has its 1x1 convolution.
_INSIDE = {"encoder.quant_conv.": "quant_conv.", "decoder.post_quant_conv.": "post_quant_conv."}


@register_converter("flux2")
class Flux2Converter(Converter):
    """Its latents' normalisation is in the file, the batch norm's running mean and variance.

    The decoder may be narrower than the encoder. How many batches the statistics are from, which nothing reads, may be
    missing and is then 0.
    """

    target = AutoencoderKLFlux2
    inside = ("first_stage_model.", "vae.")
    idle = (_COUNT,)

    def matches(self, shapes: Mapping[str, torch.Size]) -> bool:
        return shapes.keys() >= {*MARKS, "bn.running_mean"}

    def config(self, tensors: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> dict[str, Any]:
        config = inferred_config(tensors)
        channels, levels = tensors["decoder.conv_in.weight"].shape[1], len(config["block_out_channels"])
        widths = [tensors[f"decoder.up.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
        side = math.isqrt(len(tensors["bn.running_mean"]) // channels)
        return {
            **config,
            "decoder_block_out_channels": None if widths == config["block_out_channels"] else widths,
            "latent_channels": channels,
            "use_quant_conv": "encoder.quant_conv.weight" in tensors,
            "use_post_quant_conv": "decoder.post_quant_conv.weight" in tensors,
            "patch_size": [side, side],
            **overrides,
        }

    def to_ours(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        lifted = {_replaced(name, _INSIDE): tensor for name, tensor in tensors.items()}
        return {_COUNT: torch.zeros((), dtype=torch.int64)} | renamed_to_ours(lifted, config)

    def from_ours(self, state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        back = {ours: published for published, ours in _INSIDE.items()}
        published = renamed_to_published(state_dict, config)
        return {_replaced(name, back): tensor for name, tensor in published.items()}


def _replaced(name: str, prefixes: Mapping[str, str]) -> str:
    found = next((each for each in prefixes if name.startswith(each)), "")
    return prefixes.get(found, "") + name.removeprefix(found)
