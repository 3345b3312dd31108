"""Times guided sampling in an interval against guidance everywhere: the cost should be (1 + f) / 2.

f is the share of model calls inside the interval: outside it the unconditional forward is skipped, so a call costs a
batch of B there and of 2B inside. Also checks that the samples equal those of always running both forwards.

    python benchmarks/guidance_interval.py --output benchmarks/results/guidance_interval_cpu.json
    python benchmarks/guidance_interval.py --model SiT-XL/2 --batch_size 64 --device cuda
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from harness import median_seconds, save_result

from diffusers_eqvae.guidance import IntervalGuidance
from diffusers_eqvae.models.transformer_sit import SiTTransformer2DModel
from diffusers_eqvae.schedulers.scheduling_flow_match_ode import FlowMatchODEScheduler

TOLERANCE = 0.03


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SiT-S/2")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--num_inference_steps", type=int, default=8)
    parser.add_argument("--guidance_interval", type=float, nargs=2, default=(0.0, 0.75))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    return parser.parse_args()


@torch.no_grad()
def sample(arguments: argparse.Namespace, model: SiTTransformer2DModel, interval, scale_at=None):
    """(samples, evaluations per sample); `scale_at(sigma)` overrides the interval by a scale per call, always 2x."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(arguments.batch_size, 4, 32, 32, generator=generator).to(arguments.device)
    labels = torch.zeros(arguments.batch_size, dtype=torch.long, device=arguments.device)
    scheduler = FlowMatchODEScheduler()
    scheduler.set_timesteps(arguments.num_inference_steps, device=arguments.device)

    def denoiser(hidden_states, timestep, class_labels):
        return model(hidden_states, timestep, class_labels).sample

    guidance = IntervalGuidance(denoiser, guidance_scale=1.8, guidance_interval=interval, null_class=model.null_class)
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigma_list, strict=True):
        if scale_at is not None:
            # Any scale but 1, so that the call runs both forwards; exactly 1 would skip one.
            guidance.guidance_scale = scale_at(sigma)
        latents = scheduler.step(guidance(latents, sigma, labels), timestep, latents).prev_sample
    return latents, guidance.nfe


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    model = SiTTransformer2DModel.from_preset(arguments.model).to(arguments.device).eval()
    torch.nn.init.normal_(model.proj_out.weight, std=0.02)
    low, high = arguments.guidance_interval
    samples, nfe = sample(arguments, model, (low, high))
    _, nfe_full = sample(arguments, model, (0.0, 1.0))
    nearly_one = 1.0 + 1e-9
    expected, _ = sample(
        arguments, model, (0.0, 1.0), scale_at=lambda sigma: 1.8 if low <= sigma <= high else nearly_one
    )
    difference = (samples - expected).abs().max().item()

    medians = median_seconds(
        {
            "everywhere": lambda: sample(arguments, model, (0.0, 1.0)),
            "interval": lambda: sample(arguments, model, (low, high)),
        },
        device=arguments.device,
        repetitions=arguments.repetitions,
    )
    ratio, wanted = medians["interval"] / medians["everywhere"], nfe / nfe_full
    print(f"evaluations per sample {nfe:g} of {nfe_full:g}: (1 + f) / 2 = {wanted:.4f}")
    print(f"everywhere {medians['everywhere']:.3f} s, interval {medians['interval']:.3f} s, ratio {ratio:.4f}")
    print(f"off by {ratio / wanted - 1:+.2%} (wanted within {TOLERANCE:.0%}); samples differ by {difference:.1e}")
    save_result(
        arguments.output,
        device=arguments.device,
        arguments=vars(arguments),
        median_seconds=medians,
        ratio=ratio,
        expected_ratio=wanted,
        sample_difference=difference,
    )


if __name__ == "__main__":
    main()
