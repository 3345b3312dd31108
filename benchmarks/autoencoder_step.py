"""Times one autoencoder training step (VAE + LPIPS + PatchGAN) against the plain one, and compares their gradients.

The plain step (tests/golden/plain_autoencoder_step.py) runs the generator forward twice and differentiates each
loss by itself down to the decoder's last layer, as VQGAN and latent-diffusion code does. Networks are freshly
initialised; LPIPS has random weights of the published architecture, which cost the same. No tau: the saving of
smaller decodes comes on top.

    python benchmarks/autoencoder_step.py --output benchmarks/results/autoencoder_step_cpu.json
    python benchmarks/autoencoder_step.py --full --resolution 256 --device cuda --batch_size 10
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from harness import median_seconds, save_result
from torch import nn

from diffusers_eqvae.autoencoders import downsampling_factor, last_decoder_layer
from diffusers_eqvae.losses.perceptual import LPIPS
from diffusers_eqvae.models.autoencoder_kl_eq import AutoencoderKLEQ
from diffusers_eqvae.models.discriminator import PatchDiscriminator
from diffusers_eqvae.objectives.autoencoder import AutoencoderLossWeights, AutoencoderObjective, AutoencoderStep

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "golden"))  # the plain step is a test's reference
from plain_autoencoder_step import plain_discriminator_loss, plain_generator_loss


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the 83.7 M parameter SD-VAE; else one of half the width")
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    return parser.parse_args()


def build_vae(full: bool) -> AutoencoderKLEQ:
    widths = (128, 256, 512, 512) if full else (64, 128, 256, 256)
    return AutoencoderKLEQ(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )


def gradients(*modules: nn.Module) -> torch.Tensor:
    """All gradients in one vector; they are cleared."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
    for parameter in parameters:
        parameter.grad = None
    return flat


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    device, weights = arguments.device, AutoencoderLossWeights()
    vae = build_vae(arguments.full).to(device)
    objective = AutoencoderObjective(vae).to(device)
    # Group normalisation: batch statistics of the plain step's extra forwards must not change the comparison.
    discriminator = PatchDiscriminator(norm="group").to(device)
    perceptual = LPIPS.random("vgg").to(device)
    side, positions = arguments.resolution, arguments.resolution // downsampling_factor(vae)
    batch = {"pixel_values": torch.rand(arguments.batch_size, 3, side, side, device=device) * 2 - 1}
    noise = torch.randn(arguments.batch_size, 4, positions, positions, device=device)
    draw = {"noise": noise, "regularizers": {}}
    step = AutoencoderStep(objective, objective, weights=weights, perceptual=perceptual, discriminator=discriminator)
    networks = (objective, discriminator, perceptual)

    def ours() -> torch.Tensor:
        loss, discriminator_loss, _ = step(batch, draw, 0)
        loss.backward()
        discriminator_loss.backward(inputs=list(discriminator.parameters()))
        return gradients(vae, discriminator)

    def plain() -> torch.Tensor:
        plain_generator_loss(*networks, last_decoder_layer(vae).weight, batch, draw, weights).backward()
        from_generator = gradients(vae)
        discriminator.zero_grad()
        plain_discriminator_loss(*networks, batch, draw, weights).backward()
        return torch.cat([from_generator, gradients(discriminator)])

    expected = plain()
    difference = ((ours() - expected).norm() / expected.norm()).item()
    medians = median_seconds({"plain": plain, "ours": ours}, device=device, repetitions=arguments.repetitions)
    ratio = medians["ours"] / medians["plain"]
    print(f"plain {medians['plain']:.3f} s, ours {medians['ours']:.3f} s, ratio {ratio:.3f} (wanted <= 0.75)")
    print(f"relative difference of the gradients {difference:.1e} (wanted <= 1e-5)")
    save_result(
        arguments.output,
        device=device,
        arguments=vars(arguments),
        median_seconds=medians,
        ratio=ratio,
        gradient_difference=difference,
        parameters=sum(parameter.numel() for parameter in vae.parameters()),
    )


if __name__ == "__main__":
    main()
