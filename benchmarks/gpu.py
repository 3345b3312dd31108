"""What one GPU does: training, sampling, encoding, decoding and the autoencoder's step, in images a second.

    python benchmarks/gpu.py --output benchmarks/results/gpu.json          # as it is, on a machine with a GPU
    python benchmarks/gpu.py --sections training --models XL --batch_size 256
    python benchmarks/gpu.py --tiny --device cpu                           # every section at a tiny size: does it run?

training    SiT-S/B/L/XL/2 in bf16, compiled, with AdamW and the average as train_transformer.py takes them, then
            `plain_sit.py`, as published code trains (TF32), and that under bf16; share of the GPU's peak (MFU), with
            the operations of the plain network, forward and twice as much backward
feed        the same batches out of a latent store through the run's loader: its rate over that of the training step
sampling    50 Euler steps without guidance, with guidance everywhere, and with guidance in [0, .75]
autoencoder encoding and decoding of 256 px images by an AutoencoderKL of SD's size
autoencoder_step  its whole training step, with LPIPS and discriminator

A batch that does not fit is halved until it does, and the row says which one was taken. Weights and data are random.
Medians of device times; variants take turns, but those of training, which would not fit together.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from autoencoder_step import build_vae
from harness import Step, median_seconds, save_result
from latent_read import Reader, write_store
from plain_sit import PlainSiT, plain_step
from torch.utils.flop_counter import FlopCounterMode

from diffusers_eqvae.data.latent_store import LatentStore
from diffusers_eqvae.guidance import IntervalGuidance
from diffusers_eqvae.losses.perceptual import LPIPS
from diffusers_eqvae.models.discriminator import PatchDiscriminator
from diffusers_eqvae.models.transformer_sit import SiTTransformer2DModel
from diffusers_eqvae.objectives.autoencoder import AutoencoderLossWeights, AutoencoderObjective, AutoencoderStep
from diffusers_eqvae.objectives.flow_matching import FlowMatchingObjective
from diffusers_eqvae.randomness import StepRandomness
from diffusers_eqvae.schedulers.scheduling_flow_match_ode import FlowMatchODEScheduler
from diffusers_eqvae.training_utils.launch import compile_in_place
from diffusers_eqvae.training_utils.optimization import (
    ExponentialAverage,
    OptimizedModule,
    step_all,
)
from diffusers_eqvae.training_utils.optimizers import build_optimizer

# Dense bfloat16 operations a second, as NVIDIA states them.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
TINY = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--models", nargs="+", default=["S", "B", "L", "XL"], choices=["S", "B", "L", "XL"])
    parser.add_argument("--batch_size", type=int, default=256, help="of training; others have their own")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--tiny", action="store_true", help="a size at which all sections run in a minute on a CPU")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.models, arguments.batch_size, arguments.repetitions = ["S"], 4, 2
        arguments.backend = "aot_eager"
    return arguments


def sizes(arguments: argparse.Namespace, model: str) -> dict[str, Any]:
    preset = TINY if arguments.tiny else SiTTransformer2DModel.PRESETS[f"SiT-{model}/2"]
    return {name: preset[name] for name in TINY} | {"sample_size": 8 if arguments.tiny else 32, "patch_size": 2}


def optimized(name: str, module: torch.nn.Module, *, average: bool) -> OptimizedModule:
    optimizer = build_optimizer("adamw", module, lr=1e-4, weight_decay=0.0)
    return OptimizedModule(
        name, module, module, optimizer, 1e-4, ExponentialAverage(module, 0.9999) if average else None
    )


def latents_and_labels(arguments: argparse.Namespace, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    side = 8 if arguments.tiny else 32
    return (
        torch.randn(count, 4, side, side, device=arguments.device),
        torch.randint(1000, (count,), device=arguments.device),
    )


def our_step(arguments: argparse.Namespace, model: str, batch_size: int) -> Step:
    """Draw, forward, backward and update as training/train_transformer.py takes them."""
    objective = FlowMatchingObjective(SiTTransformer2DModel(**sizes(arguments, model))).to(arguments.device).train()
    entry = optimized("objective", objective, average=True)
    if arguments.backend == "inductor":
        compile_in_place(objective)
    else:
        objective.compile(backend=arguments.backend)
    latents, labels = latents_and_labels(arguments, batch_size)
    batch, randomness = {"latents": latents, "class_labels": labels}, StepRandomness(0)

    def step() -> None:
        randomness.at(0, 0)
        draw = objective.draw(batch, randomness)
        with torch.autocast(arguments.device.split(":")[0], torch.bfloat16):
            output = objective(batch, draw)
        loss, _ = objective.total(output)
        loss.backward()
        step_all([entry], factor=1.0, max_grad_norm=None)

    return step


def plain_network(arguments: argparse.Namespace, model: str) -> PlainSiT:
    given = sizes(arguments, model)
    heads = given["num_attention_heads"]
    width = heads * given["attention_head_dim"]
    return PlainSiT(depth=given["num_layers"], width=width, heads=heads, side=given["sample_size"])


def fitting(build: Callable[[int], Step], batch_size: int) -> tuple[Step, int]:
    """A step that has run once, of the largest batch that fits among batch_size, half of it, a quarter ..."""
    while True:
        try:
            step = build(batch_size)
            step()
            return step, batch_size
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
        batch_size //= 2
        torch.cuda.empty_cache()


def operations(arguments: argparse.Namespace, model: str) -> int:
    """Of training on one image: three times those of the forward."""
    with torch.device("meta"):
        network, side = plain_network(arguments, model), sizes(arguments, model)["sample_size"]
        inputs = torch.empty(1, 4, side, side), torch.empty(1), torch.zeros(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            network(*inputs)
    return 3 * counter.get_total_flops()


def peak(device: str) -> float | None:
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else ""
    return next((value for key, value in PEAKS.items() if key in name), None)


def rates(arguments: argparse.Namespace, steps: dict[str, tuple[Step, int]]) -> dict[str, Any]:
    """Images a second, and the batch, of each variant."""
    medians = median_seconds(
        {name: step for name, (step, _) in steps.items()},
        device=arguments.device,
        repetitions=arguments.repetitions,
    )
    return {
        "images_per_second": {name: steps[name][1] / seconds for name, seconds in medians.items()},
        "batch_size": {name: size for name, (_, size) in steps.items()},
    }


def training(arguments: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for model in arguments.models:

        def plain(size: int, *, bf16: bool, model: str = model) -> Step:
            network = plain_network(arguments, model).to(arguments.device)
            return plain_step(network, *latents_and_labels(arguments, size), bf16=bf16)

        variants: dict[str, Callable[[int], Step]] = {
            "ours": lambda size, model=model: our_step(arguments, model, size),
            "plain": lambda size, plain=plain: plain(size, bf16=False),
            "plain_bf16": lambda size, plain=plain: plain(size, bf16=True),
        }
        of_model: dict[str, Any] = {"images_per_second": {}, "batch_size": {}, "peak_memory_gb": {}}
        on_gpu = arguments.device.startswith("cuda")
        for name, build in variants.items():  # each by itself: together they would not fit
            if on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            measured = rates(arguments, {name: fitting(build, arguments.batch_size)})
            for key, values in measured.items():
                of_model[key] |= values
            of_model["peak_memory_gb"][name] = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None
        flops, roof, speed = operations(arguments, model), peak(arguments.device), of_model["images_per_second"]
        of_model |= {"gflop_per_image": flops / 1e9, "ratio_to_plain": speed["ours"] / speed["plain"]}
        of_model["mfu"] = {name: rate * flops / roof for name, rate in speed.items()} if roof else None
        found[f"SiT-{model}/2"] = of_model
    return found


def feed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Batches of a store in the main process, against the training step of the first model."""
    count, batch = (64, 4) if arguments.tiny else (8192, arguments.batch_size)
    generator = np.random.default_rng(0)
    moments = generator.standard_normal((count, 8, 32, 32), dtype=np.float32).astype(np.float16)
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder) / "store", moments, generator.integers(0, 1000, count), max(16, count // 8))
        reader = Reader(LatentStore(Path(folder) / "store"), batch, 8)
        reading = median_seconds({"store": reader}, device="cpu", repetitions=arguments.repetitions)["store"] / 8
    step, size = fitting(lambda size: our_step(arguments, arguments.models[0], size), arguments.batch_size)
    seconds = median_seconds({"step": step}, device=arguments.device, repetitions=arguments.repetitions)["step"]
    return {
        "images_per_second": {"store": batch / reading, "step": size / seconds},
        "data_share_of_the_step": reading / batch * size / seconds,
        "model": f"SiT-{arguments.models[0]}/2",
    }


@torch.no_grad()
def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    images, calls = (2, 4) if arguments.tiny else (64, 50)
    dtype = torch.float32 if arguments.tiny else torch.bfloat16
    for model in arguments.models:
        network = SiTTransformer2DModel(**sizes(arguments, model)).to(arguments.device, dtype).eval()
        network.time_embedder.to(dtype)
        network.compile(backend=arguments.backend)
        noise, labels = latents_and_labels(arguments, images)

        def denoiser(x, timestep, y, network=network, dtype=dtype):
            return network(x.to(dtype), timestep, y, return_dict=False)[0].float()

        def sample(scale: float, interval=(0.0, 1.0), noise=noise, labels=labels, denoiser=denoiser) -> Step:
            def run() -> None:
                guidance = IntervalGuidance(
                    denoiser, guidance_scale=scale, guidance_interval=interval, null_class=1000
                )
                scheduler, x = FlowMatchODEScheduler(), noise
                scheduler.set_timesteps(calls)
                for timestep, sigma in zip(scheduler.timesteps, scheduler.sigma_list, strict=True):
                    x = scheduler.step(guidance(x, sigma, labels), timestep, x).prev_sample

            return run

        variants = {"unguided": sample(1.0), "guided": sample(1.8), "interval": sample(1.8, (0.0, 0.75))}
        for each in variants.values():
            each()  # compiles
        medians = median_seconds(variants, device=arguments.device, repetitions=arguments.repetitions, warmup=1)
        found[f"SiT-{model}/2"] = {
            "seconds_per_image": {name: seconds / images for name, seconds in medians.items()},
            "interval_over_guided": medians["interval"] / medians["guided"],
            "steps": calls,
            "batch_size": images,
        }
    return found


@torch.no_grad()
def autoencoder(arguments: argparse.Namespace) -> dict[str, Any]:
    batch, side = (1, 32) if arguments.tiny else (32, 256)
    vae = build_vae(not arguments.tiny).to(arguments.device, torch.bfloat16, memory_format=torch.channels_last).eval()
    pixels = torch.rand(batch, 3, side, side, device=arguments.device, dtype=torch.bfloat16) * 2 - 1
    raw_latents = vae.encode(pixels).latent_dist.mean
    return rates(
        arguments,
        {
            "encode": (lambda: vae.encode(pixels).latent_dist.mean, batch),
            "decode": (lambda: vae.decode(raw_latents).sample, batch),
        },
    )


def autoencoder_step(arguments: argparse.Namespace) -> dict[str, Any]:
    side, wanted = (64, 1) if arguments.tiny else (256, 16)
    device = arguments.device

    def build(size: int) -> Step:
        vae = build_vae(not arguments.tiny).to(device)
        objective = AutoencoderObjective(vae).to(device)
        discriminator, perceptual = PatchDiscriminator().to(device), LPIPS.random("vgg").to(device)
        step = AutoencoderStep(
            objective,
            objective,
            weights=AutoencoderLossWeights(),
            perceptual=perceptual,
            discriminator=discriminator,
        )
        entries = [optimized("vae", objective, average=True), optimized("discriminator", discriminator, average=False)]
        batch = {"pixel_values": torch.rand(size, 3, side, side, device=device) * 2 - 1}
        draw = {"noise": torch.randn(size, 4, side // 8, side // 8, device=device), "regularizers": {}}

        def run() -> None:
            with torch.autocast(device.split(":")[0], torch.bfloat16):
                loss, discriminator_loss, _ = step(batch, draw, 0)
            loss.backward()
            discriminator_loss.backward(inputs=list(discriminator.parameters()))
            step_all(entries, factor=1.0, max_grad_norm=None)

        return run

    return rates(arguments, {"ours": fitting(build, wanted)})


SECTIONS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "training": training,
    "feed": feed,
    "sampling": sampling,
    "autoencoder": autoencoder,
    "autoencoder_step": autoencoder_step,
}


def main() -> int:
    arguments = parse_arguments()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print("No GPU here, so there is nothing to measure; --tiny --device cpu shows that every section runs.")
        return 2
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    results = {}
    for name in arguments.sections:
        results[name] = SECTIONS[name](arguments)
        print(f"{name}: {results[name]}", flush=True)
        # After every section: what has been measured outlives a later one that fails.
        save_result(arguments.output, device=arguments.device, arguments=vars(arguments), **results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
