"""Single files of latent diffusion's KL autoencoder: SD, SDXL, SD3, FLUX, kl-f4 to kl-f32, alone or in a checkpoint.

The layout that ComfyUI, sd-scripts and diffusers' `from_single_file` read.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..latents import LatentNormalization, over_channels, repeated
from ..models.autoencoder_kl_eq import AutoencoderKLEQ
from ._ldm_names import MARKS, inferred_config, renamed_to_ours, renamed_to_published
from .base import Converter, register_converter

logger = logging.getLogger(__name__)

# How the pipelines of the families normalise; no weight of an autoencoder tells.
NORMALIZATIONS = {
    "SD": {"scaling_factor": 0.18215},
    "SDXL": {"scaling_factor": 0.13025},
    "SD3": {"scaling_factor": 1.5305, "shift_factor": 0.0609},
    "FLUX": {"scaling_factor": 0.3611, "shift_factor": 0.1159},
}
# Part of a name that only a whole checkpoint of the family has.
_FAMILIES = {
    "conditioner.embedders.": "SDXL",
    "joint_blocks.": "SD3",
    "double_blocks.": "FLUX",
    "cond_stage_model.": "SD",
}
# What other programs build, whatever the file holds.
_USUAL = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "mid_block_add_attention": True}


@register_converter("ldm")
class LDMConverter(Converter):
    """latent-diffusion's AutoencoderKL is diffusers' under other names.

    The losses' networks (LPIPS, discriminator) are left out. GroupNorm has 32 groups in every published model; another
    number leaves no trace (`norm_num_groups`), nor do the normalisation of latents and the padding.
    """

    target = AutoencoderKLEQ
    inside = ("first_stage_model.", "vae.")
    idle = ("loss.*", "colorize", "model_ema.*", "logvar")

    def matches(self, shapes: Mapping[str, torch.Size]) -> bool:
        other = {"quantize.embedding.weight", "bn.running_mean"}
        return shapes.keys() >= MARKS and not other & shapes.keys()

    def stated(self, checkpoint: Mapping[str, Tensor]) -> dict[str, Any]:
        if "scale_factor" in checkpoint and checkpoint["scale_factor"].numel() == 1:
            return {"scaling_factor": checkpoint["scale_factor"].item()}  # latent-diffusion's, measured at its start
        family = next((each for part, each in _FAMILIES.items() if any(part in name for name in checkpoint)), None)
        if family is None:
            return {}
        logger.warning("By what is beside it, the autoencoder is that of %s: %s.", family, _words(family))
        return NORMALIZATIONS[family]

    def config(self, tensors: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> dict[str, Any]:
        channels = tensors["decoder.conv_in.weight"].shape[1]
        assumed = {} if {"scaling_factor", "latents_mean"} & overrides.keys() else _assumed_normalization(channels)
        return {
            **inferred_config(tensors),
            "latent_channels": channels,
            "use_quant_conv": "quant_conv.weight" in tensors,
            "use_post_quant_conv": "post_quant_conv.weight" in tensors,
            "sample_size": 512,
            "scaling_factor": 1.0,
            **assumed,
            **overrides,
        }

    def to_ours(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
        kept = {name: tensor for name, tensor in tensors.items() if name.startswith(parts)}
        return renamed_to_ours(kept, config)

    def from_ours(self, state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        return renamed_to_published(state_dict, config)

    def reader_options(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Of the forks of sd-scripts that serve EQ autoencoders (kohya-ss/sd-scripts#2189)."""
        shift, scale = _over_channels(config)
        options = {"vae_custom_scale": f"{1 / scale:.6g}", "vae_custom_shift": f"{shift:.6g}"}
        return options | ({"vae_reflection_padding": ""} if config.get("padding_mode") == "reflect" else {})

    def notes(self, config: Mapping[str, Any]) -> list[str]:
        notes = []
        if config.get("latents_mean") is not None:
            notes.append(
                "Mean and std per channel are not in the file, nor does sd-scripts take them: its options are those "
                "over all channels."
            )
        if (padding := config.get("padding_mode", "zeros")) != "zeros":
            notes.append(
                f"padding_mode {padding} is not in the file, and without it borders come out wrong: ComfyUI needs a "
                "node that sets padding_mode of the autoencoder's convolutions."
            )
        kinds = [*config.get("down_block_types", ()), *config.get("up_block_types", ())]
        given = {key: config.get(key, value) for key, value in _USUAL.items()}
        given["block_out_channels"] = list(given["block_out_channels"])
        if given != _USUAL or any(kind.startswith("Attn") for kind in kinds):
            notes.append(
                f"Its architecture (widths {given['block_out_channels']}, {given['layers_per_block']} layers a block) "
                f"is not SD's ({_USUAL['block_out_channels']}, 2, attention in the middle only), which ComfyUI and "
                "sd-scripts build whatever a file holds: they will not load it."
            )
        return notes


def _assumed_normalization(channels: int) -> dict[str, Any]:
    """Of a file that holds an autoencoder alone, by its latent channels."""
    if channels == 4:
        logger.warning(
            "The weights do not say how latents are normalised: taken as %s (SD); of an SDXL autoencoder give %s.",
            *(_words("SD"), _words("SDXL")),
        )
        return NORMALIZATIONS["SD"]
    if channels == 16:
        raise ValueError(
            "The weights do not say how latents of 16 channels are normalised. Give, as options of the config, "
            f"{_words('SD3')} (SD3), {_words('FLUX')} (FLUX), or scaling_factor=1 and let them be measured when they "
            "are encoded (encode-latents)."
        )
    logger.warning(
        "The weights do not say how latents are normalised: scaling_factor=1, which is no normalisation; give it, or "
        "let it be measured when latents are encoded (encode-latents)."
    )
    return {}


def _words(family: str) -> str:
    return " ".join(f"{key}={value}" for key, value in NORMALIZATIONS[family].items())


def _over_channels(config: Mapping[str, Any]) -> tuple[float, float]:
    """(shift, scale) of latents = (raw - shift) / scale, the same for all channels."""
    mean, std = LatentNormalization.from_config(config).mean_and_std
    channels = max(len(mean), len(std))
    return over_channels(repeated(mean, channels), repeated(std, channels))
