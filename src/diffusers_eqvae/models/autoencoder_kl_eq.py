"""diffusers' AutoencoderKL with normalised latents at its surface and a choice of padding."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable
from functools import wraps
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from diffusers import AutoencoderKL, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from ..autoencoders import Autoencoder, decode, encode
from ..latents import LatentNormalization

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
# Ends the block types of a config with other padding: plain diffusers, which would pad with zeros, refuses it.
_MARK = ", loaded by diffusers_eqvae.{} with padding_mode="
K = TypeVar("K", bound=ModelMixin)


def set_padding_mode(vae: Autoencoder, padding_mode: PaddingMode) -> None:
    """How every padded convolution of encoder and decoder pads; see `AutoencoderKLEQ`.

    Raises:
        ValueError: on an unknown padding mode.
    """
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode must be one of {', '.join(PADDING_MODES)}; got {padding_mode!r}.")
    if padding_mode == "zeros":
        return
    for part in (vae.encoder, vae.decoder):
        for layer in part.modules():
            if isinstance(layer, nn.Conv2d) and any(layer.padding):
                layer.padding_mode = padding_mode
    mark = _MARK.format(type(vae).__name__) + padding_mode
    vae.register_to_config(down_block_types=[kind + mark for kind in stock_kinds(vae.config.down_block_types)])


def stock_kinds(down_block_types: Iterable[str]) -> tuple[str, ...]:
    """Block types as plain diffusers knows them, of a config with whatever padding."""
    return tuple(kind.partition(",")[0] for kind in down_block_types)


def as_class(kind: type[K], vae: Autoencoder, **changed: Any) -> K:
    """A model of another class with the same parameters, not copies, and the same config but for what is `changed`.

    Example:
        >>> vae = as_class(AutoencoderKLEQ, load_autoencoder("stabilityai/sd-vae-ft-mse"), padding_mode="reflect")
    """
    config = {key: value for key, value in {**vae.config, **changed}.items() if key != "_use_default_values"}
    config["down_block_types"] = stock_kinds(config["down_block_types"])
    known = inspect.signature(kind).parameters
    with torch.device("meta"):
        twin = kind(**{key: value for key, value in config.items() if key in known})
    for parameter, own in zip(twin.parameters(), vae.parameters(), strict=True):
        parameter.requires_grad_(own.requires_grad)
    twin.load_state_dict(vae.state_dict(keep_vars=True), assign=True)
    rest = {key: value for key, value in config.items() if key not in known and key != "padding_mode"}
    twin.register_to_config(**rest)
    return twin.train(vae.training)


class AutoencoderKLEQ(AutoencoderKL):
    """AutoencoderKL that applies the normalisation its config carries, and pads as its config says.

    With `padding_mode="zeros"` a saved model is a plain `diffusers.AutoencoderKL`, in name and numbers; plain
    diffusers knows no other padding, and fails to load any. This class loads any AutoencoderKL directory and its own.

    Args:
        padding_mode: of every padded convolution of encoder and decoder: "zeros", "reflect", "replicate" or
            "circular". The encoder's downsamplers are not among them: their convolutions do not pad, the block adds
            one row and column of zeros at bottom and right before them. That stays, as in the published autoencoders
            with reflected padding, so that weights trained elsewhere give the same latents here.
            With other padding than zeros the block types of the config carry its name, which plain diffusers refuses.

    The other arguments are AutoencoderKL's.

    Example:
        >>> vae = AutoencoderKLEQ(norm_num_groups=4, block_out_channels=(8,), padding_mode="reflect")
        >>> latents = vae.encode_latents(torch.zeros(1, 3, 16, 16), sample_posterior=False)
        >>> vae.decode_latents(latents).shape
        torch.Size([1, 3, 16, 16])

    Raises:
        ValueError: on an unknown padding mode.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
        padding_mode: PaddingMode = "zeros",
    ):
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=stock_kinds(down_block_types),
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            act_fn=act_fn,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            sample_size=sample_size,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            latents_mean=latents_mean,
            latents_std=latents_std,
            force_upcast=force_upcast,
            use_quant_conv=use_quant_conv,
            use_post_quant_conv=use_post_quant_conv,
            mid_block_add_attention=mid_block_add_attention,
        )
        set_padding_mode(self, padding_mode)

    @property
    def is_stock(self) -> bool:
        """Whether plain `diffusers.AutoencoderKL` computes the same, so that it is saved as one."""
        return type(self) is AutoencoderKLEQ and self.config.padding_mode == "zeros"

    def to_stock(self) -> AutoencoderKL:
        """A plain `diffusers.AutoencoderKL` with the same parameters, not copies, for pipelines of others.

        Raises:
            ValueError: the padding is not zeros.

        Example:
            >>> StableDiffusionPipeline.from_pretrained(name, vae=vae.to_stock())
        """
        if self.config.padding_mode != "zeros":
            raise ValueError(
                f"Plain AutoencoderKL pads with zeros, and this autoencoder with {self.config.padding_mode}, so it "
                "has no stock form; train it with padding_mode zeros, or use it through diffusers_eqvae."
            )
        return as_class(AutoencoderKL, self)

    def encode_latents(
        self, pixels: Tensor, *, sample_posterior: bool = True, generator: torch.Generator | None = None
    ) -> Tensor:
        """Normalised latents (B, C, h, w) of pixels (B, 3, H, W) in [-1, 1]: what a transformer sees.

        Args:
            pixels: height and width multiples of the downsampling factor.
            sample_posterior: draw z ~ q(z | x) from `generator`; otherwise take the posterior's mean.
            generator: on any device; the global one where None.
        """
        posterior = encode(self, pixels)
        if not sample_posterior:
            return LatentNormalization.from_vae(self).normalize(posterior.mode())
        mean = posterior.mean
        noise = randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return LatentNormalization.from_vae(self).normalize(posterior.sample(noise))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pixels (B, 3, H, W), nominally in [-1, 1] and not clamped, of normalised latents (B, C, h, w)."""
        return decode(self, LatentNormalization.from_vae(self).denormalize(latents))

    # A pipeline passes on only what it finds in the signature (variant, max_shard_size ...): it is the base class's.
    @wraps(AutoencoderKL.save_pretrained, assigned=())
    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As AutoencoderKL's, under its name where it is one, and mean_std.json where the config has latents_mean."""
        normalization = LatentNormalization.from_vae(self)
        if is_main_process and normalization.mean is not None:
            # Before the rest, whose push_to_hub=True uploads the whole directory.
            normalization.save_json(Path(save_directory) / "mean_std.json")
        saved = self.to_stock() if self.is_stock else self
        AutoencoderKL.save_pretrained(saved, save_directory, is_main_process, *args, **kwargs)
