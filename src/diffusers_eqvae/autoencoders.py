"""What every diffusers autoencoder has in common: pixels -> posterior -> raw latents -> pixels.

`AutoencoderKL` gives a Gaussian posterior, `AutoencoderTiny` and `AutoencoderDC` a deterministic one; the rest of the
package speaks to all through the functions here and never asks which it holds.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import AutoModel
from torch import Tensor, nn

from . import _registration
from .files import read_json
from .pretrained import hub_file, looking_for

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
        mean, logvar = self.mean.float(), self.logvar.float()
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(1)


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
    """Any diffusers autoencoder in float32 and eval mode.

    `name` is a directory or Hub name of an autoencoder, or of a pipeline with one in vae/; otherwise `subfolder` says
    where it lies inside. A model of another kind raises ValueError, and OSError where nothing is found.

    Example:
        >>> vae = load_autoencoder("stabilityai/sd-vae-ft-mse").requires_grad_(False)
    """
    location = autoencoder_location(name, subfolder=subfolder, revision=revision)
    try:
        with _without_false_warning(), looking_for(name, "an autoencoder") as options:
            model = AutoModel.from_pretrained(name, torch_dtype=torch.float32, **location, **options)
    except OSError as error:
        folder = Path(name) / location.get("subfolder", "")
        if (folder / "config.json").is_file() or not Path(name).is_dir():
            raise  # it is there, and something else is wrong with it; or it is nowhere, which is said
        hint = f" Did you mean {folder / 'vae'}?" if (folder / "vae").is_dir() else ""
        raise OSError(f"{name} does not hold an autoencoder: there is no {folder / 'config.json'}.{hint}") from error
    except ValueError:
        _registration.require_class(AutoModel.load_config(name, **location).get("_class_name", "AutoModel"), name)
        raise
    if not (hasattr(model, "encode") and hasattr(model, "decode")):
        raise ValueError(f"{name} is a {type(model).__name__}, not an autoencoder; name one, or its pipeline.")
    return model.eval()


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
    for side, size in (("height", pixels.shape[-2]), ("width", pixels.shape[-1])):
        require_fitting(size, downsampling_factor(vae), name=f"The {side} of images")
    output = vae.encode(pixels)
    if hasattr(output, "latent_dist"):
        return Posterior(output.latent_dist.mean, output.latent_dist.logvar)
    for name in ("latents", "latent"):  # AutoencoderTiny's word and AutoencoderDC's
        if hasattr(output, name):
            return Posterior(getattr(output, name))
    raise ValueError(
        f"An autoencoder's encode must give latent_dist, latents or latent; {type(vae).__name__} gives "
        f"{type(output).__name__} with {', '.join(vars(output)) or 'nothing'}."
    )


def decode(vae: Autoencoder, raw_latents: Tensor) -> Tensor:
    """Pixels (B, 3, h * f, w * f), nominally in [-1, 1] and not clamped, of raw (not normalised) latents.

    Example:
        >>> decode(vae, normalization.denormalize(latents))
    """
    return vae.decode(raw_latents).sample


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
    return last_encoder_layer(vae).out_channels == vae.config.latent_channels


def latent_channels(vae: Autoencoder) -> int:
    """C of latents (B, C, h, w); for a VQ model the width of its codebook."""
    return int(getattr(vae.config, "vq_embed_dim", None) or vae.config.latent_channels)


def downsampling_factor(vae: Autoencoder) -> int:
    """f of an 'f8' autoencoder: pixels per latent position along one side."""
    channels = getattr(vae.config, "encoder_block_out_channels", None) or vae.config.block_out_channels
    return 2 ** (len(channels) - 1)


def require_fitting(size: int, stride: int, *, name: str = "resolution", smallest: int | None = None) -> None:
    """Refuses a side in pixels that is not a positive multiple of the autoencoder's stride, or below `smallest`.

    Example:
        >>> require_fitting(data.resolution, downsampling_factor(vae))
    """
    smallest = stride if smallest is None else smallest
    if size % stride or size < smallest:
        least = f" and at least {smallest}" if smallest > stride else ""
        raise ValueError(f"{name} must be a multiple of the autoencoder's stride {stride}{least}; got {size}.")


def last_encoder_layer(vae: Autoencoder) -> nn.Conv2d:
    """The convolution that produces the moments, where alignment gradients are compared (ReaLS, VA-VAE)."""
    return _last_convolution(vae.encoder)


@contextmanager
def encoder_features(vae: Autoencoder) -> Iterator[list[Tensor]]:
    """Fills a list with what the encoder's last convolution reads, (B, F, h, w), at every encoding in the block.

    Example:
        >>> with encoder_features(vae) as seen:
        ...     posterior = encode(vae, pixels)
    """
    seen: list[Tensor] = []
    handle = last_encoder_layer(vae).register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()


def last_decoder_layer(vae: Autoencoder) -> nn.Conv2d:
    """The convolution that produces the pixels, where the adversarial weight is measured (VQGAN eq. 7)."""
    return _last_convolution(vae.decoder)


def _last_convolution(module: nn.Module) -> nn.Conv2d:
    conv_out = getattr(module, "conv_out", None)
    if isinstance(conv_out, nn.Conv2d):
        return conv_out
    return [child for child in module.modules() if isinstance(child, nn.Conv2d)][-1]
