"""The game between an autoencoder and a discriminator: what each of the two minimises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..losses.adversarial import discriminator_loss, generator_loss, lecam_penalty, r1_penalty
from ..losses.differentiable_augmentation import NUM_UNIFORMS, augment
from ..randomness import StepRandomness

Judged = Sequence[tuple[Tensor, Tensor, float]]


class ScoreMeans(nn.Module):
    """Moving averages of a discriminator's mean logit of real and of reconstructed images, one entry a step.

        a <- decay * a + (1 - decay) * mean of the step,   read as a / (1 - decay^n) after n steps

    Several micro-batches of a step count as one larger one. All of it is state: a resumed run goes on exactly. Values
    that are not finite are left out. Differs from the authors' code: the step's own logits enter after it.
    """

    averages: Tensor
    weight: Tensor
    sums: Tensor
    count: Tensor
    step: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("averages", torch.zeros(2))
        self.register_buffer("weight", torch.zeros(()))  # 1 - decay^n
        self.register_buffer("sums", torch.zeros(2))  # of the step that is under way
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("step", torch.tensor(-1))

    @torch.no_grad()
    def anchors(self, step: int, decay: float) -> tuple[Tensor, Tensor]:
        """(2,) averages of the steps before `step`, and 1, or 0 where there have been none; waits for no device."""
        over = (self.step != step) & (self.count > 0)
        kept = torch.where(over, decay, 1.0)
        self.averages.copy_(kept * self.averages + (1 - kept) * self.sums / self.count.clamp(min=1))
        self.weight.copy_(kept * self.weight + (1 - kept))
        self.sums.mul_(~over)
        self.count.mul_(~over)
        self.step.fill_(step)
        known = self.weight > 0
        return self.averages / torch.where(known, self.weight, 1.0), known.float()

    @torch.no_grad()
    def add(self, means: Tensor) -> None:
        """Takes in (2,), the mean logits of real and of reconstructed images of a micro-batch."""
        finite = torch.isfinite(means).all()
        self.sums.add_(torch.where(finite, means, 0.0))
        self.count.add_(finite)


class AdversarialGame:
    """Both losses of the (reconstruction, target, weight) of a micro-batch; D(fake) is computed once for both.

    Args:
        discriminator: the (wrapped) discriminator.
        weights: an `AutoencoderLossWeights`.
        scores: where `weights.lecam` is not 0.
        randomness: of the step, where `weights.augment` names transforms.
        average: mean of a tensor over all ranks.
    """

    def __init__(
        self,
        discriminator: nn.Module,
        *,
        weights: Any,
        scores: ScoreMeans | None,
        randomness: StepRandomness | None,
        average: Callable[[Tensor], Tensor],
    ) -> None:
        if weights.lecam and scores is None:
            raise ValueError("LeCam needs moving averages of the logits; give the objective ScoreMeans() as scores.")
        if weights.augment and randomness is None:
            raise ValueError("Augmenting what the discriminator sees needs the step's randomness; give it.")
        self.discriminator, self.weights, self.average = discriminator, weights, average
        self.scores = scores if weights.lecam else None
        self.randomness = randomness

    def play(self, judged: Judged, step: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """The generator's adversarial loss, the discriminator's, and what to log."""
        weights = self.weights
        adversarial, losses, lecam, r1, means = [], [], [], [], []
        anchors, known = (None, None) if self.scores is None else self.scores.anchors(step, weights.lecam_decay)
        for image, target, weight in judged:
            fake = self.discriminator(self._seen(image))
            adversarial.append(weight * generator_loss(fake))
            target = self._seen(target)
            if weights.r1:
                target = target.detach().requires_grad_()
            real = self.discriminator(target)
            losses.append(weight * discriminator_loss(real, fake, weights.discriminator_loss))
            if weights.r1:
                r1.append(weight * r1_penalty(real, target))
            if anchors is not None:
                lecam.append(weight * known * lecam_penalty(real, fake, anchors))
            means.append(torch.stack([real.detach().float().mean(), fake.detach().float().mean()]))
        loss = total(losses)
        logs = {"loss/discriminator": loss, "logits/real": means[0][0], "logits/fake": means[0][1]}
        if weights.r1:
            logs |= {"loss/r1": total(r1)}
            loss = loss + 0.5 * weights.r1 * logs["loss/r1"]
        if self.scores is not None:
            self.scores.add(self.average(means[0]))
            logs |= {"loss/lecam": total(lecam)}
            loss = loss + weights.lecam * logs["loss/lecam"]
        return total(adversarial), loss, logs

    def _seen(self, images: Tensor) -> Tensor:
        """The images, or what their transforms make of them; each call draws anew."""
        if not self.weights.augment:
            return images
        assert self.randomness is not None
        uniforms = self.randomness.rand((len(images), NUM_UNIFORMS), device=images.device)
        return augment(images, uniforms, self.weights.augment)


def total(terms: Sequence[Tensor]) -> Tensor:
    """Their sum, from the first to the last."""
    found = terms[0]
    for term in terms[1:]:
        found = found + term
    return found
