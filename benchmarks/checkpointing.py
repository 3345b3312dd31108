"""What gradient checkpointing of every n-th block saves and costs: bytes kept for the backward, and time of a step.

    python benchmarks/checkpointing.py --output benchmarks/results/checkpointing_cpu.json
    python benchmarks/checkpointing.py --model SiT-XL/2 --batch_size 32 --device cuda

Bytes are those of the tensors that autograd keeps between forward and backward, each storage once, weights apart.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from harness import Step, median_seconds, save_result

from diffusers_eqvae.models.transformer_sit import SiTTransformer2DModel


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SiT-S/2")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--every", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--output", type=Path, help="write the result as JSON")
    return parser.parse_args()


def kept_bytes(model: SiTTransformer2DModel, inputs: tuple[torch.Tensor, ...]) -> int:
    weights = {weight.untyped_storage().data_ptr() for weight in [*model.parameters(), *model.buffers()]}
    kept: dict[int, tuple[torch.Tensor, int]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(*inputs).sample.square().mean()
    total = sum(size for _, size in kept.values())
    del output
    return total


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    model = SiTTransformer2DModel.from_preset(arguments.model).to(arguments.device).train()
    torch.nn.init.normal_(model.proj_out.weight, std=0.02)
    count, device = arguments.batch_size, arguments.device
    inputs = (
        torch.randn(count, 4, 32, 32, device=device),
        torch.rand(count, device=device) * 1000,
        torch.zeros(count, dtype=torch.int64, device=device),
    )

    def configure(every: int | None) -> None:
        if every is None:
            model.disable_gradient_checkpointing()
        else:
            model.enable_gradient_checkpointing()
            model.gradient_checkpointing_every = every

    def step(every: int | None) -> Step:
        def run() -> None:
            configure(every)
            model(*inputs).sample.square().mean().backward()
            model.zero_grad()

        return run

    variants = {"none": None, **{f"every {every}": every for every in arguments.every}}
    sizes = {}
    for name, every in variants.items():
        configure(every)
        sizes[name] = kept_bytes(model, inputs)
    medians = median_seconds(
        {name: step(every) for name, every in variants.items()},
        device=device,
        repetitions=arguments.repetitions,
        warmup=1,
    )
    memory = {name: size / sizes["none"] for name, size in sizes.items()}
    time = {name: seconds / medians["none"] for name, seconds in medians.items()}
    for name in variants:
        print(f"{name:10} memory {memory[name]:.3f} ({sizes[name] / 1e6:.0f} MB)   time {time[name]:.3f}")
    save_result(
        arguments.output,
        device=device,
        arguments=vars(arguments),
        kept_megabytes={name: size / 1e6 for name, size in sizes.items()},
        memory_ratio=memory,
        time_ratio=time,
    )


if __name__ == "__main__":
    main()
