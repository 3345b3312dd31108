"""Autoencoder training: one generator forward, one generator backward, one shared D(fake).

The objective lives at the reconstruction r. Its gradient there, d(nll)/dr + w * d(g)/dr, is all the generator needs,
and both terms also give the adaptive weight w at the decoder's last layer without a second walk through the
perceptual network or the discriminator. The generator is then trained by the scalar <r, stop-gradient(gradient at r)>,
whose backward is an ordinary one: it synchronises over ranks and accumulates like any loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..autoencoders import (
    Decoded,
    Posterior,
    downsampling_factor,
    encode,
    is_deterministic,
    last_decoder_layer,
    last_encoder_layer,
    latent_channels,
    require_handled,
)
from ..losses._checks import full_precision
from ..losses.adversarial import adaptive_weight
from ..losses.reconstruction import kl_loss, reconstruction_loss
from ..randomness import StepRandomness
from ..regularizers.base import AutoencoderRegularizer, AutoencoderState, require_compatible
from ..tokens import CodebookUsage, codebook, decode_with_terms, has_codebook
from ._adversarial import AdversarialGame, ScoreMeans, total
from ._last_layer import LastLayer
from .base import Objective, reached_by, register_objective, tie_idle

# A summed reconstruction outweighs a mean penalty by C * H * W alone, so VQGAN's limit of 1e4 would bind here.
MAX_PENALTY_RATIO = 1e8


@register_objective("autoencoder")
class AutoencoderObjective(Objective[AutoencoderRegularizer]):
    """Encode, transform, decode and penalise any diffusers autoencoder.

    Args:
        model: the autoencoder.
        regularizers: by name; applied in this order.
        sample_posterior: decode a sample of the posterior (training), or its mean.
        reduction: of the KL term and of a codebook's, "sum" or "mean" (see `losses.reconstruction`).

    Example:
        >>> objective = AutoencoderObjective(vae, {"equivariance": EquivarianceRegularizer(8)})
        >>> draw = objective.draw({"pixel_values": pixels}, StepRandomness(seed=0))
        >>> output = objective({"pixel_values": pixels}, draw)
    """

    reads = "pixels"
    own_terms = ("kl", "codebook", "commitment")

    def __init__(
        self,
        model: nn.Module,
        regularizers: Mapping[str, AutoencoderRegularizer] | None = None,
        *,
        sample_posterior: bool = True,
        reduction: Literal["sum", "mean"] = "sum",
    ) -> None:
        require_handled(model)
        super().__init__(model, regularizers)
        self.sample_posterior = sample_posterior
        self.reduction = reduction
        self.scores: ScoreMeans | None = None  # the state of LeCam, where the discriminator is regularized by it

    def compile(self, *arguments: Any, **options: Any) -> None:
        """Compiles encoder and decoder, each by itself.

        Of a draw they see no more than a size, for which two or three graphs serve (inductor may fix it all the same);
        the whole forward would be compiled anew for every kind of step, turn and regularizer.
        """
        for half in (self.model.encoder, self.model.decoder):
            half.compile(*arguments, **options)

    def draw(self, batch: Mapping[str, Tensor], randomness: StepRandomness) -> dict[str, Any]:
        """The posterior's "noise" (B, C, h, w), and "regularizers": each one's draw under its name."""
        pixels, factor = batch["pixel_values"], downsampling_factor(self.model)
        shape = (len(pixels), latent_channels(self.model), pixels.shape[-2] // factor, pixels.shape[-1] // factor)
        noise = randomness.randn(shape, device=pixels.device)
        return {"noise": noise, "regularizers": self.draw_regularizers(shape, randomness)}

    def forward(self, batch: Mapping[str, Tensor], draw: Mapping[str, Any]) -> dict[str, Any]:
        """
        Args:
            batch: "pixel_values" (B, 3, H, W) in [-1, 1], and the features that a regularizer reads; with "moments"
                (B, c, h, w) beside them (of a latent store) nothing is encoded, and no regularizer augments.
            draw: from `draw`; a step that encodes smaller images uses the noise's top-left corner.

        Returns:
            `decodings`: (reconstruction, target, weight) each, the first of weight 1; `terms`: "kl", a codebook's
            terms, and each regularizer's penalty; `idle`: see `tie_idle`; `channels`: "latent_mean" and "latent_std"
            (C,) of the posterior means, to log; `tokens` (B, h, w) of a VQ model.
        """
        pixels = batch["pixel_values"]
        active = self.active(draw)
        stored = batch.get("moments")
        if stored is not None:
            posterior = Posterior.from_moments(stored.float(), deterministic=is_deterministic(self.model))
        else:
            for _, regularizer, drawn in active:
                pixels = regularizer.augment(pixels, drawn)
            posterior = encode(self.model, pixels)
        height, width = posterior.mean.shape[-2:]
        sampled = self.sample_posterior
        raw_latents = posterior.sample(draw["noise"][..., :height, :width]) if sampled else posterior.mode()
        state = AutoencoderState(posterior, raw_latents, pixels, self._encode, self._decode)

        transformed, target = raw_latents, pixels
        terms = {"kl": kl_loss(posterior, reduction=self.reduction)}
        further: list[tuple[Tensor, Tensor, float]] = []
        for name, regularizer, drawn in active:
            transformed, target = regularizer.transform(transformed, target, drawn)
            further += regularizer.decodings(state, drawn)
            penalty = regularizer.penalty(state, batch, drawn)
            if penalty is not None:
                terms[name] = penalty
        decoded = self._decode(transformed)
        decodings = [(decoded.pixels, target, 1.0)]
        decodings += [(self._decode(latents).pixels, goal, weight) for latents, goal, weight in further]
        elements = transformed[0].numel() if self.reduction == "sum" else 1
        terms |= {name: elements * term for name, term in decoded.terms.items()}
        outputs = [*terms.values(), *(reconstruction for reconstruction, _, _ in decodings)]
        tokens = {} if decoded.tokens is None else {"tokens": decoded.tokens}
        latents = posterior.mean.detach().float()
        channels = {"latent_mean": latents.mean((0, 2, 3)), "latent_std": latents.std((0, 2, 3), correction=0)}
        return {
            "decodings": decodings,
            "terms": terms,
            "idle": tie_idle(self, outputs),
            "channels": channels,
            **tokens,
        }

    def _encode(self, pixels: Tensor) -> Any:
        return encode(self.model, pixels)

    def _decode(self, raw_latents: Tensor) -> Decoded:
        return decode_with_terms(self.model, raw_latents)


@dataclass(frozen=True)
class AutoencoderLossWeights:
    """The terms of the objective (VQGAN, LDM, EQ-VAE); a term of weight 0 is never computed.

    Args:
        reconstruction: "l1" or "l2".
        reduction: "sum" (over C, H, W; the LDM/EQ-VAE form, where an image scaled by s weighs s^2) or "mean".
        perceptual: factor of LPIPS inside the negative log-likelihood.
        kl: factor of the KL divergence.
        discriminator: factor of the adversarial term; with `adaptive` it multiplies |grad nll| / |grad g|.
        discriminator_start: first step (optimizer steps) with the adversarial term.
        discriminator_loss: "hinge" or "vanilla".
        lecam, lecam_decay: factor of `lecam_penalty`, and of what its averages keep per step.
        r1: gamma of R1: gamma / 2 times `r1_penalty` of the targets.
        augment: transforms of `differentiable_augmentation.augment` that both kinds of images go through.
    """

    reconstruction: Literal["l1", "l2"] = "l1"
    reduction: Literal["sum", "mean"] = "sum"
    perceptual: float = 1.0
    kl: float = 1e-6
    discriminator: float = 0.5
    discriminator_start: int = 0
    discriminator_loss: Literal["hinge", "vanilla"] = "hinge"
    adaptive: bool = True
    lecam: float = 0.0
    lecam_decay: float = 0.99
    r1: float = 0.0
    augment: tuple[str, ...] = ()


class AutoencoderStep:
    """Turns one micro-batch into the generator's and the discriminator's loss: `Objective.total` where networks judge.

    Args:
        objective: the (wrapped) `AutoencoderObjective`.
        inner: the same without its wrapping.
        weights: the terms of the objective.
        perceptual: LPIPS, (B, 3, H, W) x 2 -> (B,); needed where `weights.perceptual` is not 0.
        discriminator: the (wrapped) discriminator; needed where `weights.discriminator` is not 0.
        randomness: of the step, which the augmentation of what the discriminator sees needs.
        average: mean of a tensor over all ranks; `autograd.grad` bypasses DDP, so the adaptive weight needs it.

    Example:
        >>> step = AutoencoderStep(objective, objective, weights=weights, perceptual=lpips, discriminator=patchgan)
        >>> loss, discriminator_loss, logs = step(batch, draw, step=0)
    """

    def __init__(
        self,
        objective: nn.Module,
        inner: AutoencoderObjective,
        *,
        weights: AutoencoderLossWeights,
        perceptual: nn.Module | None = None,
        discriminator: nn.Module | None = None,
        randomness: StepRandomness | None = None,
        average: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        for name, weight, module in (
            ("perceptual", weights.perceptual, perceptual),
            ("discriminator", weights.discriminator, discriminator),
        ):
            if weight and module is None:
                raise ValueError(f"The {name} term has weight {weight} but no {name} network; give one or weigh it 0.")
        regularizers: Any = inner.regularizers
        require_compatible(regularizers, ["kl"] if weights.kl else [])
        self.objective, self.inner, self.weights = objective, inner, weights
        self.perceptual = perceptual if weights.perceptual else None
        self.game: AdversarialGame | None = None
        if weights.discriminator and discriminator is not None:
            state: dict[str, Any] = {"scores": inner.scores, "randomness": randomness}
            self.game = AdversarialGame(discriminator, weights=weights, average=average, **state)
        self.average = average
        self.usage = CodebookUsage(len(codebook(inner.model))) if has_codebook(inner.model) else None
        adaptive = any(regularizer.adaptive for regularizer in regularizers.values())
        self.encoder_end = LastLayer(last_encoder_layer(inner.model)) if adaptive else None
        self.decoder_end = LastLayer(last_decoder_layer(inner.model))

    def __call__(
        self, batch: Mapping[str, Tensor], draw: Mapping[str, Any], step: int
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """The generator's loss, the discriminator's (None before its start), and what to log (detached): scalars, and
        mean and std of the posterior means by channel.

        Back-propagate the second with respect to the discriminator's parameters only (`inputs=`).
        """
        for end in filter(None, (self.encoder_end, self.decoder_end)):
            end.calls.clear()
        output = self.objective(batch, draw)
        reconstructions = [reconstruction for reconstruction, _, _ in output["decodings"]]
        # Everything above the reconstructions is differentiated with respect to these leaves, once.
        judged = [(image.detach().requires_grad_(), target, weight) for image, target, weight in output["decodings"]]

        nll, logs = self._negative_log_likelihood(judged)
        nll_gradients = torch.autograd.grad(nll, [image for image, _, _ in judged])
        gradients, loss_discriminator = nll_gradients, None
        if self.game is not None and step >= self.weights.discriminator_start:
            adversarial, loss_discriminator, found = self.game.play(judged, step)
            adversarial_gradients = torch.autograd.grad(
                adversarial, [image for image, _, _ in judged], retain_graph=True
            )
            weight = self._adversarial_weight(reconstructions, nll_gradients, adversarial_gradients)
            pairs = zip(nll_gradients, adversarial_gradients, strict=True)
            gradients = tuple(nll_gradient + weight * gradient for nll_gradient, gradient in pairs)
            logs |= {"loss/generator": adversarial, "adversarial_weight": weight, **found}

        loss: Tensor = output["idle"]
        adapting = {name for name, term in output["terms"].items() if self._adapts(name, term)}
        linear, at_end = self._through_decoder(reconstructions, gradients, nll_gradients, with_nll=bool(adapting))
        for part in linear:
            loss = loss + part
        for name, term in output["terms"].items():
            factor = self._term_weight(name, term, reconstructions, at_end if name in adapting else None)
            loss = loss + factor * term if factor is not None else loss
            logs |= {f"loss/{name}": term}
            if name in self.inner.regularizers:
                logs |= {f"{name}_weight": factor}
        logs |= output["channels"]
        if self.usage is not None:
            logs |= self.usage.figures(self.average(self.usage.shares(output["tokens"])), step)
        return loss, loss_discriminator, {name: torch.as_tensor(value).detach() for name, value in logs.items()}

    def _negative_log_likelihood(self, judged: list[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, dict[str, Any]]:
        """|x - r| + weight * LPIPS, where LPIPS counts once per element as in LDM: nll_sum = C*H*W * nll_mean."""
        weights = self.weights
        pixel, perceptual, nll = [], [], []
        for image, target, weight in judged:
            pixel.append(
                weight * reconstruction_loss(image, target, kind=weights.reconstruction, reduction=weights.reduction)
            )
            nll.append(pixel[-1])
            if self.perceptual is not None:
                perceptual.append(weight * self.perceptual(image, target).mean())
                elements = target[0].numel() if weights.reduction == "sum" else 1
                nll[-1] = nll[-1] + weights.perceptual * elements * perceptual[-1]
        logs = {"loss/reconstruction": total(pixel), "loss/nll": total(nll)}
        return total(nll), logs | ({"loss/perceptual": total(perceptual)} if perceptual else {})

    def _adversarial_weight(
        self, reconstructions: list[Tensor], nll_gradients: Sequence[Tensor], adversarial_gradients: Sequence[Tensor]
    ) -> Tensor | float:
        """VQGAN eq. 7, at the decoder's last layer; only that layer's weight gradient is computed."""
        if not self.weights.adaptive:
            return self.weights.discriminator
        nll, adversarial = (
            self.average(self.decoder_end.weight_gradient(reconstructions, gradients))
            for gradients in (nll_gradients, adversarial_gradients)
        )
        return self.weights.discriminator * adaptive_weight(nll, adversarial)

    def _adapts(self, name: str, term: Tensor) -> bool:
        """Whether a term's weight follows the reconstruction's gradient in this step."""
        if self.encoder_end is None or name not in self.inner.regularizers:
            return False
        regularizer: Any = self.inner.regularizers[name]
        return bool(regularizer.adaptive and term.requires_grad and self.encoder_end.calls)

    def _through_decoder(
        self,
        reconstructions: list[Tensor],
        gradients: Sequence[Tensor],
        nll_gradients: Sequence[Tensor],
        *,
        with_nll: bool,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Scalars whose gradient is that of <reconstructions, gradients>, and nll's at the encoder's last layer.

        Where nothing but nll is judged both are one walk: its gradients at that layer's output and at every weight
        behind it stand for the reconstructions, and the backward of the loss begins there. A discriminator sends
        another gradient through the decoder than nll's, and so does a weight that is before and behind that layer.
        """
        plain = [(image * gradient).sum() for image, gradient in zip(reconstructions, gradients, strict=True)]
        end = self.encoder_end
        if end is None or not with_nll:
            return plain, None
        behind = reached_by(reconstructions, short_of=end.outputs)
        if gradients is not nll_gradients or behind & reached_by(end.outputs):
            return plain, self.average(end.weight_gradient(reconstructions, nll_gradients))
        places = [*end.outputs, *(weight for weight in self.inner.parameters() if id(weight) in behind)]
        found = torch.autograd.grad(reconstructions, places, nll_gradients, retain_graph=True, allow_unused=True)
        pairs = [(place, gradient) for place, gradient in zip(places, found, strict=True) if gradient is not None]
        linear = [
            torch.dot(full_precision(place).flatten(), full_precision(gradient).flatten()) for place, gradient in pairs
        ]
        return linear, self.average(end.at_weight(found[: len(end.calls)]))

    def _term_weight(
        self, name: str, term: Tensor, reconstructions: list[Tensor], nll: Tensor | None
    ) -> Tensor | float | None:
        """The KL's weight, 1 for a codebook's terms, and a regularizer's own, times the ratio of gradients where it
        is adaptive (VA-VAE, ReaLS): |grad nll| / |grad penalty| at the encoder's last layer. None leaves it out."""
        if name == "kl":
            return self.weights.kl or None
        if name not in self.inner.regularizers:
            return 1.0
        regularizer: Any = self.inner.regularizers[name]
        if nll is None or self.encoder_end is None:
            per_element = regularizer.mean_over_elements and self.weights.reduction == "sum"
            return regularizer.weight * (reconstructions[0][0].numel() if per_element else 1)
        own = self.average(self.encoder_end.weight_gradient(term))
        return regularizer.weight * adaptive_weight(nll, own, max_weight=MAX_PENALTY_RATIO)
