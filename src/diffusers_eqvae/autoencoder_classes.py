"""Which classes of diffusers' autoencoders are handled, and how each takes images, gives latents and normalises them.

`CLASSES` is the one table: a class with a way of its own has a row of its own kind here, and nothing else asks which
class an autoencoder is of. Every other class is refused by name where it is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class AutoencoderClass:
    """How a class of autoencoders gives its latents, says their size and keeps their normalisation.

    Args:
        output: what its `encode` gives: "latent_dist", a Gaussian, or the name of deterministic latents.
        stride: pixels per latent position along one side, of its config.
        channels: of its latents, of its config.
        magnitude: config entry of the largest value that its decoder tells apart; None = all do.
        buffers: the parts of its state that normalise, where that is not its config.
        frozen: parts that are not trained.
    """

    output: str
    stride: Callable[[Any], int]
    channels: Callable[[Any], int] = itemgetter("latent_channels")
    magnitude: str | None = None
    buffers: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    pipelines_read_it: ClassVar[bool] = False  # any normalisation that is written

    @property
    def deterministic(self) -> bool:
        return self.output != "latent_dist"

    def side(self, config: Any) -> int | None:
        """The only height and width of images in pixels, or None where any multiple of the stride will do."""
        return None

    def image_channels(self, config: Any) -> int:
        """Of the images that it encodes; 3 for RGB."""
        entries = ("in_channels", "input_channels", "num_channels")
        return next((int(config[key]) for key in entries if key in config), 3)

    def encode(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and logvar (None where deterministic) of raw latents, (B, C, h, w), of pixels in [-1, 1]."""
        output = vae.encode(pixels)
        found = getattr(output, self.output, None)
        if found is None:
            raise ValueError(
                f"This autoencoder's encode must give {self.output}; {type(vae).__name__} gives "
                f"{type(output).__name__} with {', '.join(vars(output)) or 'nothing'}."
            )
        return (found, None) if self.deterministic else (found.mean, found.logvar)

    def decode(self, vae: Any, raw_latents: Tensor) -> Tensor:
        """Pixels, nominally in [-1, 1]."""
        return vae.decode(raw_latents).sample

    def stated(self, vae: Any, dtype: torch.dtype | None = None) -> Mapping[str, Any]:
        """The normalisation of its latents as `LatentNormalization.from_config` reads it.

        Args:
            dtype: that buffers are rounded to first; None = as they are.
        """
        return vae.config

    def state(self, vae: Any, entries: Mapping[str, Any]) -> None:
        """Keeps a normalisation, of a mean and std per channel where it has them, where `stated` finds it."""
        vae.register_to_config(**entries)

    def last_layer(self, half: nn.Module) -> Any:
        """What an encoder's moments or a decoder's pixels come out of; None where no layer does."""
        conv_out = _under_adapter(getattr(half, "conv_out", None))
        if isinstance(conv_out, (nn.Conv2d, nn.Conv3d)):
            return conv_out
        named = half.named_modules()
        return [child for name, child in named if isinstance(child, nn.Conv2d) and "lora_" not in name][-1]


class _OneFrame(AutoencoderClass):
    """Takes videos (B, C, T, H, W), an image as one of a single frame; pipelines read latents_mean and latents_std.

    Its decode clamps to [-1, 1], beyond which pixels would get no gradient; where one is wanted nothing is clamped.
    """

    pipelines_read_it = True

    def encode(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        mean, logvar = super().encode(vae, pixels.unsqueeze(2))
        return mean.squeeze(2), None if logvar is None else logvar.squeeze(2)

    def decode(self, vae: Any, raw_latents: Tensor) -> Tensor:
        frames = raw_latents.unsqueeze(2)
        if torch.is_grad_enabled():
            return vae.decoder(vae.post_quant_conv(frames)).squeeze(2)
        return vae.decode(frames).sample.squeeze(2)

    def state(self, vae: Any, entries: Mapping[str, Any]) -> None:
        mean, std = _mean_and_std(entries, self.channels(vae.config))
        vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())


class _OneFrameInPatches(_OneFrame):
    """As Wan's, which may see p x p pixels as channels of one, and tells its decoder that a frame is the first."""

    def image_channels(self, config: Any) -> int:
        return super().image_channels(config) // (config["patch_size"] or 1) ** 2

    def decode(self, vae: Any, raw_latents: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().decode(vae, raw_latents)
        decoded = vae.decoder(vae.post_quant_conv(raw_latents.unsqueeze(2)), first_chunk=True).squeeze(2)
        side = vae.config["patch_size"] or 1
        # Of a patch's pixels diffusers counts the column first, torch the row.
        return F.pixel_shuffle(decoded.unflatten(1, (-1, side, side)).transpose(2, 3).flatten(1, 3), side)


class _BatchNormalized(AutoencoderClass):
    """FLUX.2: its pipeline packs p x q positions into one and normalises each place by the running mean and variance
    of a batch norm that the autoencoder itself never runs; (raw - mean) / sqrt(var + eps).

    Raw latents are those before the packing, so that a transform moves positions and not places.
    """

    pipelines_read_it = True

    def stated(self, vae: Any, dtype: torch.dtype | None = None) -> Mapping[str, Any]:
        mean, variance = (_rounded(vae.get_buffer(name), dtype) for name in self.buffers)
        places = (self.channels(vae.config), *vae.config["patch_size"])
        std = (variance + vae.config["batch_norm_eps"]).sqrt()
        return _by_place(mean.view(places), std.view(places))

    def state(self, vae: Any, entries: Mapping[str, Any]) -> None:
        mean, std = _mean_and_std(entries, self.channels(vae.config))
        epsilon, places = vae.config["batch_norm_eps"], math.prod(vae.config["patch_size"])
        if not bool((std.square() >= epsilon).all()):
            raise ValueError(
                f"{type(vae).__name__} normalises by sqrt(variance + {epsilon}), so a standard deviation must be at "
                f"least {math.sqrt(epsilon):.3g}; got {std.min().item():.3g}."
            )
        for name, values in zip(self.buffers, (mean, std.square() - epsilon), strict=True):
            vae.get_buffer(name).copy_(values.repeat_interleave(places))


class _SelfNormalized(AutoencoderClass):
    """RAE: a frozen vision model encodes images in [0, 1] of one size; encode and decode normalise by themselves,
    (raw - mean) / (std + 1e-5) * scaling_factor, perhaps differently at each position, which is undone here."""

    pipelines_read_it = True
    margin = 1e-5

    def side(self, config: Any) -> int | None:
        return config["patch_size"] * (config["encoder_input_size"] // config["encoder_patch_size"])

    def encode(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        if vae.training and vae.noise_tau:
            raise ValueError(
                f"noise_tau={vae.noise_tau} of this {type(vae).__name__} adds noise in training that no seed here "
                "decides; set noise_tau to 0 in its config and use the regularizer noise."
            )
        if not vae.reshape_to_2d:
            raise ValueError("Latents are maps (B, C, h, w) here; set reshape_to_2d to true in the config.")
        latents, _ = super().encode(vae, (pixels + 1) / 2)
        return vae._denormalize_latents(latents / vae.config["scaling_factor"]), None

    def decode(self, vae: Any, raw_latents: Tensor) -> Tensor:
        cells = self.side(vae.config) // vae.config["patch_size"]  # type: ignore[operator]
        if raw_latents.shape[-2:] != (cells, cells):
            raise ValueError(
                f"{type(vae).__name__} decodes latents of {cells} x {cells} positions alone, and would resample "
                f"others; got {' x '.join(map(str, raw_latents.shape[-2:]))}: leave scaling out."
            )
        latents = vae._normalize_latents(raw_latents.contiguous()) * vae.config["scaling_factor"]
        return 2 * super().decode(vae, latents) - 1

    def stated(self, vae: Any, dtype: torch.dtype | None = None) -> Mapping[str, Any]:
        mean, std = (_rounded(vae.get_buffer(name), dtype) for name in self.buffers)
        cells = self.side(vae.config) // vae.config["patch_size"]  # type: ignore[operator]
        places = (self.channels(vae.config), cells, cells)
        return _by_place(mean.expand(places), ((std + self.margin) / vae.config["scaling_factor"]).expand(places))

    def state(self, vae: Any, entries: Mapping[str, Any]) -> None:
        mean, std = (each[:, None, None] for each in _mean_and_std(entries, self.channels(vae.config)))
        for name, values in zip(self.buffers, (mean, std - self.margin), strict=True):
            old = vae.get_buffer(name)
            setattr(vae, name, values.to(old.device, old.dtype))
        stated = {"latents_mean": mean.tolist(), "latents_std": (std - self.margin).tolist()}
        vae.register_to_config(**stated, scaling_factor=1.0)

    def last_layer(self, half: nn.Module) -> Any:
        return _under_adapter(getattr(half, "decoder_pred", None))


def _under_adapter(layer: Any) -> Any:
    """A layer without the adapter that peft may have put around it."""
    return getattr(layer, "base_layer", layer)


def _rounded(buffer: Tensor, dtype: torch.dtype | None) -> Tensor:
    return buffer.detach().cpu().to(dtype or buffer.dtype).double()


def _by_place(mean: Tensor, std: Tensor) -> dict[str, Any]:
    """Entries of (C, p, q) values for each place of a repeating tile, or of C where all places have the same."""
    if all(bool((each == each[:, :1, :1]).all()) for each in (mean, std)):
        mean, std = mean[:, :1, :1], std[:, :1, :1]
    tile = list(mean.shape[1:])
    return {"latents_mean": mean.flatten().tolist(), "latents_std": std.flatten().tolist(), "latents_tile": tile}


def _mean_and_std(entries: Mapping[str, Any], channels: int) -> tuple[Tensor, Tensor]:
    """(C,) each, in float64: (raw - mean) / std is what the entries mean."""
    mean, std = entries["latents_mean"], entries["latents_std"]
    mean, std = ([entries["shift_factor"]], [1.0]) if mean is None else (mean, std)
    values = (torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64))
    return values[0].expand(channels), (values[1] / entries["scaling_factor"]).expand(channels)


def _halved_by(widths: str) -> Callable[[Any], int]:
    """The stride of an encoder that halves the image after every entry of `widths` but the last."""
    return lambda config: 2 ** (len(config[widths]) - 1)


def _patches_halved(config: Any) -> int:
    return (config["patch_size"] or 1) * _halved_by("dim_mult")(config)


def _codebook_width(config: Any) -> int:
    return int(config.get("vq_embed_dim") or config["latent_channels"])


CLASSES: dict[str, AutoencoderClass] = {
    "AutoencoderKL": AutoencoderClass("latent_dist", _halved_by("block_out_channels")),
    "AsymmetricAutoencoderKL": AutoencoderClass("latent_dist", _halved_by("down_block_out_channels")),
    "AutoencoderKLFlux2": _BatchNormalized(
        "latent_dist", _halved_by("block_out_channels"), buffers=("bn.running_mean", "bn.running_var")
    ),
    "AutoencoderKLHunyuanImage": AutoencoderClass("latent_dist", itemgetter("spatial_compression_ratio")),
    "AutoencoderKLQwenImage": _OneFrame("latent_dist", _halved_by("dim_mult"), itemgetter("z_dim")),
    "AutoencoderKLQwenImage21": _OneFrameInPatches("latent_dist", _patches_halved, itemgetter("z_dim")),
    "AutoencoderKLWan": _OneFrameInPatches("latent_dist", _patches_halved, itemgetter("z_dim")),
    "AutoencoderTiny": AutoencoderClass(
        "latents", _halved_by("encoder_block_out_channels"), magnitude="latent_magnitude"
    ),
    "AutoencoderDC": AutoencoderClass("latent", _halved_by("encoder_block_out_channels")),
    "AutoencoderRAE": _SelfNormalized(
        "latent",
        itemgetter("patch_size"),
        itemgetter("encoder_hidden_size"),
        buffers=("_latents_mean", "_latents_std"),
        frozen=("encoder",),
    ),
    "VQModel": AutoencoderClass("latents", _halved_by("block_out_channels"), _codebook_width),
}
# Why others are refused; a class that is in neither table is refused as unknown.
_REFUSED = {
    "ConsistencyDecoderVAE": "decodes by a diffusion process, which gives no gradient and another image each time",
    "AutoencoderKLKVAE": "has a config of its own kind (z_channels, no normalisation)",
    **dict.fromkeys(
        (
            *("AutoencoderKLAllegro", "AutoencoderKLCogVideoX", "AutoencoderKLCosmos", "AutoencoderKLHunyuanVideo"),
            *("AutoencoderKLHunyuanVideo15", "AutoencoderKLHunyuanImageRefiner", "AutoencoderKLKVAEVideo"),
            *("AutoencoderKLLTXVideo", "AutoencoderKLLTX2Video", "AutoencoderKLMagvit", "AutoencoderKLMiniMaxH3"),
            *("AutoencoderKLMochi",),
            *("AutoencoderKLTemporalDecoder", "AutoencoderVidTok", "Kandinsky6SRVAE"),
        ),
        "takes videos (B, C, T, H, W), not images",
    ),
    **dict.fromkeys(
        (
            *("AutoencoderKLKVAEAudio", "AutoencoderKLLTX2Audio", "AutoencoderKLMiniMaxH3Audio", "AutoencoderOobleck"),
            *("AutoencoderSAME", "Cosmos3AVAEAudioTokenizer", "LongCatAudioDiTVae", "MMAudioVAE"),
        ),
        "takes sound, not images",
    ),
}


def uncompiled(module: Any) -> Any:
    """What `torch.compile` wrapped, or the module itself."""
    return getattr(module, "_orig_mod", module)


def stock_class(kind: type) -> str:
    """Name of the class of diffusers that an autoencoder's class is, derives from or says that it `works_as`.

    Example:
        >>> stock_class(AutoencoderKLEQ)
        'AutoencoderKL'
    """
    derived = (each.__name__ for each in kind.__mro__ if each.__module__.startswith("diffusers."))
    return getattr(kind, "works_as", None) or next(derived, kind.__name__)


def require_handled(autoencoder: Any, whose: str = "The autoencoder") -> None:
    """Refuses an autoencoder whose class would be trained, normalised or decoded wrongly.

    A class of ours or of yours counts as the class of diffusers that it derives from; one that derives from none says
    by an attribute, `works_as = "AutoencoderTiny"`, whose encode, decode and config it has. A class that diffusers
    adds is refused until it is in the table here.

    Args:
        autoencoder: it, or its class.

    Raises:
        ValueError: in one sentence, why the class is refused, and which are handled.

    Example:
        >>> require_handled(vae)
    """
    kind = autoencoder if isinstance(autoencoder, type) else type(uncompiled(autoencoder))
    name = stock_class(kind)
    if name not in CLASSES:
        reason = _REFUSED.get(name, "is not known here, and might be handled wrongly")
        raise ValueError(
            f"{whose} is of the class {kind.__name__}, which {reason}; use {', '.join(CLASSES)}, or a subclass of one."
        )


def class_of(vae: Any) -> AutoencoderClass:
    """The row of the table that an autoencoder belongs to."""
    require_handled(vae)
    return CLASSES[stock_class(type(uncompiled(vae)))]
