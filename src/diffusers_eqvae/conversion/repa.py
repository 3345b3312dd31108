"""Weights of REPA (arXiv:2410.06940, https://github.com/sihyun-yu/REPA)."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import Timesteps
from torch import Tensor

from ..models.transformer_sit import TIME_CHANNELS
from ._transformers import TransformerConverter
from .base import register_converter

_FIRST_TIME_LAYER = "time_embedder.linear_1.weight"


@register_converter("repa")
class REPAConverter(TransformerConverter):
    """SiT's network on sigma, with the velocity d x / d sigma: the first time layer is reflected.

    The projectors onto a teacher's features served training and are left out. Written back, the reflected layer is
    within one rounding of what it was; all other tensors are bit-equal.
    """

    idle = ("pos_embed", "projectors.*")
    has_projectors = True

    def change(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        return state_dict | {_FIRST_TIME_LAYER: _reflect_time(state_dict[_FIRST_TIME_LAYER])}


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
