"""Times one autoencoder training step (VAE + LPIPS + PatchGAN) against the plain one, and compares their gradients.

The plain step (tests/golden/plain_autoencoder_step.py) runs the generator forward twice and differentiates each
loss by itself down to the decoder's last layer, as VQGAN and latent-diffusion code does. Networks are freshly
initialised; LPIPS and the teacher have random weights of published architectures, which cost the same. Measured are a
step without tau, steps as equivariance draws them by default (the same draws for both), and what alignment adds to a
step without tau, in forwards of its teacher (DINOv2-L, one token a latent position).

    python benchmarks/autoencoder_step.py --output benchmarks/results/autoencoder_step_cpu.json
    python benchmarks/autoencoder_step.py --full --resolution 256 --device cuda --batch_size 10
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import torch
from harness import Step, median_seconds, save_result
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from diffusers_eqvae.autoencoders import downsampling_factor, last_decoder_layer
from diffusers_eqvae.losses.perceptual import LPIPS
from diffusers_eqvae.models.alignment_network import AlignmentNetwork
from diffusers_eqvae.models.autoencoder_kl_eq import AutoencoderKLEQ
from diffusers_eqvae.models.discriminator import PatchDiscriminator
from diffusers_eqvae.models.feature_teacher import FeatureTeacher
from diffusers_eqvae.objectives.autoencoder import AutoencoderLossWeights, AutoencoderObjective, AutoencoderStep
from diffusers_eqvae.randomness import StepRandomness
from diffusers_eqvae.regularizers.alignment import AlignmentRegularizer
from diffusers_eqvae.regularizers.equivariance import EquivarianceRegularizer

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "golden"))  # the plain step is a test's reference
from plain_autoencoder_step import plain_discriminator_loss, plain_generator_loss

WANTED = {"without tau": 0.75, "equivariance": 0.70}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the 83.7 M parameter SD-VAE; else one of half the width")
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--draws", type=int, default=8, help="steps of equivariance that are timed together")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--only", choices=("steps", "alignment"), help="leave the other half out")
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


def build_teacher(positions: int) -> FeatureTeacher:
    """DINOv2-L with random weights, of as many tokens a side as there are latent positions."""
    config = Dinov2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, patch_size=14)
    return FeatureTeacher(Dinov2Model(config), image_size=14 * positions, final_norm=False)


def gradients(*modules: nn.Module) -> Tensor:
    """All gradients in one vector; they are cleared."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
    for parameter in parameters:
        parameter.grad = None
    return flat


class Rival:
    """One set of networks, stepped our way and the plain way on the same images.

    Args:
        networks: autoencoder, discriminator and LPIPS.
        regularizers: by name.
        judged: whether the discriminator takes part.
    """

    def __init__(
        self,
        networks: tuple[Any, ...],
        batch: dict[str, Tensor],
        regularizers: dict[str, Any],
        *,
        judged: bool = True,
    ) -> None:
        vae, self.discriminator, self.perceptual = networks
        self.vae = copy.deepcopy(vae)  # a step keeps what goes through its last layers
        self.batch, self.weights = batch, AutoencoderLossWeights(discriminator=0.5 if judged else 0)
        self.objective = AutoencoderObjective(self.vae, regularizers).to(batch["pixel_values"].device)
        parts = {"perceptual": self.perceptual, "discriminator": self.discriminator}
        self.step = AutoencoderStep(self.objective, self.objective, weights=self.weights, **parts)

    def draws(self, count: int) -> list[dict[str, Any]]:
        return [self.objective.draw(self.batch, StepRandomness(seed=0).at(number, 0)) for number in range(count)]

    def ours(self, draws: list[dict[str, Any]]) -> Tensor:
        for draw in draws:
            loss, discriminator_loss, _ = self.step(self.batch, draw, 0)
            loss.backward()
            if discriminator_loss is not None:
                discriminator_loss.backward(inputs=list(self.discriminator.parameters()))
        judges = [self.discriminator] if self.weights.discriminator else []
        return gradients(self.vae, *judges)

    def plain(self, draws: list[dict[str, Any]]) -> Tensor:
        shared, total = (self.objective, self.discriminator, self.perceptual), 0
        for draw in draws:
            last = last_decoder_layer(self.vae).weight
            plain_generator_loss(*shared, last, self.batch, draw, self.weights).backward()
            from_generator = gradients(self.vae)
            self.discriminator.zero_grad()
            plain_discriminator_loss(*shared, self.batch, draw, self.weights).backward()
            total = total + torch.cat([from_generator, gradients(self.discriminator)])
        return total


def compare(rival: Rival, count: int, options: dict[str, Any]) -> dict[str, Any]:
    """Seconds of both, their ratio, and how far their gradients are apart."""
    draws = rival.draws(count)
    expected = rival.plain(draws)
    difference = ((rival.ours(draws) - expected).norm() / expected.norm()).item()
    steps: dict[str, Step] = {"plain": lambda: rival.plain(draws), "ours": lambda: rival.ours(draws)}
    medians = median_seconds(steps, warmup=1, **options)
    return {"seconds": medians, "ratio": medians["ours"] / medians["plain"], "gradient_difference": difference}


def cost_of_alignment(networks: tuple[Any, ...], batch: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
    """What alignment adds to a step, by its kind of weight and with stored features, in forwards of its teacher."""
    pixels, vae = batch["pixel_values"], networks[0]
    teacher = build_teacher(pixels.shape[-1] // downsampling_factor(vae)).to(pixels.device)
    patch, cls = teacher(pixels)

    def aligned(source: Any, adaptive: bool, judged: bool = True) -> Rival:
        network = AlignmentNetwork.for_teacher(teacher, latent_channels=4)
        regularizer = AlignmentRegularizer(network, source, adaptive=adaptive)
        stored = dict(zip((f"features.{name}" for name in regularizer.features), (patch, cls), strict=False))
        return Rival(networks, batch | stored, {"alignment": regularizer}, judged=judged)

    rivals = {
        "without": Rival(networks, batch, {}),
        "without, no discriminator": Rival(networks, batch, {}, judged=False),
        "fixed weight": aligned(teacher, False),
        "adaptive weight": aligned(teacher, True),
        "adaptive weight, no discriminator": aligned(teacher, True, judged=False),
        "stored features, fixed weight": aligned("teacher", False),
    }
    steps: dict[str, Step] = {name: (lambda each=each: each.ours(each.draws(1))) for name, each in rivals.items()}
    medians = median_seconds({**steps, "teacher": lambda: teacher(pixels)}, warmup=1, **options)
    added = {}
    for name in list(rivals)[2:]:
        base = medians["without, no discriminator" if "no discriminator" in name else "without"]
        added[name] = (medians[name] - base) / medians["teacher"]
    return {"seconds": medians, "added_teacher_forwards": added}


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    device, side = arguments.device, arguments.resolution
    # Group normalisation: batch statistics of the plain step's extra forwards must not change the comparison.
    networks = tuple(
        each.to(device) for each in (build_vae(arguments.full), PatchDiscriminator(norm="group"), LPIPS.random("vgg"))
    )
    batch = {"pixel_values": torch.rand(arguments.batch_size, 3, side, side, device=device) * 2 - 1}
    options = {"device": device, "repetitions": arguments.repetitions}
    found: dict[str, Any] = {}
    if arguments.only != "alignment":
        tau = EquivarianceRegularizer(downsampling_factor(networks[0]))
        found["without tau"] = compare(Rival(networks, batch, {}), 1, options)
        found["equivariance"] = compare(Rival(networks, batch, {"equivariance": tau}), arguments.draws, options)
        for name, wanted in WANTED.items():
            row = found[name]
            said = f"{row['ratio']:.3f} of the plain step (wanted <= {wanted})"
            print(f"{name}: {said}, gradients differ by {row['gradient_difference']:.1e} (wanted <= 1e-5)")
    if arguments.only != "steps":
        found["alignment"] = cost_of_alignment(networks, batch, options)
        for name, forwards in found["alignment"]["added_teacher_forwards"].items():
            print(f"alignment, {name}: adds {forwards:.2f} forwards of its teacher (wanted <= 1)")
    parameters = sum(parameter.numel() for parameter in networks[0].parameters())
    save_result(arguments.output, device=device, arguments=vars(arguments), parameters=parameters, **found)


if __name__ == "__main__":
    main()
