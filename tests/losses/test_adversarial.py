"""The adversarial losses against a float64 transcription, and the adaptive weight's laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusers_eqvae.losses.adversarial import (
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    lecam_penalty,
    r1_penalty,
)


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 1, 6, 6, dtype=torch.float64) * 2, torch.randn(2, 1, 4, 4, dtype=torch.float64) * 2


def test_hinge_is_its_formula(logits):
    real, fake = (tensor.numpy() for tensor in logits)
    expected = 0.5 * (np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean())
    np.testing.assert_allclose(discriminator_loss(*logits, kind="hinge").item(), expected, rtol=1e-12)


def test_vanilla_is_its_formula(logits):
    """The negative log-likelihood of a logistic discriminator, halved."""
    real, fake = (tensor.numpy() for tensor in logits)
    sigmoid = [1 / (1 + np.exp(-values)) for values in (real, fake)]
    expected = -0.5 * (np.log(sigmoid[0]).mean() + np.log(1 - sigmoid[1]).mean())
    np.testing.assert_allclose(discriminator_loss(*logits, kind="vanilla").item(), expected, rtol=1e-12)


def test_lecam_is_its_formula(logits):
    """Real logits above the average of fake ones, and fake ones below that of real ones, each squared."""
    anchors = torch.tensor([0.7, -0.4], dtype=torch.float64)
    real = [max(0.0, value + 0.4) ** 2 for value in logits[0].flatten().tolist()]
    fake = [max(0.0, 0.7 - value) ** 2 for value in logits[1].flatten().tolist()]
    expected = sum(real) / len(real) + sum(fake) / len(fake)
    assert lecam_penalty(*logits, anchors).item() == pytest.approx(expected, rel=1e-12)
    assert lecam_penalty(torch.tensor([-5.0]), torch.tensor([5.0]), anchors).item() == 0


def test_r1_of_a_discriminator_whose_gradient_is_known():
    """D(x) = mean over two patches of <w, x> and <x, x>: gradient (w + 2 x) / 2 at each image by itself."""
    generator = torch.Generator().manual_seed(0)
    images, w = (torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    w = w[:1].requires_grad_()
    images.requires_grad_()
    logits = torch.stack([(w * images).sum((1, 2, 3)), images.square().sum((1, 2, 3))], 1).view(3, 1, 1, 2)
    penalty = r1_penalty(logits, images)
    expected = ((w + 2 * images) / 2).square().sum((1, 2, 3)).mean()
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-12)
    (found,) = torch.autograd.grad(penalty, w)
    np.testing.assert_allclose(
        found.numpy(), ((w + 2 * images) / 2).mean(0, keepdim=True).detach().numpy(), rtol=1e-12
    )


@pytest.mark.parametrize("kind", ["hinge", "vanilla"])
def test_a_right_discriminator_loses_less(kind):
    high, low = torch.full((2, 1, 3, 3), 2.0), torch.full((2, 1, 3, 3), -2.0)
    assert discriminator_loss(high, low, kind=kind) < discriminator_loss(low, high, kind=kind)


def test_generator_wants_its_images_called_real():
    logits_fake = torch.randn(2, 1, 3, 3, requires_grad=True)
    loss = generator_loss(logits_fake)
    torch.testing.assert_close(loss, -logits_fake.mean())
    loss.backward()
    assert (logits_fake.grad < 0).all()


def test_losses_of_half_precision_logits_are_float32():
    half = torch.randn(2, 1, 3, 3).to(torch.bfloat16)
    assert discriminator_loss(half, half).dtype == generator_loss(half).dtype == torch.float32


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="hinge, vanilla"):
        discriminator_loss(torch.zeros(1), torch.zeros(1), kind="wgan")


def test_adaptive_weight_is_the_clamped_ratio_of_norms():
    reference, own = torch.randn(8, 4, 3, 3), torch.randn(8, 4, 3, 3)
    expected = reference.norm() / (own.norm() + 1e-4)
    torch.testing.assert_close(adaptive_weight(reference, own), expected)
    torch.testing.assert_close(adaptive_weight(reference * 1e-8, own * 0), reference.norm() * 1e-4)
    assert adaptive_weight(reference, own * 0) == 1e4
    assert adaptive_weight(reference * 0, own) == 0.0


def test_weighted_term_pulls_as_hard_as_the_reference():
    reference, own = torch.randn(100) * 30, torch.randn(100)
    torch.testing.assert_close((adaptive_weight(reference, own) * own).norm(), reference.norm(), rtol=1e-4, atol=0)


def test_adaptive_weight_takes_several_tensors_as_one():
    first, second, own = torch.randn(3, 4), torch.randn(5), torch.randn(7)
    joined = adaptive_weight(torch.cat([first.flatten(), second]), own)
    torch.testing.assert_close(adaptive_weight([first, second], [own]), joined)


def test_adaptive_weight_carries_no_gradient():
    layer = torch.randn(4, 4, requires_grad=True)
    gradient = torch.autograd.grad((layer**3).sum(), layer, create_graph=True)[0]
    assert not adaptive_weight(gradient, gradient).requires_grad


def test_adaptive_weight_of_bfloat16_gradients_is_float32():
    gradient = torch.full((10_000,), 0.01, dtype=torch.bfloat16)
    weight = adaptive_weight(gradient, torch.ones(1))
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, gradient.double().norm().float(), rtol=1e-3, atol=0)
