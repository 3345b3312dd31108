"""The stages of the demo: each is one command of the repository, printed before it runs, skipped when it has run.

Stages run on two CPU threads in all: one stage on both, or the two branches side by side on one each. Numbers depend
on the number of threads in their last digits, and training amplifies those; so more cores are left alone.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from tqdm.auto import tqdm

from ..directories import OutputDirectory
from ..files import write_json
from ..options import Checked, inputs_of
from ..training_utils.command_line import parse
from ..training_utils.launch import claim
from .photographs import write_photographs
from .report import write_report
from .stage import ROOT, Stage, end_with_stages

DESCRIPTION = """Runs the whole line on a few images in minutes and writes report.html.

A small autoencoder from scratch, two copies of it fine-tuned without and with EQ-VAE's regularizer, their latents, a
small SiT on each, samples, and the metrics that show the difference. Every stage is one command of the repository,
printed before it runs. What has run before is not run again. Needs no GPU and uses two CPU threads.
"""
# 0.9 M parameters, 8 pixels per latent position, 4 channels.
AUTOENCODER = {
    "block_out_channels": [32, 32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
}
TRANSFORMER = {
    "_class_name": "SiTTransformer2DModel",
    "patch_size": 1,
    "num_layers": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 40,
}
Flags: TypeAlias = dict[str, Any]
BRANCHES: dict[str, Flags] = {
    "plain": {"regularizers": "none"},
    # A short run of a young autoencoder: more plain steps than the paper's, so that reconstruction keeps up.
    "eq": {"regularizers": "equivariance", "p_equivariance": 0.4, "p_low_resolution": 0.1},
}
TRAINING: Flags = {
    "lr_scheduler": "cosine",
    "ema_decay": 0.99,
    "checkpointing_steps": 0,
    "validation_steps": 0,
    "report_to": "none",
}
AUTOENCODER_TRAINING: Flags = TRAINING | {
    "perceptual_weight": 0,
    "disc_weight": 0,
    "train_batch_size": 4,
    "lr_warmup_steps": 20,
    "num_normalization_images": 64,
}
TRANSFORMER_TRAINING: Flags = TRAINING | {
    "train_batch_size": 16,
    "learning_rate": 1.5e-3,
    "lr_warmup_steps": 50,
    "sigma_distribution": "logit_normal",
}
SAMPLING: Flags = {"num_samples": 30, "batch_size": 30, "label_policy": "balanced", "scheduler": "heun"}


# What the demo writes beside the directories of its stages.
FILES = ["autoencoder.json", "transformer.json", "metrics.json", "report.png", "report.html"]
FILES += [f"latents_{branch}.png" for branch in BRANCHES]


@dataclass
class DemoArguments(Checked):
    """What the demo runs on. Without data of your own it uses photographs that ship inside scikit-image."""

    output_dir: str = field(default="runs/demo", metadata={"help": "Directory of everything the demo writes."})
    train_data_dir: str | None = field(
        default=None,
        metadata={"reads": True, "help": "Your own images, in class folders, instead of the built-in photographs."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "reads": True,
            "aliases": ["--dataset"],
            "help": "Or a dataset on the Hub with columns image and label.",
        },
    )
    resolution: int = field(default=64, metadata={"help": "Side of the images in pixels.", "range": "(0, inf)"})
    autoencoder_steps: int = field(
        default=800, metadata={"help": "Steps of the small autoencoder from scratch.", "range": "(0, inf)"}
    )
    finetuning_steps: int = field(
        default=1000, metadata={"help": "Steps of each fine-tuned copy.", "range": "(0, inf)"}
    )
    transformer_steps: int = field(default=600, metadata={"help": "Steps of each transformer.", "range": "(0, inf)"})
    num_inference_steps: int = field(default=25, metadata={"help": "Heun steps of the sampler.", "range": "(0, inf)"})
    guidance_scale: float = field(default=2.0, metadata={"help": "Classifier-free guidance.", "range": "[0, inf)"})
    guidance_interval: list[float] = field(
        default_factory=lambda: [0.0, 0.75],
        metadata={"help": "Noise levels LO HI in which guidance acts.", "range": "[0, 1]"},
    )
    seed: int = field(default=0, metadata={"help": "Of every stage.", "range": "[0, 2**64)"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_data_dir and self.dataset_name:
            raise ValueError("Give either train_data_dir or dataset_name, not both.")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all stages, then writes metrics.json, report.png and report.html; returns the exit status."""
    (arguments,) = parse(DemoArguments, argv=argv, description=DESCRIPTION)
    if not (ROOT / "training").is_dir():
        raise SystemExit("The demo runs the scripts of the repository: clone it, and call `make demo` there.")
    signal.signal(signal.SIGTERM, end_with_stages)
    output_dir = Path(arguments.output_dir)
    output = OutputDirectory(output_dir, kind="demo", inputs=inputs_of(arguments))
    first, branches = plan(arguments, *image_flags(arguments))
    stages = [first, *(stage for branch in branches for stage in branch)]
    claim(output, *FILES, images_folder(arguments).name, *(stage.name for stage in stages))
    write_images(arguments)
    write_json(output_dir / "autoencoder.json", AUTOENCODER)
    write_json(output_dir / "transformer.json", TRANSFORMER)
    started = time.perf_counter()
    with tqdm(total=len(stages), desc="demo", unit="stage") as bar:
        first.run()
        bar.update()
        run_branches(first, branches, advance=bar.update)
    write_report(output_dir, stages, seconds=wall_seconds(first, branches))
    tqdm.write(
        f"\nDone in {time.perf_counter() - started:.0f} s. Open {output_dir / 'report.html'} (or report.png); the "
        f"numbers are in {output_dir / 'metrics.json'}, the pipeline in {output_dir / 'sit_eq'}."
    )
    return 0


def run_branches(first: Stage, branches: list[list[Stage]], *, advance: Callable[[], object]) -> None:
    """Runs each branch's stages in order and the branches side by side; where one fails, the others end first."""

    def run(number: int) -> None:
        for index, stage in enumerate(branches[number]):
            stage.run([first, *branches[number][:index]], threads=1, bar=number + 1)
            advance()

    with ThreadPoolExecutor(len(branches)) as pool:
        for running in [pool.submit(run, number) for number in range(len(branches))]:
            running.result()


def wall_seconds(first: Stage, branches: list[list[Stage]]) -> float:
    """What the stages took: the first one, then the longest branch."""
    return first.record["seconds"] + max(sum(stage.record["seconds"] for stage in branch) for branch in branches)


def plan(arguments: DemoArguments, train: dict[str, str], held_out: dict[str, str]) -> tuple[Stage, list[list[Stage]]]:
    """The autoencoder from scratch, and two branches from it that differ in the regularizer alone."""
    root = Path(arguments.output_dir)

    def stage(name: str, script: str, **flags: Any) -> Stage:
        words = [str(ROOT / script), "--output_dir", str(root / name)]
        for flag, value in flags.items():
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
        return Stage(name, words, root / name)

    def autoencoder(name: str, **flags: Any) -> Stage:
        shared = {**train, **held_out, "resolution": arguments.resolution, "seed": arguments.seed}
        return stage(name, "training/train_autoencoder.py", **flags, **shared, **AUTOENCODER_TRAINING)

    def branch(name: str, regularizer: Flags, intervals: dict[str, list[float]]) -> list[Stage]:
        seed: Flags = {"seed": arguments.seed}
        fine_tuning: Flags = {"pretrained_model_name_or_path": root / "autoencoder", "learning_rate": 1e-3}
        fine_tuning |= {"max_train_steps": arguments.finetuning_steps, **regularizer}
        encoding: Flags = {"vae": root / f"autoencoder_{name}", "dtype": "fp32", **train}
        encoding["resolution"] = arguments.resolution
        training: Flags = {"model": root / "transformer.json", "latents_dir": root / f"latents_{name}", **seed}
        training |= {"max_train_steps": arguments.transformer_steps, **TRANSFORMER_TRAINING}
        sampling: Flags = {"model": root / f"sit_{name}", **seed, **SAMPLING}
        sampling |= {key: getattr(arguments, key) for key in ("num_inference_steps", "guidance_scale")}
        return [
            autoencoder(f"autoencoder_{name}", **fine_tuning),
            stage(f"latents_{name}", "training/encode_latents.py", **encoding),
            stage(f"sit_{name}", "training/train_transformer.py", **training),
            *(
                stage(f"samples_{name}_{label}", "pipelines/sample.py", guidance_interval=interval, **sampling)
                for label, interval in intervals.items()
            ),
        ]

    scratch = {"model_config": root / "autoencoder.json", "max_train_steps": arguments.autoencoder_steps}
    first = autoencoder("autoencoder", regularizers="none", learning_rate=2e-3, **scratch)
    interval = {"interval": arguments.guidance_interval}
    plain = branch("plain", BRANCHES["plain"], interval)
    return first, [plain, branch("eq", BRANCHES["eq"], {**interval, "full": [0.0, 1.0]})]


def image_flags(arguments: DemoArguments) -> tuple[dict[str, str], dict[str, str]]:
    """The flags that name training images and, for the built-in photographs, other crops of them to measure on."""
    if arguments.train_data_dir:
        return {"train_data_dir": arguments.train_data_dir}, {}
    if arguments.dataset_name:
        return {"dataset_name": arguments.dataset_name}, {}
    images = images_folder(arguments)
    return {"train_data_dir": str(images / "train")}, {"validation_data_dir": str(images / "held_out")}


def images_folder(arguments: DemoArguments) -> Path:
    return Path(arguments.output_dir) / f"images_{arguments.resolution * 3 // 2}px"


def write_images(arguments: DemoArguments) -> None:
    """The built-in photographs, unless they are there or other images are given."""
    images = images_folder(arguments)
    for name, per_class, seed in (("train", 40, 0), ("held_out", 4, 1)):
        if not (arguments.train_data_dir or arguments.dataset_name or (images / name).is_dir()):
            write_photographs(images / name, per_class=per_class, side_px=arguments.resolution * 3 // 2, seed=seed)
