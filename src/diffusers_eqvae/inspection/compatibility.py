"""Whether generators trained on one autoencoder's latents can go on with another one, measured on the same images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..autoencoders import Autoencoder, decode, downsampling_factor, encode
from ..latents import LatentNormalization, latent_channels
from ..metrics.reconstruction import psnr
from ..provenance import LATENT_SPACE, autoencoder_identity
from ..tokens import has_codebook
from .health import POOR_PSNR_DB

# Own choice. Distances and residuals are squared, and relative to the variance of BASE's latents.
EQUAL_DISTANCE = 1e-4  # what storing weights or latents in 16 bits does
SWAP_LOSS_DB = 0.5
AFFINE_RESIDUAL = 0.01


class NotComparable(ValueError):
    """Two autoencoders whose latents cannot be put beside each other, and why."""


@dataclass(frozen=True)
class Affine:
    """The affine map of latents that comes nearest to others, in the mean of squares.

    Args:
        matrix: (C, C) in float64; diagonal where channels were fitted one by one.
        bias: (C,).
        residual: what it leaves of the distance, squared, relative to the others' variance.
    """

    matrix: Tensor
    bias: Tensor
    residual: float


@dataclass(frozen=True)
class Compatibility:
    """What was measured of NEW against BASE.

    Attributes:
        distance: |E_new - E_base|^2 over the variance of E_base around its channel means, of normalised latents.
        per_channel, one_by_one: from E_new to E_base, by channel, and over all channels.
        psnr: dB of "own_new" D_new(E_new), "own_base", "new_decodes_base" D_new(E_base), "base_decodes_new".
        same_encoder: whether encoder, codebook and normalisation are the same to the bit.

    Example:
        >>> compatibility(new, base, images).verdict
        'needs adaptation'
    """

    distance: float
    per_channel: Affine
    one_by_one: Affine
    psnr: dict[str, float]
    same_encoder: bool

    def explained(self, fit: Affine) -> float | None:
        """Share of the distance that a map takes away; None where there is none. Unrelated latents have about .5."""
        return 1.0 - fit.residual / self.distance if self.distance else None

    @property
    def affine(self) -> Affine | None:
        """The simpler map that suffices, or None."""
        return next((fit for fit in (self.per_channel, self.one_by_one) if fit.residual <= AFFINE_RESIDUAL), None)

    @property
    def swap_loss(self) -> float:
        """dB that NEW's decoder loses on BASE's latents, against BASE's own decoder."""
        return self.psnr["own_base"] - self.psnr["new_decodes_base"]

    @property
    def verdict(self) -> str:
        if self.same_encoder or self.distance < EQUAL_DISTANCE:
            return "drop-in"
        if self.psnr["own_base"] >= POOR_PSNR_DB and self.swap_loss <= SWAP_LOSS_DB:
            return "decoder-only swap"
        return "needs adaptation" if self.affine is None else "affine fit suffices"


def compatibility(new: Autoencoder, base: Autoencoder, images: Tensor) -> Compatibility:
    """Measures two autoencoders of one latent shape on images (N, 3, S, S) in [-1, 1], one at a time.

    Raises:
        ValueError: other latent channels or another stride, a codebook, or latents of BASE that do not vary.

    Example:
        >>> compatibility(new, base, images).psnr["base_decodes_new"]
    """
    require_comparable(new, base)
    normalizations = [LatentNormalization.from_vae(vae) for vae in (new, base)]
    latents: tuple[list[Tensor], list[Tensor]] = ([], [])
    quality: dict[str, list[float]] = {}
    with torch.no_grad():
        for image in images.split(1):
            coded = [
                normalization.normalize(encode(vae, image).mode())
                for vae, normalization in zip((new, base), normalizations, strict=True)
            ]
            raw = [[each.denormalize(latent) for latent in coded] for each in normalizations]
            for name, vae, latent in (
                ("own_new", new, raw[0][0]),
                ("own_base", base, raw[1][1]),
                ("new_decodes_base", new, raw[0][1]),
                ("base_decodes_new", base, raw[1][0]),
            ):
                quality.setdefault(name, []).append(psnr(decode(vae, latent), image).item())
            for seen, latent in zip(latents, coded, strict=True):
                seen.append(latent.cpu().double().transpose(0, 1).flatten(1).T)
    x, y = map(torch.cat, latents)
    variance = (y - y.mean(0)).square().sum().item()
    if not variance > 0:
        raise NotComparable("BASE gives the same latents everywhere, so no distance to them has a unit; look at BASE.")
    identities = [autoencoder_identity(vae) for vae in (new, base)]
    return Compatibility(
        (x - y).square().sum().item() / variance,
        fit_per_channel(x, y, variance),
        fit_one_by_one(x, y, variance),
        {name: math.fsum(values) / len(values) for name, values in quality.items()},
        all(identities[0][part] == identities[1][part] for part in ("class", *LATENT_SPACE)),
    )


def require_comparable(new: Autoencoder, base: Autoencoder) -> None:
    """Refuses autoencoders whose latents cannot be put beside each other."""
    shapes = [(latent_channels(vae), downsampling_factor(vae)) for vae in (new, base)]
    if shapes[0] != shapes[1]:
        (a, b), (c, d) = shapes
        raise NotComparable(
            f"NEW has {a} latent channels of stride {b} and BASE {c} of stride {d}: no generator of the one reads "
            "latents of the other; train one from scratch on NEW's."
        )
    if has_codebook(new) or has_codebook(base):
        raise NotComparable(
            "Tokens of a codebook are equal or are not, and have no distance; eqvae compat is for autoencoders "
            "without a codebook."
        )


def fit_per_channel(x: Tensor, y: Tensor, variance: float) -> Affine:
    """Least squares of y on x, both (P, C) in float64, for each channel by itself; `variance` is sum |y - mean|^2."""
    centred = x - x.mean(0)
    squares = centred.square().sum(0)
    slope = torch.where(squares > 0, (centred * (y - y.mean(0))).sum(0) / squares, 0.0)
    bias = y.mean(0) - slope * x.mean(0)
    return Affine(torch.diag(slope), bias, (x * slope + bias - y).square().sum().item() / variance)


def fit_one_by_one(x: Tensor, y: Tensor, variance: float) -> Affine:
    """The same over all channels: a 1x1 convolution."""
    matrix = torch.linalg.lstsq(x - x.mean(0), y - y.mean(0), driver="gelsd").solution.T
    bias = y.mean(0) - matrix @ x.mean(0)
    return Affine(matrix, bias, (x @ matrix.T + bias - y).square().sum().item() / variance)


def stated_by(fit: Affine, normalization: LatentNormalization) -> LatentNormalization | None:
    """The normalisation by which NEW's latents are mapped by a fit per channel; None where it turns a sign.

    slope (raw - mean) / std + bias  =  (raw - (mean - bias std / slope)) / (std / slope)
    """
    slope = fit.matrix.diagonal()
    if not torch.equal(fit.matrix, torch.diag(slope)) or not bool((slope > 0).all()):
        return None
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in normalization.mean_and_std)
    shifted, scaled = mean - fit.bias * std / slope, std / slope
    return LatentNormalization(tuple(shifted.tolist()), tuple(scaled.tolist()))
