"""The discriminator's regularization in the game: LeCam's state, the place of R1 and augmentation, the default."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from diffusers_eqvae.losses.adversarial import discriminator_loss, generator_loss, lecam_penalty, r1_penalty
from diffusers_eqvae.losses.differentiable_augmentation import augment
from diffusers_eqvae.models.discriminator import PatchDiscriminator
from diffusers_eqvae.objectives._adversarial import AdversarialGame, ScoreMeans
from diffusers_eqvae.objectives.autoencoder import AutoencoderLossWeights
from diffusers_eqvae.randomness import StepRandomness


def judged(batch_size: int = 2, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    image, target = (torch.rand(batch_size, 3, 16, 16, generator=generator) * 2 - 1 for _ in range(2))
    return [(image.requires_grad_(), target, 1.0)]


def make_game(*, scores=None, randomness=None, **weights):
    torch.manual_seed(1)
    discriminator = PatchDiscriminator(base_channels=4, num_layers=1, norm="group")
    return AdversarialGame(
        discriminator,
        weights=AutoencoderLossWeights(**weights),
        scores=scores,
        randomness=randomness,
        average=lambda tensor: tensor,
    )


def moving_averages(steps, decay):
    """By hand: of the steps before each, the average whose weights decay^age sum to 1."""
    found = []
    for now in range(len(steps)):
        shares = [decay ** (now - 1 - then) for then in range(now)]
        found.append([sum(s * steps[t][i] for t, s in enumerate(shares)) / sum(shares or [1]) for i in range(2)])
    return found


def test_averages_are_those_of_the_steps_before():
    steps = [[1.0, -2.0], [3.0, 0.5], [-1.0, 4.0], [2.0, 2.0]]
    scores, expected = ScoreMeans(), moving_averages(steps, 0.9)
    for step, means in enumerate(steps):
        anchors, known = scores.anchors(step, 0.9)
        assert known.item() == (step > 0) and anchors.tolist() == pytest.approx(expected[step], rel=1e-5)
        scores.add(torch.tensor(means))


def test_micro_batches_are_one_larger_batch_and_a_resumed_run_goes_on():
    whole, parts = ScoreMeans(), ScoreMeans()
    for step in range(3):
        values = torch.tensor([[float(step), 1.0], [2.0, -float(step)]])
        anchors = whole.anchors(step, 0.8)[0]
        whole.add(values.mean(0))
        for value in values:
            assert torch.equal(parts.anchors(step, 0.8)[0], anchors)  # the second part does not see the first
            parts.add(value)
        resumed = ScoreMeans()
        resumed.load_state_dict(copy.deepcopy(parts.state_dict()))
        parts = resumed


def test_what_is_not_finite_leaves_no_trace():
    scores = ScoreMeans()
    scores.anchors(0, 0.9)
    scores.add(torch.tensor([1.0, 2.0]))
    scores.add(torch.tensor([math.nan, 5.0]))
    assert scores.anchors(1, 0.9)[0].tolist() == pytest.approx([1.0, 2.0])


def test_losses_are_their_parts():
    """Against the plain formulas, with every regularization on."""
    scores, kinds = ScoreMeans(), ("color", "cutout")
    weights = {"lecam": 0.3, "r1": 2.0, "augment": kinds, "lecam_decay": 0.5}
    game = make_game(scores=scores, randomness=StepRandomness(0), **weights)
    game.play(judged(seed=5), step=0)
    pairs = judged()
    adversarial, loss, logs = game.play(pairs, step=1)

    randomness, discriminator = StepRandomness(0), game.discriminator
    before = [augment(images, randomness.rand((2, 7)), kinds) for images in judged(seed=5)[0][:2]]
    anchors = torch.stack([discriminator(images).mean() for images in reversed(before)])
    image, target = (augment(images, randomness.rand((2, 7)), kinds) for images in pairs[0][:2])
    target = target.detach().requires_grad_()
    fake, real = discriminator(image), discriminator(target)
    r1, lecam = r1_penalty(real, target), lecam_penalty(real, fake, anchors)
    expected = discriminator_loss(real, fake) + 0.5 * 2.0 * r1 + 0.3 * lecam
    assert r1 > 0 and lecam > 0
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert adversarial.item() == pytest.approx(generator_loss(fake).item(), rel=1e-5)
    assert logs["loss/discriminator"].item() == pytest.approx(discriminator_loss(real, fake).item(), rel=1e-5)
    assert (logs["loss/r1"].item(), logs["loss/lecam"].item()) == pytest.approx((r1.item(), lecam.item()), rel=1e-5)


@pytest.mark.parametrize("weights", [{"lecam": 1.0}, {"r1": 1.0}, {"augment": ("color", "translation", "cutout")}])
def test_each_moves_the_discriminator_alone_and_the_reconstruction_still_hears_of_it(weights):
    def gradients(**chosen):
        game = make_game(scores=ScoreMeans(), randomness=StepRandomness(0), **chosen)
        game.play(judged(seed=5), step=0)
        pairs = judged()
        adversarial, loss, _ = game.play(pairs, step=1)
        (heard,) = torch.autograd.grad(adversarial, pairs[0][0], retain_graph=True)
        loss.backward(inputs=list(game.discriminator.parameters()))
        return heard, torch.cat([each.grad.flatten() for each in game.discriminator.parameters()])

    (plain_heard, plain), (heard, moved) = gradients(), gradients(**weights)
    assert not torch.equal(plain, moved) and moved.isfinite().all() and heard.abs().sum() > 0
    assert torch.equal(heard, plain_heard) == ("augment" not in weights)


def test_without_them_nothing_is_drawn_kept_or_computed_twice():
    class Watched(nn.Module):
        def forward(self, images):
            seen.append(images)
            return images.mean((1, 2, 3), keepdim=True)

    seen: list[torch.Tensor] = []
    game, randomness, scores = make_game(), StepRandomness(0), ScoreMeans()
    game = AdversarialGame(
        Watched(),
        weights=AutoencoderLossWeights(),
        scores=scores,
        randomness=randomness,
        average=lambda tensor: tensor,
    )
    pairs = judged()
    game.play(pairs, step=0)
    assert seen[0] is pairs[0][0] and seen[1] is pairs[0][1] and len(seen) == 2
    assert randomness.call == 0 and scores.count == 0


@pytest.mark.parametrize(
    ("weights", "said"), [({"lecam": 1.0}, "ScoreMeans"), ({"augment": ("color",)}, "randomness")]
)
def test_what_is_missing_is_named(weights, said):
    with pytest.raises(ValueError, match=said):
        make_game(**weights)
