"""EQ-VAE's implicit regularization: decode transformed latents, compare with transformed images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Self

import torch
from torch import Tensor, nn

from ..autoencoders import downsampling_factor
from ..equivariance import SMALLEST_SCALE, Interpolation, ScaleMode, Tau, TauDistribution
from ..options import Checked
from ..randomness import StepRandomness
from .base import AutoencoderRegularizer, register_regularizer


@dataclass(frozen=True)
class EquivarianceDraw:
    """What one optimizer step does: `kind`, and the tau it does it with (None for a plain step).

    Example:
        >>> EquivarianceRegularizer(8).draw((8, 4, 32, 32), StepRandomness(seed=0)).kind
        'equivariance'
    """

    kind: Literal["equivariance", "low_resolution", "plain"]
    tau: Tau | None = None


@dataclass
class EquivarianceArguments(Checked):
    """EQ-VAE's transforms and how often they act."""

    p_equivariance: float = field(
        default=0.5,
        metadata={"help": "Share of steps that reconstruct tau(x) from tau(z) (EQ-VAE).", "range": "[0, 1]"},
    )
    p_low_resolution: float = field(
        default=0.25,
        metadata={"help": "Among the other steps, share that encodes a resized image.", "range": "[0, 1]"},
    )
    tau_scale: ScaleMode = field(
        default="isotropic", metadata={"help": "How tau's scale is drawn; none leaves rotation alone."}
    )
    tau_rotation: bool = field(default=True, metadata={"help": "Whether tau rotates by quarter turns."})
    tau_interpolation: Interpolation = field(
        default="bilinear", metadata={"help": "Resampling of latents and images."}
    )
    tau_antialias: bool = field(default=False, metadata={"help": "Low-pass filter before resampling."})


@register_regularizer("equivariance")
class EquivarianceRegularizer(AutoencoderRegularizer):
    """Replaces the reconstruction objective on a share of the steps (EQ-VAE, arXiv 2502.09509, eq. 5 and section 3.3).

    - with probability `p_equivariance`: reconstruct tau(x) from D(tau(z)), z ~ q(z | x);
    - otherwise, prior preservation: with probability `p_low_resolution` the plain objective on x resized by tau's
      scale, else the plain objective on x.

    Args:
        downsampling_factor: pixels per latent cell (8 for an f8 autoencoder).
        distribution: how tau is drawn.
        p_equivariance: share of equivariance steps, in [0, 1].
        p_low_resolution: share of resized steps among the others, in [0, 1].

    Differs from the reference: its `p_prior` is the probability of the equivariance step, against its own
    documentation, and generator and discriminator see different draws; here a step draws once for both.

    Example:
        >>> regularizer = EquivarianceRegularizer(downsampling_factor(vae), p_equivariance=0.5)
        >>> objective = AutoencoderObjective(vae, {"equivariance": regularizer})
    """

    Arguments = EquivarianceArguments
    prefixes = ("p_", "tau_")
    paper = ("EQ-VAE", "2502.09509")

    def __init__(
        self,
        downsampling_factor: int,
        *,
        distribution: TauDistribution | None = None,
        p_equivariance: float = 0.5,
        p_low_resolution: float = 0.25,
    ) -> None:
        super().__init__()
        for name, value in (("p_equivariance", p_equivariance), ("p_low_resolution", p_low_resolution)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} is a probability and must lie in [0, 1]; got {value}.")
        self.downsampling_factor = downsampling_factor
        self.distribution = distribution or TauDistribution()
        self.p_equivariance = p_equivariance
        self.p_low_resolution = p_low_resolution if self.distribution.scale != "none" else 0.0

    @classmethod
    def from_arguments(cls, arguments: EquivarianceArguments, model: nn.Module) -> Self:
        return cls(
            downsampling_factor(model),
            distribution=TauDistribution(
                scale=arguments.tau_scale,
                rotation=arguments.tau_rotation,
                interpolation=arguments.tau_interpolation,
                antialias=arguments.tau_antialias,
            ),
            p_equivariance=arguments.p_equivariance,
            p_low_resolution=arguments.p_low_resolution,
        )

    def smallest_scale(self) -> float:
        return 1.0 if self.distribution.scale == "none" else SMALLEST_SCALE

    def draw(self, shape: tuple[int, ...], randomness: StepRandomness) -> EquivarianceDraw:
        generator, size = randomness.shared_generator(), (shape[-2], shape[-1])
        equivariance, low_resolution = torch.rand(2, generator=generator).tolist()
        if equivariance < self.p_equivariance:
            return EquivarianceDraw("equivariance", self.distribution.draw(size, generator))
        if low_resolution < self.p_low_resolution:
            return EquivarianceDraw("low_resolution", self.distribution.draw(size, generator))
        return EquivarianceDraw("plain")

    def augment(self, pixels: Tensor, draw: EquivarianceDraw) -> Tensor:
        if draw.tau is None or draw.kind != "low_resolution":
            return pixels
        return draw.tau.resize_pixels(pixels, self.downsampling_factor)

    def transform(self, raw_latents: Tensor, pixels: Tensor, draw: EquivarianceDraw) -> tuple[Tensor, Tensor]:
        if draw.tau is None or draw.kind != "equivariance":
            return raw_latents, pixels
        return draw.tau.apply_to_latents(raw_latents), draw.tau.apply_to_pixels(pixels, self.downsampling_factor)
