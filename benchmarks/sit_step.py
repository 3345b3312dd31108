"""Times SiTTransformer2DModel against diffusers' DiTTransformer2DModel of the same size, and against the SiT code.

All variants run interleaved in one process on the same inputs; what counts are the ratios of their medians. Rows:
`forward` (no gradients), `forward_backward`, `training_step` (with the same fused AdamW step), and `trainer_step` with
all that a trainer does to the weights: clipping, AdamW and EMA, ours as training/train_transformer.py takes them, and
theirs as diffusers' training scripts do (AdamW's default form, EMAModel). Seconds are the process's own CPU seconds,
which other people's work on the machine does not inflate, and device events on a GPU.

    python benchmarks/sit_step.py --model SiT-S/2 --batch_size 4 --output sit_step.json
    python benchmarks/sit_step.py --compile                       # adds our compiled forward
    python benchmarks/sit_step.py --reference path/to/SiT         # adds models.py of a checkout of the SiT code
    python benchmarks/sit_step.py --device cuda --bf16 --model SiT-XL/2 --batch_size 256
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from diffusers.training_utils import EMAModel
from harness import Step, median_seconds, save_result
from torch import nn

from diffusers_eqvae.models.transformer_sit import SiTTransformer2DModel
from diffusers_eqvae.training_utils.optimization import ExponentialAverage, OptimizedModule
from diffusers_eqvae.training_utils.optimizers import build_optimizer

NUM_CLASSES = 1000
ROWS = ("forward", "forward_backward", "training_step", "trainer_step")
LEARNING_RATE, EMA_DECAY, MAX_NORM = 1e-4, 0.9999, 1.0
PRESETS = SiTTransformer2DModel.PRESETS
MODELS = [name for name in PRESETS if name.startswith("SiT")]
SHARED_OPTIONS = ("num_layers", "num_attention_heads", "attention_head_dim", "patch_size")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--model",
        default="SiT-S/2",
        choices=MODELS,
    )
    add("--sample_sizes", type=int, nargs="+", default=[32, 16], help="sides of the latents in cells")
    add("--batch_size", type=int, default=4)
    add("--repetitions", type=int, default=9, help="timed runs of every row; the median is reported")
    add("--device", default="cpu")
    add("--bf16", action="store_true", help="run under bfloat16 autocast")
    add("--threads", type=int, default=1, help="CPU threads")
    add("--compile", action="store_true", help="also time our model through torch.compile")
    add("--reference", type=Path, help="checkout of the SiT code, whose models.py is timed as well")
    add("--output", type=Path, help="write the result as JSON")
    return parser.parse_args()


def reference_model(arguments: argparse.Namespace, sample_size: int) -> nn.Module | None:
    """The SiT of a local checkout's models.py, or None with the reason on stderr."""
    checkout = arguments.reference
    try:
        spec = importlib.util.spec_from_file_location("reference_models", checkout / "models.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (ImportError, OSError, AttributeError) as error:
        print(f"Reference left out: {checkout / 'models.py'} does not load ({error}).", file=sys.stderr)
        return None
    return module.SiT_models[arguments.model](input_size=sample_size, num_classes=NUM_CLASSES)


def build_variants(arguments: argparse.Namespace, sample_size: int) -> dict[str, tuple[nn.Module, Callable]]:
    """Name -> (module that owns the parameters, function of (latents, timestep, labels) that gives a tensor)."""
    preset = {name: value for name, value in PRESETS[arguments.model].items() if name in SHARED_OPTIONS}
    ours = SiTTransformer2DModel.from_preset(arguments.model, sample_size=sample_size)
    theirs = DiTTransformer2DModel(**preset, sample_size=sample_size, num_embeds_ada_norm=NUM_CLASSES)
    variants = {
        "diffusers": (theirs, lambda x, t, y: theirs(x, t, y, return_dict=False)[0]),
        "ours": (ours, lambda x, t, y: ours(x, t, y, return_dict=False)[0]),
    }
    if arguments.compile:
        compiled = torch.compile(ours, fullgraph=True)
        variants["ours_compiled"] = (ours, lambda x, t, y: compiled(x, t, y, return_dict=False)[0])
    if arguments.reference and (reference := reference_model(arguments, sample_size)):
        variants["reference"] = (reference, lambda x, t, y: reference(x, t / 1000, y))
    return {name: (module.to(arguments.device).train(), function) for name, (module, function) in variants.items()}


def our_update(module: nn.Module) -> Step:
    optimizer = build_optimizer("adamw", module, lr=LEARNING_RATE, weight_decay=0.0)
    entry = OptimizedModule(
        "transformer", module, module, optimizer, LEARNING_RATE, ExponentialAverage(module, EMA_DECAY)
    )

    def update() -> None:
        norm = entry.gradient_norm()
        nonfinite = (~torch.isfinite(norm)).float()
        entry.clip(MAX_NORM, norm)
        entry.step(LEARNING_RATE, nonfinite)
        entry.update_ema(nonfinite)

    return update


def diffusers_update(module: nn.Module) -> Step:
    parameters = list(module.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    average = EMAModel(parameters, decay=EMA_DECAY)

    def update() -> None:
        nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        average.step(parameters)

    return update


def build_steps(
    arguments: argparse.Namespace, sample_size: int, module: nn.Module, function: Callable
) -> dict[str, Step]:
    """Row -> what is timed."""
    size = (arguments.batch_size, 4, sample_size, sample_size)
    latents, target = torch.randn((2, *size), device=arguments.device)
    timestep, labels = torch.randint(0, 1000, (2, arguments.batch_size), device=arguments.device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    update = our_update(module) if isinstance(module, SiTTransformer2DModel) else diffusers_update(module)

    # Zero-initialised layers would make most of the gradients exact zeros.
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)

    def predict() -> torch.Tensor:
        with torch.autocast(arguments.device.split(":")[0], torch.bfloat16, enabled=arguments.bf16):
            return function(latents, timestep, labels)

    def forward_backward() -> None:
        optimizer.zero_grad()
        F.mse_loss(predict()[:, :4].float(), target).backward()

    def training_step() -> None:
        forward_backward()
        optimizer.step()

    def trainer_step() -> None:
        forward_backward()
        update()

    return dict(zip(ROWS, (torch.no_grad()(predict), forward_backward, training_step, trainer_step), strict=True))


def measure(arguments: argparse.Namespace, sample_size: int) -> dict[str, dict[str, float]]:
    """Row -> variant -> median seconds."""
    variants = build_variants(arguments, sample_size)
    steps = {name: build_steps(arguments, sample_size, *variant) for name, variant in variants.items()}
    return {
        row: median_seconds(
            {name: rows[row] for name, rows in steps.items()},
            device=arguments.device,
            repetitions=arguments.repetitions,
        )
        for row in ROWS
    }


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    medians = {
        f"{row}, {size}x{size} latents": values
        for size in arguments.sample_sizes
        for row, values in measure(arguments, size).items()
    }
    ratios = {row: {name: v / values["diffusers"] for name, v in values.items()} for row, values in medians.items()}
    names = list(next(iter(medians.values())))
    print(f"{'':36}" + "".join(f"{name + ' (ms, ratio)':>28}" for name in names))
    for row in medians:
        print(f"{row:36}" + "".join(f"{1000 * medians[row][n]:19.1f} {ratios[row][n]:7.3f}x" for n in names))
    save_result(
        arguments.output,
        device=arguments.device,
        arguments=vars(arguments),
        median_seconds=medians,
        ratio_to_diffusers=ratios,
    )


if __name__ == "__main__":
    main()
