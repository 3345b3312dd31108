"""Weights of VQ-GAN (arXiv:2012.09841, https://github.com/CompVis/taming-transformers) and MaskGIT's f16 tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..models.autoencoder_vq_eq import VQModelEQ
from ._ldm_names import MARKS, inferred_config, renamed_to_ours, renamed_to_published
from .base import Converter, register_converter

_CODEBOOK = "quantize.embedding.weight"


@register_converter("vqgan")
class VQGANConverter(Converter):
    """taming's encoder, decoder and codebook are diffusers' under other names.

    The losses' networks (LPIPS, discriminator) are left out. GroupNorm has 32 groups in every published model; another
    number leaves no trace (`norm_num_groups`).
    """

    target = VQModelEQ
    idle = ("loss.*", "colorize")

    def matches(self, shapes: Mapping[str, torch.Size]) -> bool:
        return MARKS | {_CODEBOOK} <= shapes.keys()

    def config(self, tensors: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> dict[str, Any]:
        size, width = tensors[_CODEBOOK].shape
        return {
            **inferred_config(tensors),
            "latent_channels": tensors["encoder.conv_out.weight"].shape[0],
            "num_vq_embeddings": size,
            "vq_embed_dim": width,
            "scaling_factor": 1.0,
            **overrides,
        }

    def to_ours(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(("loss.", "colorize"))}
        return renamed_to_ours(kept, config)

    def from_ours(self, state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        if config.get("norm_type", "group") != "group":
            raise ValueError("A VQModel with norm_type='spatial' (MoVQ) cannot be written in this layout.")
        return renamed_to_published(state_dict, config)
