"""How far an autoencoder is from "transforming latents equals transforming images" (EQ-VAE, table 1)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor, nn

from ..autoencoders import decode, downsampling_factor, encode, evaluating, takes_any_size
from ..equivariance import ROTATIONS, SCALES, Tau, equivariance_error, rotation, scaling
from .artefacts import reconstruction_artefacts
from .base import Better
from .reconstruction import psnr

# Of what `measure_equivariance` gives, where more or less is better; of sharpness and latent_std neither is.
BETTER: dict[str, Better] = {
    **dict.fromkeys(("psnr", "psnr_rotated_latent", "psnr_halved_latent"), "higher"),
    **dict.fromkeys(("psnr_rotated_pixels", "psnr_halved_pixels"), "higher"),
    **dict.fromkeys(("equivariance_rotation", "equivariance_rotation_centred"), "lower"),
    **dict.fromkeys(("equivariance_scale", "equivariance_scale_centred"), "lower"),
    **dict.fromkeys(("colour_shift", "grid"), "lower"),
}


@torch.no_grad()
def measure_equivariance(vae: nn.Module, batches: Iterable[Tensor]) -> dict[str, float]:
    """Means over all images of `batches`, each (B, 3, H, W) in [-1, 1], of the posterior mean's behaviour.

    Returns:
        - `psnr`: plain reconstruction, dB;
        - `equivariance_rotation`, `equivariance_scale`: |tau(E(x)) - E(tau(x))|^2 / |E(tau(x))|^2, averaged over
          rotations {90, 180, 270} degrees and over scales {.25, .5, .75}; with suffix `_centred` both sides are
          taken relative to the channel means, which a constant offset of the latents cannot flatter;
        - `psnr_rotated_latent`, `psnr_halved_latent`: decoding tau(E(x)) against tau(x), for a quarter turn and for
          half the size, dB; `psnr_rotated_pixels`, `psnr_halved_pixels`: decoding E(tau(x)), the bound;
        - `latent_std`: standard deviation of the latents, which tells a collapse;
        - `colour_shift`, `sharpness`, `grid`: of the plain reconstructions, see `reconstruction_artefacts`.

    Example:
        >>> measure_equivariance(vae, pixels.split(16))["equivariance_rotation"]
    """
    sums: dict[str, float] = {}
    count = 0
    with evaluating(vae):
        for pixels in batches:
            raw_latents = encode(vae, pixels).mode()
            decoded = decode(vae, raw_latents)
            rows = {"psnr": psnr(decoded, pixels), "latent_std": raw_latents.flatten(1).std(1)}
            rows |= reconstruction_artefacts(decoded, pixels, downsampling_factor(vae))
            rows |= equivariance_per_image(vae, pixels, raw_latents)
            count += len(pixels)
            for name, values in rows.items():
                sums[name] = sums.get(name, 0.0) + values.double().sum().item()
    if count == 0:
        raise ValueError("Equivariance needs at least one image to be measured on; got none.")
    return {name: total / count for name, total in sums.items()}


@torch.no_grad()
def equivariance_per_image(vae: nn.Module, pixels: Tensor, raw_latents: Tensor) -> dict[str, Tensor]:
    """What `measure_equivariance` compares with a transform, per image: name -> (B,).

    Of an autoencoder that takes images of one size alone, only what is turned.

    Args:
        pixels: (B, 3, H, W) in [-1, 1].
        raw_latents: E(x), their posterior mean.

    Example:
        >>> equivariance_per_image(vae, pixels, encode(vae, pixels).mode())["psnr_rotated_latent"]
    """
    factor = downsampling_factor(vae)
    size = (raw_latents.shape[-2], raw_latents.shape[-1])
    results: dict[str, Tensor] = {}

    @cache
    def encoded(tau: Tau) -> Tensor:
        return encode(vae, tau.apply_to_pixels(pixels, factor)).mode()

    def errors(taus: list[Tau], name: str) -> None:
        pairs = [(encoded(tau), tau.apply_to_latents(raw_latents)) for tau in taus]
        for suffix, centred in (("", False), ("_centred", True)):
            each = [_defined_error(e, t, centred=centred) for e, t in pairs]
            results[f"equivariance_{name}{suffix}"] = torch.stack(each).mean(0)

    errors([rotation(size, quarter_turns) for quarter_turns in ROTATIONS], "rotation")
    taus = {"rotated": rotation(size, 1)}
    if takes_any_size(vae):
        errors([scaling(size, scale) for scale in SCALES], "scale")
        taus["halved"] = scaling(size, 0.5)

    for name, tau in taus.items():
        target = tau.apply_to_pixels(pixels, factor)
        results[f"psnr_{name}_latent"] = psnr(decode(vae, tau.apply_to_latents(raw_latents)), target)
        results[f"psnr_{name}_pixels"] = psnr(decode(vae, encoded(tau)), target)
    return results


def _defined_error(encoded: Tensor, transformed: Tensor, *, centred: bool) -> Tensor:
    """NaN where one latent position is left, whose deviation from its own mean is 0."""
    error = equivariance_error(encoded, transformed, centred=centred)
    return torch.full_like(error, torch.nan) if centred and encoded.shape[-2:].numel() == 1 else error
