"""EQ-VAE's implicit regularization: decode transformed latents, compare with transformed images."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, Self

import torch
from torch import Tensor, nn

from ..autoencoders import downsampling_factor
from ..equivariance import Interpolation, ScaleMode, Tau, TauDistribution, apply_each
from ..options import Checked
from ..randomness import StepRandomness
from .base import AutoencoderRegularizer, register_regularizer


@dataclass(frozen=True)
class EquivarianceDraw:
    """What one optimizer step does: `kind`, and the tau it does it with (None for a plain step).

    Args:
        kind: of step.
        tau: of the step.
        each: the tau of each image, which differ in how they turn; None = all have that of the step.
        shares: (B,) in (0, 1), of each image in its blend with its partner; None = nothing is blended.

    Example:
        >>> EquivarianceRegularizer(8).draw((8, 4, 32, 32), StepRandomness(seed=0)).kind
        'equivariance'
    """

    kind: Literal["equivariance", "low_resolution", "plain"]
    tau: Tau | None = None
    each: tuple[Tau, ...] | None = None
    shares: Tensor | None = None


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
    tau_flip: bool = field(
        default=False,
        metadata={"help": "Whether tau mirrors too: with rotation, all a square's symmetries."},
    )
    tau_crop: float = field(
        default=0.0, metadata={"help": "Share of tau's steps that first cut out a window.", "range": "[0, 1]"}
    )
    tau_blend: float = field(
        default=0.0,
        metadata={"help": "Share of tau's steps that blend each image with its neighbour.", "range": "[0, 1]"},
    )
    tau_per_image: bool = field(
        default=False, metadata={"help": "Turn and mirror every image of a step in a way of its own."}
    )
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

    Beyond the paper, and off by default: mirroring and windows (`TauDistribution`); turns drawn for every image, where
    size and window stay those of the step, so that its images remain one batch; blends, a z_i + (1 - a) z_j decoded
    against a x_i + (1 - a) x_j, j = i xor 1, a ~ U(0, 1) per image, before tau. Latents that are not square after
    scaling turn by odd or by even quarter turns in one step. None of these costs time.

    Args:
        downsampling_factor: pixels per latent cell (8 for an f8 autoencoder).
        distribution: how tau is drawn.
        p_equivariance: share of equivariance steps, in [0, 1].
        p_low_resolution: share of resized steps among the others, in [0, 1].
        blend: share of equivariance steps that blend, in [0, 1]; the micro-batch must be even.
        per_image: every image is turned and mirrored in a way of its own.

    Raises:
        ValueError: a share outside [0, 1]; a tau that leaves everything as it is.

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
        blend: float = 0.0,
        per_image: bool = False,
    ) -> None:
        super().__init__()
        shares = {"p_equivariance": p_equivariance, "p_low_resolution": p_low_resolution, "blend": blend}
        for name, value in shares.items():
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} is a probability and must lie in [0, 1]; got {value}.")
        self.downsampling_factor = downsampling_factor
        self.distribution = distribution or TauDistribution()
        if self.distribution.is_identity and not blend:
            raise ValueError(
                "tau leaves everything as it is: it neither scales, rotates, mirrors, cuts nor blends. Switch one of "
                "these on, or leave the regularizer equivariance out."
            )
        self.blend, self.per_image = blend, per_image
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
                flip=arguments.tau_flip,
                crop=arguments.tau_crop,
            ),
            p_equivariance=arguments.p_equivariance,
            p_low_resolution=arguments.p_low_resolution,
            blend=arguments.tau_blend,
            per_image=arguments.tau_per_image,
        )

    def smallest_scale(self) -> float:
        return self.distribution.smallest_scale

    def changed_images(self) -> str | None:
        return "smaller images in some steps (none with p_low_resolution 0)" if self.p_low_resolution else None

    def draw(self, shape: tuple[int, ...], randomness: StepRandomness) -> EquivarianceDraw:
        generator, size = randomness.shared_generator(), (shape[-2], shape[-1])
        equivariance, low_resolution = torch.rand(2, generator=generator).tolist()
        if equivariance < self.p_equivariance:
            tau = self.distribution.draw(size, generator)
            each = self._draw_each(tau, shape[0], randomness) if self.per_image else None
            return EquivarianceDraw("equivariance", tau, each, self._draw_shares(shape[0], randomness))
        if low_resolution < self.p_low_resolution:
            return EquivarianceDraw("low_resolution", replace(self.distribution, crop=0.0).draw(size, generator))
        return EquivarianceDraw("plain")

    def _draw_each(self, tau: Tau, batch: int, randomness: StepRandomness) -> tuple[Tau, ...]:
        """A tau for each image that gives all of them the shape that `tau` gives."""
        square, odd = tau.latent_size[0] == tau.latent_size[1], tau.quarter_turns % 2
        turns = [each for each in self.distribution.turns if square or each[0] % 2 == odd]
        chosen = (len(turns) * randomness.rand((batch,))).long().clamp(max=len(turns) - 1)
        return tuple(replace(tau, quarter_turns=turns[i][0], flip=turns[i][1]) for i in chosen.tolist())

    def _draw_shares(self, batch: int, randomness: StepRandomness) -> Tensor | None:
        if not self.blend or torch.rand((), generator=randomness.shared_generator()) >= self.blend:
            return None
        if batch % 2:
            raise ValueError(f"A blend takes two images, so its micro-batch must be even; got {batch}.")
        return randomness.rand((batch,))

    def augment(self, pixels: Tensor, draw: EquivarianceDraw) -> Tensor:
        if draw.tau is None or draw.kind != "low_resolution":
            return pixels
        return draw.tau.resize_pixels(pixels, self.downsampling_factor)

    def transform(self, raw_latents: Tensor, pixels: Tensor, draw: EquivarianceDraw) -> tuple[Tensor, Tensor]:
        if draw.tau is None or draw.kind != "equivariance":
            return raw_latents, pixels
        if draw.shares is not None:
            raw_latents, pixels = (_blended(each, draw.shares) for each in (raw_latents, pixels))
        if draw.each is not None:
            return apply_each(draw.each, raw_latents), apply_each(draw.each, pixels, self.downsampling_factor)
        return draw.tau.apply_to_latents(raw_latents), draw.tau.apply_to_pixels(pixels, self.downsampling_factor)


def _blended(images: Tensor, shares: Tensor) -> Tensor:
    """a x_i + (1 - a) x_j with j = i xor 1."""
    partners = images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return torch.lerp(partners, images, shares.to(images).view(-1, 1, 1, 1))
