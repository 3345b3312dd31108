"""The textbook VAE-GAN step that ours is measured against: clear, and as expensive as it is usually written.

Generator and discriminator each run the generator forward, the adaptive weight differentiates both losses down to the
decoder's last layer, and the sum is differentiated once more. The definition of the right gradients for
tests/objectives/test_autoencoder.py, and what benchmarks/autoencoder_step.py is measured against.
"""

import torch
import torch.nn.functional as F


def plain_generator_loss(objective, discriminator, perceptual, last_weight, batch, draw, weights):
    """nll + w * g + kl, with w = disc_weight * |grad nll| / (|grad g| + 1e-4) at `last_weight` (VQGAN, eq. 7)."""
    output = objective(batch, draw)
    ((reconstruction, target, _),) = output["decodings"]
    difference = (reconstruction - target).abs()
    if weights.perceptual:
        difference = difference + weights.perceptual * perceptual(reconstruction, target).view(-1, 1, 1, 1)
    nll = difference.sum() / len(target)
    adversarial = -discriminator(reconstruction).mean()
    nll_gradient = torch.autograd.grad(nll, last_weight, retain_graph=True)[0]
    adversarial_gradient = torch.autograd.grad(adversarial, last_weight, retain_graph=True)[0]
    ratio = (nll_gradient.norm() / (adversarial_gradient.norm() + 1e-4)).clamp(0, 1e4).detach()
    return nll + weights.discriminator * ratio * adversarial + weights.kl * output["terms"]["kl"]


def plain_discriminator_loss(objective, discriminator, perceptual, batch, draw, weights):
    """Hinge loss on a second generator forward; the perceptual loss is computed and thrown away."""
    output = objective(batch, draw)
    ((reconstruction, target, _),) = output["decodings"]
    if weights.perceptual:
        perceptual(reconstruction, target)
    fake, real = discriminator(reconstruction.detach()), discriminator(target)
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
