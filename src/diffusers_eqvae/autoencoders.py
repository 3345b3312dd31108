"""What every diffusers autoencoder has in common: pixels -> posterior -> raw latents -> pixels.

`AutoencoderKL` gives a Gaussian posterior, `AutoencoderTiny` and `AutoencoderDC` a deterministic one; the rest of the
package speaks to all through the functions here and never asks which it holds. What differs between their classes is
in the table of `autoencoder_classes`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import diffusers
import torch
from diffusers import ConfigMixin
from torch import Tensor, nn

from . import _registration
from .autoencoder_classes import class_of
from .autoencoder_classes import require_handled as require_handled
from .autoencoder_classes import stock_class as stock_class
from .autoencoder_classes import uncompiled as uncompiled
from .files import read_json
from .latents import latent_channels as latent_channels
from .pretrained import hub_file, load_pretrained, looking_for
from .stated_normalization import adopt_saved_normalization

# AutoencoderKL, AutoencoderTiny or whatever else has encode, decode, encoder, decoder and config: diffusers has no
# common base class to name here.
Autoencoder: TypeAlias = Any

# The encoder's variance is exp(logvar) with logvar kept in this range (latent-diffusion's DiagonalGaussian).
LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class Posterior:
    """q(z | x): a diagonal Gaussian N(mean, exp(logvar)), or a point mass where `logvar` is None.

    Args:
        mean: (B, C, h, w).
        logvar: (B, C, h, w) inside `LOGVAR_RANGE`, or None for an autoencoder without variance (AutoencoderTiny).

    Example:
        >>> raw_latents = encode(vae, pixels).sample(generator=torch.Generator().manual_seed(0))
    """

    mean: Tensor
    logvar: Tensor | None = None

    @classmethod
    def from_moments(cls, moments: Tensor, deterministic: bool = False) -> Posterior:
        """Splits moments (B, 2C, h, w) into mean and logvar; deterministic moments (B, C, h, w) are the mean."""
        if deterministic:
            return cls(moments)
        if moments.shape[1] % 2:
            raise ValueError(
                f"Moments hold mean and logvar, so their channel count must be even; got {tuple(moments.shape)}. "
                "Pass deterministic=True for an autoencoder without variance."
            )
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(*LOGVAR_RANGE))

    @property
    def moments(self) -> Tensor:
        """(B, 2C, h, w), or (B, C, h, w) for a deterministic posterior: what a latent store keeps."""
        return self.mean if self.logvar is None else torch.cat([self.mean, self.logvar], dim=1)

    def mode(self) -> Tensor:
        """The most likely raw latents, (B, C, h, w)."""
        return self.mean

    def sample(self, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Raw latents mean + exp(logvar / 2) * noise; `noise` (B, C, h, w) is drawn from `generator` when absent."""
        if self.logvar is None:
            return self.mean
        if noise is None:
            noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """KL(q || N(0, I)) summed over C, h, w: (B,) in nats; 0 for a deterministic posterior."""
        if self.logvar is None:
            return self.mean.new_zeros(self.mean.shape[0])
        dtype = torch.promote_types(self.mean.dtype, torch.float32)
        mean, logvar = self.mean.to(dtype), self.logvar.to(dtype)
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum((1, 2, 3))


@dataclass(frozen=True)
class Decoded:
    """What a decoder gives.

    Args:
        pixels: (B, 3, H, W), nominally in [-1, 1].
        terms: losses that arise while decoding, by name (of a codebook); empty for a continuous autoencoder.
        tokens: (B, h, w), which vectors of a codebook were decoded; None without one.
    """

    pixels: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    tokens: Tensor | None = None


def load_autoencoder(name: str, *, subfolder: str | None = None, revision: str | None = None) -> Autoencoder:
    """Any diffusers autoencoder in float32 and eval mode, with the normalisation that its files state in its config.

    `name` is a directory or Hub name of an autoencoder, or of a pipeline with one in vae/; otherwise `subfolder` says
    where it lies inside. Its class is looked at before anything else. A mean_std.json beside its config means
    (raw - mean) / std, per channel before scalar, and replaces a scaling_factor and shift_factor; a scaling_factor
    that the config does not state is not applied on top of a latents_mean that it does.

    Raises:
        ValueError: a class that is not handled, or not an autoencoder; statements about latents that contradict.
        OSError: nothing is found.

    Example:
        >>> vae = load_autoencoder("stabilityai/sd-vae-ft-mse").requires_grad_(False)
    """
    location = autoencoder_location(name, subfolder=subfolder, revision=revision)
    stated = _read_config(name, location)
    kind: Any = _class_of(stated, name)
    if not (hasattr(kind, "encode") and hasattr(kind, "decode")):
        raise ValueError(f"{name} is a {kind.__name__}, not an autoencoder; name one, or its pipeline.")
    require_handled(kind, name)
    with _without_false_warning():
        model = load_pretrained(kind.from_pretrained, name, "an autoencoder", dtype=torch.float32, **location)
    inside = "/".join(filter(None, (location.get("subfolder"), "mean_std.json")))
    adopt_saved_normalization(model, stated, hub_file(name, inside, revision))
    return model.eval()


class _Config(ConfigMixin):
    """Reads any model's config.json.

    AutoModel, once it has loaded a model out of a pipeline, looks for model_index.json in every later directory.
    """

    config_name = "config.json"


def _read_config(name: str, location: Mapping[str, str]) -> dict[str, Any]:
    """What a saved model's config.json says, and nothing that its class would add."""
    try:
        with looking_for(name, "an autoencoder") as options:
            return _Config.load_config(name, **location, **options)
    except OSError as error:
        folder = Path(name) / location.get("subfolder", "")
        if (folder / "config.json").is_file() or not Path(name).is_dir():
            raise  # it is there, and something else is wrong with it; or it is nowhere, which is said
        hint = f" Did you mean {folder / 'vae'}?" if (folder / "vae").is_dir() else ""
        raise OSError(f"{name} does not hold an autoencoder: there is no {folder / 'config.json'}.{hint}") from error


def _class_of(config: Mapping[str, Any], name: str) -> type:
    kind = config.get("_class_name") if isinstance(config, Mapping) else None
    if not isinstance(kind, str):
        raise ValueError(f"The config.json of {name} names no class of diffusers (_class_name); it names {kind!r}.")
    _registration.require_class(kind, name)
    return getattr(sys.modules[_registration.LIBRARY], kind, None) or getattr(diffusers, kind)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """In eval mode inside, and in the mode it had before afterwards, whatever happens.

    Example:
        >>> with evaluating(vae), torch.no_grad():
        ...     posterior = encode(vae, pixels)
    """
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


@contextmanager
def _without_false_warning() -> Iterator[None]:
    """diffusers warns that it ignores latents_mean of an AutoencoderTiny; it is in the config, and is read there."""
    logger = logging.getLogger("diffusers.configuration_utils")

    def keep(record: logging.LogRecord) -> bool:
        return "latents_mean" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def autoencoder_location(name: str, *, subfolder: str | None = None, revision: str | None = None) -> dict[str, str]:
    """The `subfolder` and `revision` that `from_pretrained(name)` needs: vae/ where `name` is a pipeline."""
    if subfolder is None and is_pipeline(name, revision):
        subfolder = "vae"
    config = Path(name) / (subfolder or "") / "config.json"
    if config.is_file():
        read_json(config, needs={"_class_name": str})
    location = {"subfolder": subfolder, "revision": revision}
    return {key: value for key, value in location.items() if value is not None}


def is_pipeline(name: str, revision: str | None = None) -> bool:
    """Whether a directory or Hub repository holds a pipeline."""
    return hub_file(name, "model_index.json", revision) is not None


def encode(vae: Autoencoder, pixels: Tensor) -> Posterior:
    """The posterior of pixels (B, 3, H, W) in [-1, 1]; H and W must be multiples of `downsampling_factor(vae)`.

    Example:
        >>> encode(vae, torch.zeros(1, 3, 256, 256)).mode().shape
        torch.Size([1, 4, 32, 32])
    """
    row = class_of(vae)
    for name, size in (("height", pixels.shape[-2]), ("width", pixels.shape[-1])):
        require_fitting(size, vae, name=f"The {name} of images")
    return Posterior(*row.encode(vae, pixels))


def decode(vae: Autoencoder, raw_latents: Tensor) -> Tensor:
    """Pixels (B, 3, h * f, w * f), nominally in [-1, 1] and not clamped, of raw (not normalised) latents.

    Example:
        >>> decode(vae, normalization.denormalize(latents))
    """
    return class_of(vae).decode(vae, raw_latents)


def decode_upcast(vae: Autoencoder, raw_latents: Tensor) -> Tensor:
    """As `decode`, for float32 latents and an autoencoder in any dtype, in float32.

    A float16 autoencoder whose config says `force_upcast` overflows in float16, so it is decoded in float32 (the rule
    of diffusers' SDXL pipeline) and put back afterwards.
    """
    dtype = vae.dtype
    if dtype != torch.float16 or not getattr(vae.config, "force_upcast", False):
        return decode(vae, raw_latents.to(dtype)).float()
    vae.to(dtype=torch.float32)
    try:
        return decode(vae, raw_latents)
    finally:
        vae.to(dtype=dtype)


def is_deterministic(vae: Autoencoder) -> bool:
    """True where the encoder gives latents and no variance (AutoencoderTiny, AutoencoderDC, VQModel)."""
    return class_of(vae).deterministic


def latent_range(vae: Autoencoder) -> tuple[float, float] | None:
    """Between which raw latents the decoder tells apart; None = all (AutoencoderTiny: -3 to 3)."""
    entry = class_of(vae).magnitude
    magnitude = None if entry is None else float(vae.config[entry])
    return None if magnitude is None else (-magnitude, magnitude)


def downsampling_factor(vae: Autoencoder) -> int:
    """f of an 'f8' autoencoder: pixels per latent position along one side."""
    return int(class_of(vae).stride(vae.config))


def require_fitting(size: int, vae: Autoencoder, *, name: str = "resolution", smallest: int | None = None) -> None:
    """Refuses a side in pixels that is not a positive multiple of the autoencoder's stride, or not the only one it
    takes.

    Args:
        smallest: least side, where images are encoded at smaller sizes too.

    Example:
        >>> require_fitting(data.resolution, vae)
    """
    stride, only = downsampling_factor(vae), class_of(vae).side(vae.config)
    least = max(stride, smallest or 0)
    if only is not None and (size != only or least > stride):
        smaller = ", and this encodes smaller ones too" if least > stride else ""
        raise ValueError(
            f"{name} must be {only}: {type(uncompiled(vae)).__name__} takes images of one size and would resample "
            f"others{smaller}; got {size}."
        )
    if size % stride or size < least:
        beside = f" and at least {least}" if least > stride else ""
        raise ValueError(f"{name} must be a multiple of the autoencoder's stride {stride}{beside}; got {size}.")


def image_channels(vae: Autoencoder) -> int:
    """Of the images that it encodes; 3 for RGB."""
    return class_of(vae).image_channels(vae.config)


def takes_any_size(vae: Autoencoder) -> bool:
    """Whether images may have any multiple of the stride, and latents be scaled (all but AutoencoderRAE)."""
    return class_of(vae).side(vae.config) is None


def channels_last(vae: Autoencoder) -> Autoencoder:
    """The autoencoder in the memory format of the fastest convolutions; one over frames has none, and stays.

    Example:
        >>> vae = channels_last(load_autoencoder("stabilityai/sd-vae-ft-mse"))
    """
    return vae if any(each.ndim == 5 for each in vae.parameters()) else vae.to(memory_format=torch.channels_last)


def smallest_images(vae: Autoencoder) -> Tensor:
    """Black images (1, C, S, S) of which latents have two positions a side, or the only size it takes."""
    side = class_of(vae).side(vae.config) or 2 * downsampling_factor(vae)
    return torch.zeros(1, image_channels(vae), side, side)


def last_encoder_layer(vae: Autoencoder) -> Any:
    """The convolution that produces the moments, where alignment gradients are compared (ReaLS, VA-VAE).

    Raises:
        ValueError: an encoder that does not end in one (AutoencoderRAE's, a vision model).
    """
    layer = class_of(vae).last_layer(vae.encoder)
    if layer is None:
        raise ValueError(
            f"The encoder of {type(uncompiled(vae)).__name__} does not end in a convolution, so there are neither "
            "features before it nor gradients at it; use a fixed weight, and the latents themselves as features."
        )
    return layer


@contextmanager
def encoder_features(vae: Autoencoder) -> Iterator[list[Tensor]]:
    """Fills a list with what the encoder's last convolution reads, (B, F, h, w), at every encoding in the block.

    Where the encoder does not end in one (AutoencoderRAE) the list stays empty.

    Example:
        >>> with encoder_features(vae) as seen:
        ...     posterior = encode(vae, pixels)
    """
    seen: list[Tensor] = []
    layer = class_of(vae).last_layer(vae.encoder)
    if layer is None:
        yield seen
        return

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].squeeze(2) if inputs[0].ndim == 5 else inputs[0])  # one frame

    handle = layer.register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def last_decoder_layer(vae: Autoencoder) -> nn.Module:
    """The layer that produces the pixels, where the adversarial weight is measured (VQGAN eq. 7)."""
    layer = class_of(vae).last_layer(vae.decoder)
    assert layer is not None, "every decoder of the table ends in a layer with weights"
    return layer
