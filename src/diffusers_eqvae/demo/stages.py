"""The stages of the demo: each is one command of the repository, printed before it runs, skipped when it has run.

Stages run on two CPU threads in all: one stage on both, or two lanes of stages side by side on one each. Figures
depend on the number of threads in their last digits, and training amplifies those; so more cores are left alone.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from tqdm.auto import tqdm

from ..files import write_json
from ..training_utils.command_line import parse
from .photographs import write_photographs

ROOT = Path(__file__).resolve().parents[3]
DONE = "stage.json"
THREADS = 2
DESCRIPTION = """Runs the whole line on a few images in minutes and writes report.html.

A small autoencoder from scratch, two copies of it fine-tuned without and with EQ-VAE's regularizer, their latents, a
small SiT on each, samples, and the figures that show the difference. Every stage is one command of the repository,
printed before it runs. What has run before is not run again. Needs no GPU and uses two CPU threads.
"""
# 0.9 M parameters, 8 pixels per latent cell, 4 channels.
AUTOENCODER = {
    "block_out_channels": [32, 32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
}
TRANSFORMER = {"patch_size": 1, "num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 40}


@dataclass
class DemoArguments:
    """What the demo runs on. Without data of your own it uses photographs that ship inside scikit-image."""

    output_dir: str = field(default="runs/demo", metadata={"help": "Directory of everything the demo writes."})
    train_data_dir: str | None = field(
        default=None, metadata={"help": "Your own images, in class folders, instead of the built-in photographs."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"aliases": ["--dataset"], "help": "Or a dataset on the Hub with columns image and label."},
    )
    resolution: int = field(default=64, metadata={"help": "Side of the images in pixels."})
    autoencoder_steps: int = field(default=800, metadata={"help": "Steps of the small autoencoder from scratch."})
    finetuning_steps: int = field(default=1000, metadata={"help": "Steps of each fine-tuned copy."})
    transformer_steps: int = field(default=600, metadata={"help": "Steps of each transformer."})
    num_inference_steps: int = field(default=25, metadata={"help": "Heun steps of the sampler."})
    guidance_scale: float = field(default=2.0, metadata={"help": "Classifier-free guidance."})
    guidance_interval: list[float] = field(
        default_factory=lambda: [0.0, 0.75], metadata={"help": "Noise levels LO HI in which guidance acts."}
    )
    seed: int = field(default=0, metadata={"help": "Of every stage."})


@dataclass(frozen=True)
class Stage:
    """One command, the directory that it fills, and the stage whose result it starts from."""

    name: str
    title: str
    command: list[str]
    directory: Path
    after: Stage | None = None

    @property
    def lineage(self) -> list[list[str]]:
        """The commands that lead to this stage's result, the first one first."""
        return [*(self.after.lineage if self.after else []), self.command]

    def run(self, *, threads: int = 2, lane: int = 0) -> None:
        """Runs the command unless its lineage has run before with the same words; `DONE` keeps words and seconds.

        Args:
            threads: of its process.
            lane: which of the stages running side by side this is; its progress bar goes to that line.
        """
        marker = self.directory / DONE
        if marker.is_file() and json.loads(marker.read_text()).get("lineage") == self.lineage:
            tqdm.write(f"[{self.name}] has run before")
            return
        tqdm.write(f"\n[{self.name}] {self.title}\n$ {shlex.join(self.command)}")
        shutil.rmtree(self.directory, ignore_errors=True)
        start = time.perf_counter()
        environment = _environment() | {"OMP_NUM_THREADS": str(threads), "TQDM_POSITION": str(lane + 1)}
        finished = subprocess.run([sys.executable, *self.command], env=environment)
        if finished.returncode:
            raise SystemExit(f"The stage {self.name} failed (exit status {finished.returncode}); its output is above.")
        seconds = time.perf_counter() - start
        write_json(marker, {"lineage": self.lineage, "seconds": seconds})

    @property
    def seconds(self) -> float:
        return json.loads((self.directory / DONE).read_text())["seconds"]


Lanes: TypeAlias = list[list[Stage]]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all stages, then writes metrics.json, report.png and report.html; returns the exit status."""
    arguments = read_arguments(argv)
    if not (ROOT / "training").is_dir():
        raise SystemExit("The demo runs the scripts of the repository: clone it, and call `make demo` there.")
    from .report import write_report

    output_dir = Path(arguments.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    waves = plan(arguments, output_dir)
    started = time.perf_counter()
    stages = [stage for lanes in waves for lane in lanes for stage in lane]
    with tqdm(total=len(stages), desc="demo", unit="stage") as bar:
        for lanes in waves:
            run_lanes(lanes, advance=bar.update)
    write_report(output_dir, stages, seconds=wall_seconds(waves))
    tqdm.write(
        f"\nDone in {time.perf_counter() - started:.0f} s. Open {output_dir / 'report.html'} (or report.png); figures "
        f"are in {output_dir / 'metrics.json'}, the pipeline in {output_dir / 'sit_eq'}."
    )
    return 0


def read_arguments(argv: Sequence[str] | None = None) -> DemoArguments:
    """As `parse`, under the name that the user typed."""
    program, sys.argv[0] = sys.argv[0], "eqvae demo"
    try:
        (arguments,) = parse(DemoArguments, argv=argv, description=DESCRIPTION)
    finally:
        sys.argv[0] = program
    return arguments


def run_lanes(lanes: Lanes, *, advance: Callable[[], object]) -> None:
    """Runs each lane's stages one after the other and the lanes side by side; `advance` is called after each stage.

    Raises:
        SystemExit: a stage failed; the other lane ends first, so that what it did is kept.
    """

    def run(lane: int) -> None:
        for stage in lanes[lane]:
            stage.run(threads=max(1, THREADS // len(lanes)), lane=lane)
            advance()

    with ThreadPoolExecutor(len(lanes)) as pool:
        for running in [pool.submit(run, lane) for lane in range(len(lanes))]:
            running.result()


def wall_seconds(waves: list[Lanes]) -> float:
    """What the stages took: of lanes that run side by side the longest, summed over the waves."""
    return sum(max(sum(stage.seconds for stage in lane) for lane in lanes) for lanes in waves)


def plan(arguments: DemoArguments, output_dir: Path) -> list[Lanes]:
    """Waves of lanes of stages; the two branches, with and without EQ, differ in the regularizer alone."""
    train, held_out = _images(arguments, output_dir)
    write_json(output_dir / "autoencoder.json", AUTOENCODER)
    write_json(output_dir / "transformer.json", TRANSFORMER)

    def stage(name: str, title: str, script: str, after: Stage | None = None, **flags: Any) -> Stage:
        words = [str(ROOT / script), "--output_dir", str(output_dir / name)]
        for flag, value in flags.items():
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
        return Stage(name, title, words, output_dir / name, after)

    autoencoder: dict[str, Any] = {
        **train,
        **held_out,
        "resolution": arguments.resolution,
        "perceptual_weight": 0,
        "disc_weight": 0,
        "train_batch_size": 4,
        "ema_decay": 0.99,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 20,
        "checkpointing_steps": 0,
        "validation_steps": 0,
        "num_normalization_images": 64,
        "report_to": "none",
        "seed": arguments.seed,
    }
    from_scratch = stage(
        "autoencoder",
        "A small autoencoder from scratch.",
        "training/train_autoencoder.py",
        model_config=output_dir / "autoencoder.json",
        regularizers="none",
        max_train_steps=arguments.autoencoder_steps,
        learning_rate=2e-3,
        **autoencoder,
    )
    # A short run of a young autoencoder: more plain steps than the paper's, so that reconstruction keeps up.
    equivariance = {"regularizers": "equivariance", "p_equivariance": 0.4, "p_low_resolution": 0.1}
    lanes = {}
    for branch, regularizer in (("plain", {"regularizers": "none"}), ("eq", equivariance)):
        fine_tuned = stage(
            f"autoencoder_{branch}",
            f"A copy fine-tuned with the regularizer {regularizer['regularizers']}.",
            "training/train_autoencoder.py",
            from_scratch,
            pretrained_model_name_or_path=from_scratch.directory,
            **regularizer,
            max_train_steps=arguments.finetuning_steps,
            learning_rate=1e-3,
            **autoencoder,
        )
        encoded = stage(
            f"latents_{branch}",
            "Its latents, with mean and standard deviation.",
            "training/encode_latents.py",
            fine_tuned,
            vae=fine_tuned.directory,
            resolution=arguments.resolution,
            dtype="fp32",
            **train,
        )
        generator = stage(
            f"sit_{branch}",
            "A small SiT on these latents.",
            "training/train_transformer.py",
            encoded,
            model=output_dir / "transformer.json",
            latents_dir=encoded.directory,
            train_batch_size=16,
            max_train_steps=arguments.transformer_steps,
            learning_rate=1.5e-3,
            lr_scheduler="cosine",
            lr_warmup_steps=50,
            sigma_distribution="logit_normal",
            ema_decay=0.99,
            checkpointing_steps=0,
            validation_steps=0,
            report_to="none",
            seed=arguments.seed,
        )
        lanes[branch] = [fine_tuned, encoded, generator]
    sampling: dict[str, Any] = {
        "num_samples": 30,
        "batch_size": 30,
        "label_policy": "balanced",
        "scheduler": "ode-heun",
        "num_inference_steps": arguments.num_inference_steps,
        "guidance_scale": arguments.guidance_scale,
        "seed": arguments.seed,
    }
    samples = []
    for name, branch, interval in (
        ("samples_plain_interval", "plain", arguments.guidance_interval),
        ("samples_eq_interval", "eq", arguments.guidance_interval),
        ("samples_eq_full", "eq", [0.0, 1.0]),
    ):
        title = f"Samples of the saved pipeline, loaded in a fresh process, guided in {interval}."
        samples.append(
            stage(
                name,
                title,
                "pipelines/sample.py",
                lanes[branch][-1],
                model=lanes[branch][-1].directory,
                guidance_interval=interval,
                **sampling,
            )
        )
    return [[[from_scratch]], list(lanes.values()), [samples[:1], samples[1:]]]


def _images(arguments: DemoArguments, output_dir: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The flags that name training images and, for the built-in photographs, other crops of them to measure on."""
    if arguments.train_data_dir and arguments.dataset_name:
        raise SystemExit("Give either --train_data_dir or --dataset_name, not both.")
    if arguments.train_data_dir:
        return {"train_data_dir": arguments.train_data_dir}, {}
    if arguments.dataset_name:
        return {"dataset_name": arguments.dataset_name}, {}
    side_px = arguments.resolution * 3 // 2
    images = output_dir / f"images_{side_px}px"
    for name, per_class, seed in (("train", 40, 0), ("held_out", 4, 1)):
        if not (images / name).is_dir():
            write_photographs(images / name, per_class=per_class, side_px=side_px, seed=seed)
    return {"train_data_dir": str(images / "train")}, {"validation_data_dir": str(images / "held_out")}


def _environment() -> dict[str, str]:
    """The stages see the package that runs the demo, also when it is not installed."""
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}
