"""One step of autoencoder training: one generator forward, one generator backward, one shared D(fake).

The objective lives at the reconstruction r. Its gradient there, d(nll)/dr + w * d(g)/dr, is all the generator needs,
and both terms also give the adaptive weight w at the decoder's last layer without a second walk through the
perceptual network or the discriminator. The generator is then trained by the scalar <r, stop-gradient(gradient at r)>,
whose backward is an ordinary one: it synchronises over ranks and accumulates like any loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..autoencoders import decode, encode, last_decoder_layer, last_encoder_layer
from ..losses.adversarial import adaptive_weight, discriminator_loss, generator_loss
from ..losses.reconstruction import kl_loss, reconstruction_loss
from ..regularizers import Regularizer

# A summed reconstruction outweighs a mean penalty by C * H * W alone, so VQGAN's limit of 1e4 would bind here.
MAX_PENALTY_RATIO = 1e8


class AutoencoderObjective(nn.Module):
    """The one wrapped forward: encode, tau, decode and penalties, so that DDP and FSDP see every parameter.

    Args:
        vae: any diffusers autoencoder.
        regularizers: by name; applied in this order.
        sample_posterior: decode a sample of the posterior (training), or its mean.
        reduction: of the KL term, "sum" or "mean" (see `losses.reconstruction`).
    """

    def __init__(
        self,
        vae: nn.Module,
        regularizers: Mapping[str, Regularizer] | None = None,
        *,
        sample_posterior: bool = True,
        reduction: Literal["sum", "mean"] = "sum",
    ) -> None:
        super().__init__()
        self.vae = vae
        self.regularizers = nn.ModuleDict(regularizers or {})
        self.sample_posterior = sample_posterior
        self.reduction = reduction

    def draw(self, latent_size: tuple[int, int], generator: torch.Generator) -> dict[str, Any]:
        """Every regularizer's random choices of one optimizer step."""
        return {name: regularizer.draw(latent_size, generator) for name, regularizer in self.regularizers.items()}

    def forward(self, pixels: Tensor, noise: Tensor, draws: Mapping[str, Any]) -> dict[str, Any]:
        """
        Args:
            pixels: (B, 3, H, W) in [-1, 1].
            noise: (B, C, h, w) standard normal; a step that encodes smaller images uses its top-left corner.
            draws: from `draw`.

        Returns:
            `reconstruction` and `target` (B, 3, H', W'), `kl` (scalar), `penalties` (name -> scalar).
        """
        for name, regularizer in self.regularizers.items():
            pixels = regularizer.augment(pixels, draws[name])
        posterior = encode(self.vae, pixels)
        height, width = posterior.mean.shape[-2:]
        latents = posterior.sample(noise[..., :height, :width]) if self.sample_posterior else posterior.mode()

        decoded, target, penalties = latents, pixels, {}
        for name, regularizer in self.regularizers.items():
            decoded, target = regularizer.transform(decoded, target, draws[name])
            penalty = regularizer.penalty(latents, pixels, draws[name])
            if penalty is not None:
                penalties[name] = penalty
        return {
            "reconstruction": decode(self.vae, decoded),
            "target": target,
            "kl": kl_loss(posterior, reduction=self.reduction),
            "penalties": penalties,
        }


@dataclass(frozen=True)
class AutoencoderLossWeights:
    """The terms of the objective (VQGAN, LDM, EQ-VAE); a term of weight 0 is never computed.

    Args:
        reconstruction: "l1" or "l2".
        reduction: "sum" (over C, H, W; the LDM/EQ-VAE form, where a image scaled by s weighs s^2) or "mean".
        perceptual: factor of LPIPS inside the negative log-likelihood.
        kl: factor of the KL divergence.
        discriminator: factor of the adversarial term; with `adaptive` it multiplies |grad nll| / |grad g|.
        discriminator_start: first step (optimizer steps) with the adversarial term.
        discriminator_loss: "hinge" or "vanilla".
    """

    reconstruction: Literal["l1", "l2"] = "l1"
    reduction: Literal["sum", "mean"] = "sum"
    perceptual: float = 1.0
    kl: float = 1e-6
    discriminator: float = 0.5
    discriminator_start: int = 0
    discriminator_loss: Literal["hinge", "vanilla"] = "hinge"
    adaptive: bool = True


class AutoencoderStep:
    """Turns one micro-batch into the generator's and the discriminator's loss.

    Args:
        objective: the (wrapped) `AutoencoderObjective`.
        vae: the autoencoder inside it, for its last layers.
        regularizers: those inside it, for their penalty weights.
        weights: the terms of the objective.
        perceptual: LPIPS, (B, 3, H, W) x 2 -> (B,); needed where `weights.perceptual` is not 0.
        discriminator: the (wrapped) discriminator; needed where `weights.discriminator` is not 0.
        average: mean of a tensor over all ranks; `autograd.grad` bypasses DDP, so the adaptive weight needs it.
    """

    def __init__(
        self,
        objective: nn.Module,
        *,
        vae: nn.Module,
        regularizers: Mapping[str, Regularizer],
        weights: AutoencoderLossWeights,
        perceptual: nn.Module | None = None,
        discriminator: nn.Module | None = None,
        average: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        for name, weight, module in (
            ("perceptual", weights.perceptual, perceptual),
            ("discriminator", weights.discriminator, discriminator),
        ):
            if weight and module is None:
                raise ValueError(f"The {name} term has weight {weight} but no {name} network; give one or weigh it 0.")
        self.objective = objective
        self.regularizers = regularizers
        self.weights = weights
        self.perceptual = perceptual if weights.perceptual else None
        self.discriminator = discriminator if weights.discriminator else None
        self.average = average
        self.encoder_weight = last_encoder_layer(vae).weight
        self.decoder_weight = last_decoder_layer(vae).weight

    def __call__(
        self, pixels: Tensor, noise: Tensor, draws: Mapping[str, Any], step: int
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """The generator's loss, the discriminator's (None before its start), and scalars to log (detached).

        Back-propagate the second with respect to the discriminator's parameters only (`inputs=`).
        """
        output = self.objective(pixels, noise, draws)
        target = output["target"]
        # Everything above the reconstruction is differentiated with respect to this leaf, once.
        reconstruction = output["reconstruction"].detach().requires_grad_()

        logs: dict[str, Tensor | float]
        nll, logs = self._negative_log_likelihood(reconstruction, target)
        (nll_gradient,) = torch.autograd.grad(nll, reconstruction)
        gradient, loss_discriminator = nll_gradient, None
        if self.discriminator is not None and step >= self.weights.discriminator_start:
            logits_fake = self.discriminator(reconstruction)
            adversarial = generator_loss(logits_fake)
            (adversarial_gradient,) = torch.autograd.grad(adversarial, reconstruction, retain_graph=True)
            weight = self._adversarial_weight(output["reconstruction"], nll_gradient, adversarial_gradient)
            gradient = nll_gradient + weight * adversarial_gradient
            logits_real = self.discriminator(target)
            loss_discriminator = discriminator_loss(logits_real, logits_fake, self.weights.discriminator_loss)
            logs |= {
                "loss/generator": adversarial,
                "loss/discriminator": loss_discriminator,
                "adversarial_weight": weight,
                "logits/real": logits_real.mean(),
                "logits/fake": logits_fake.mean(),
            }

        loss = (output["reconstruction"] * gradient).sum()
        if self.weights.kl:
            loss = loss + self.weights.kl * output["kl"]
        logs |= {"loss/kl": output["kl"]}
        for name, penalty in output["penalties"].items():
            weight = self._penalty_weight(self.regularizers[name], penalty, output["reconstruction"], nll_gradient)
            loss = loss + weight * penalty
            logs |= {f"loss/{name}": penalty, f"{name}_weight": weight}
        return loss, loss_discriminator, {name: torch.as_tensor(value).detach() for name, value in logs.items()}

    def _negative_log_likelihood(
        self, reconstruction: Tensor, target: Tensor
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """|x - r| + weight * LPIPS, where LPIPS counts once per element as in LDM: nll_sum = C*H*W * nll_mean."""
        weights = self.weights
        pixel_loss = reconstruction_loss(
            reconstruction, target, kind=weights.reconstruction, reduction=weights.reduction
        )
        nll = pixel_loss
        logs: dict[str, Tensor | float] = {"loss/reconstruction": pixel_loss}
        if self.perceptual is not None:
            perceptual = self.perceptual(reconstruction, target).mean()
            elements = target[0].numel() if weights.reduction == "sum" else 1
            nll = nll + weights.perceptual * elements * perceptual
            logs["loss/perceptual"] = perceptual
        return nll, logs | {"loss/nll": nll}

    def _adversarial_weight(
        self, reconstruction: Tensor, nll_gradient: Tensor, adversarial_gradient: Tensor
    ) -> Tensor | float:
        """VQGAN eq. 7, at the decoder's last layer; only that layer's weight gradient is computed."""
        if not self.weights.adaptive:
            return self.weights.discriminator
        nll, adversarial = (
            self.average(torch.autograd.grad(reconstruction, self.decoder_weight, gradient, retain_graph=True)[0])
            for gradient in (nll_gradient, adversarial_gradient)
        )
        return self.weights.discriminator * adaptive_weight(nll, adversarial)

    def _penalty_weight(
        self, regularizer: Regularizer, penalty: Tensor, reconstruction: Tensor, nll_gradient: Tensor
    ) -> Tensor | float:
        """The same ratio at the encoder's last layer (VA-VAE, ReaLS) for regularizers that ask for it."""
        if not regularizer.adaptive:
            return regularizer.weight
        weight = self.encoder_weight
        (nll,) = torch.autograd.grad(reconstruction, weight, nll_gradient, retain_graph=True)
        (own,) = torch.autograd.grad(penalty, weight, retain_graph=True)
        ratio = adaptive_weight(self.average(nll), self.average(own), max_weight=MAX_PENALTY_RATIO)
        return regularizer.weight * ratio
