"""The stages of the demo: each is one `eqvae` command, printed before it runs, skipped when it has run.

The two branches run side by side, each on one CPU thread. Numbers depend on the number of threads in their last
digits, and training amplifies those; so more cores are left alone.
"""

from __future__ import annotations

import shlex
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from tqdm.auto import tqdm

from ..autoencoders import downsampling_factor, load_autoencoder, require_fitting
from ..directories import OutputDirectory
from ..files import write_json
from ..images import require_channels
from ..options import Checked, inputs_of
from ..training_utils.command_line import parse
from ..training_utils.launch import claim
from .emoji import write_emoji
from .report import BRANCHES, FILES, write_comparison, write_report
from .stage import Stage, end_with_stages

DESCRIPTION = """Shows on a CPU, in minutes, what EQ-VAE does, and writes report.html.

Two copies of a small autoencoder that comes with the package are fine-tuned for the same steps, without and with
EQ-VAE's regularizer. A small SiT learns to generate the latents of each. Every stage is one `eqvae` command, printed
before it runs; what has run before is not run again. Needs no GPU and uses two CPU threads.
"""
# What the app shows of a demo: pipeline, first and second autoencoder.
SHOWN_IN_APP = ("sit_eq", "autoencoder_plain", "autoencoder_eq")
AUTOENCODER = Path(__file__).parent / "autoencoder"
TRANSFORMER = {
    "_class_name": "SiTTransformer2DModel",
    "num_layers": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 40,
}
# The transformer's patch is the largest that leaves so many tokens a side, or the latent's own where it has fewer.
TOKENS_A_SIDE = 8
Flags: TypeAlias = dict[str, Any]
REGULARIZERS: dict[str, Flags] = {
    "plain": {"regularizers": "none"},
    "eq": {"regularizers": "equivariance", "p_equivariance": 0.2, "p_low_resolution": 0.0},
}
TRAINING: Flags = {
    "lr_scheduler": "cosine",
    "checkpointing_steps": 0,
    "validation_steps": 0,
    "report_to": "none",
}
AUTOENCODER_TRAINING: Flags = TRAINING | {
    "reduction": "mean",
    "perceptual_weight": 0,
    "disc_weight": 0,
    "train_batch_size": 8,
    "learning_rate": 1e-3,
    "lr_warmup_steps": 20,
    "ema_decay": 0.98,
    "num_validation_images": 96,
    "num_normalization_images": 256,
}
TRANSFORMER_TRAINING: Flags = TRAINING | {
    "train_batch_size": 16,
    "learning_rate": 1.5e-3,
    "lr_warmup_steps": 50,
    "ema_decay": 0.99,
    "sigma_distribution": "logit_normal",
}
SAMPLING: Flags = {"batch_size": 30, "label_policy": "balanced", "scheduler": "euler"}


@dataclass
class DemoArguments(Checked):
    """What the demo runs on. Without images of your own it uses emoji that ship inside a Python package."""

    output_dir: str = field(default="runs/demo", metadata={"help": "Directory of everything the demo writes."})
    pretrained_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "reads": True,
            "help": "The autoencoder to fine-tune; unset, the small one that comes with the package.",
        },
    )
    train_data_dir: str | None = field(
        default=None,
        metadata={"reads": True, "help": "Your own images, in class folders, instead of the emoji."},
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
    finetuning_steps: int = field(
        default=1000, metadata={"help": "Steps of each fine-tuned copy.", "range": "(0, inf)"}
    )
    transformer_steps: int = field(default=800, metadata={"help": "Steps of each transformer.", "range": "(0, inf)"})
    num_samples: int = field(
        default=120, metadata={"help": "Images drawn from each transformer.", "range": "[20, inf)"}
    )
    num_inference_steps: int = field(default=25, metadata={"help": "Steps of the sampler.", "range": "(0, inf)"})
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

    @property
    def autoencoder(self) -> str:
        """Of both branches."""
        return self.pretrained_model_name_or_path or str(AUTOENCODER)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all stages, then writes metrics.json, report.png and report.html; returns the exit status."""
    (arguments,) = parse(DemoArguments, argv=argv, description=DESCRIPTION)
    signal.signal(signal.SIGTERM, end_with_stages)
    output_dir = Path(arguments.output_dir)
    output = OutputDirectory(output_dir, kind="demo", inputs=inputs_of(arguments))
    branches = plan(arguments)
    transformer = transformer_config(arguments)
    claim(output, *FILES, "transformer.json", "images", *(stage.name for branch in branches for stage in branch))
    write_images(arguments)
    write_json(output_dir / "transformer.json", transformer)
    run_branches(branches, after=lambda stage: show(stage, arguments))
    write_report(output_dir, arguments.autoencoder, branches, app=app_command(output_dir))
    tqdm.write(
        f"\nOpen {output_dir / 'report.html'} (or report.png); the numbers are in {output_dir / 'metrics.json'}, the "
        f"pipeline in {output_dir / 'sit_eq'}. To play with them: {app_command(output_dir)}"
    )
    return 0


def app_command(output_dir: Path) -> str:
    """What opens both branches in the browser.

    Example:
        >>> app_command(Path("runs/demo"))
        'eqvae app --demo runs/demo'
    """
    return shlex.join(["eqvae", "app", "--demo", str(output_dir)])


def run_branches(branches: list[list[Stage]], *, after: Callable[[Stage], object]) -> None:
    """Runs each branch's stages in order and the branches side by side; where one fails, the others end first.

    A bar foretells the end from what the stages are expected to take. `after` is called after each stage.
    """
    stages = [stage for branch in branches for stage in branch]
    form = "demo: {percentage:.0f} % done after {elapsed}, about {remaining} left"
    with tqdm(total=sum(stage.expected_seconds for stage in stages), bar_format=form) as progress:

        def run(number: int) -> None:
            for index, stage in enumerate(branches[number]):
                stage.run(branches[number][:index], bar=number + 1)
                after(stage)
                progress.update(stage.expected_seconds)

        with ThreadPoolExecutor(len(branches)) as pool:
            for running in [pool.submit(run, number) for number in range(len(branches))]:
                running.result()


def show(stage: Stage, arguments: DemoArguments) -> None:
    """After a fine-tuning, what its autoencoder makes of transformed latents: an image to look at meanwhile."""
    if stage.name.startswith("autoencoder"):
        path = write_comparison(Path(arguments.output_dir), stage.directory)
        tqdm.write(f"What became of the autoencoder: {path}")


def plan(arguments: DemoArguments) -> list[list[Stage]]:
    """Two branches that differ in the regularizer alone, by the names of `REGULARIZERS`."""
    root = Path(arguments.output_dir)
    train, held_out = image_flags(arguments)
    seed: Flags = {"seed": arguments.seed}

    def stage(name: str, command: str, seconds: float, **flags: Any) -> Stage:
        words = [command, "--output_dir", str(root / name)]
        for flag, value in flags.items():
            values = [] if value is True else value if isinstance(value, list) else [value]
            words += [f"--{flag}", *map(str, values)]
        return Stage(name, words, root / name, seconds)

    def branch(name: str) -> list[Stage]:
        tuning: Flags = {"pretrained_model_name_or_path": arguments.autoencoder, **train, **held_out, **seed}
        tuning |= {"resolution": arguments.resolution, "center_crop": True, **REGULARIZERS[name]}
        tuning |= {"max_train_steps": arguments.finetuning_steps, **AUTOENCODER_TRAINING}
        encoding: Flags = {"vae": root / f"autoencoder_{name}", "dtype": "fp32", **train}
        encoding["resolution"] = arguments.resolution
        training: Flags = {"model": root / "transformer.json", "latents_dir": root / f"latents_{name}", **seed}
        training |= {"max_train_steps": arguments.transformer_steps, **TRANSFORMER_TRAINING}
        sampling: Flags = {"model": root / f"sit_{name}", **seed, **SAMPLING}
        drawn = ("num_samples", "num_inference_steps", "guidance_scale", "guidance_interval")
        sampling |= {key: getattr(arguments, key) for key in drawn}
        return [
            stage(f"autoencoder_{name}", "train-autoencoder", 0.4 * arguments.finetuning_steps, **tuning),
            stage(f"latents_{name}", "encode-latents", 20, **encoding),
            stage(f"sit_{name}", "train-transformer", 0.15 * arguments.transformer_steps, **training),
            stage(f"samples_{name}", "sample", 0.3 * arguments.num_samples, **sampling),
        ]

    return [branch(name) for name in BRANCHES]


def transformer_config(arguments: DemoArguments) -> dict[str, Any]:
    """The small SiT for the autoencoder's latents; refuses a resolution that the autoencoder cannot take."""
    vae = load_autoencoder(arguments.autoencoder)
    require_channels(vae, 3)
    require_fitting(arguments.resolution, vae)
    side = arguments.resolution // downsampling_factor(vae)
    patch = next(size for size in range(max(1, side // TOKENS_A_SIDE), 0, -1) if side % size == 0)
    return TRANSFORMER | {"patch_size": patch}


def image_flags(arguments: DemoArguments) -> tuple[dict[str, str], dict[str, str]]:
    """The flags that name training images and, for the emoji, those that nothing was trained on."""
    if arguments.train_data_dir:
        return {"train_data_dir": arguments.train_data_dir}, {}
    if arguments.dataset_name:
        return {"dataset_name": arguments.dataset_name}, {}
    images = Path(arguments.output_dir) / "images"
    return {"train_data_dir": str(images / "train")}, {"validation_data_dir": str(images / "held_out")}


def write_images(arguments: DemoArguments) -> None:
    """The emoji, unless they are there or other images are given."""
    for folder, held_out in (("train", False), ("held_out", True)):
        directory = Path(arguments.output_dir) / "images" / folder
        if not (arguments.train_data_dir or arguments.dataset_name or directory.is_dir()):
            write_emoji(directory, held_out=held_out)
