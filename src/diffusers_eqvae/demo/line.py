"""The stages of the demo: each is one command of the repository, printed before it runs, skipped when it has run."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..training_utils.arguments import parse
from .photographs import write_photographs

ROOT = Path(__file__).resolve().parents[3]
DONE = "stage.json"
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
        default=None, metadata={"help": "Your own pictures, in class folders, instead of the built-in photographs."}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Or a dataset on the Hub with columns image and label."}
    )
    resolution: int = field(default=64, metadata={"help": "Side of the pictures in pixels."})
    autoencoder_steps: int = field(default=450, metadata={"help": "Steps of the small autoencoder from scratch."})
    finetuning_steps: int = field(default=500, metadata={"help": "Steps of each fine-tuned copy."})
    transformer_steps: int = field(default=600, metadata={"help": "Steps of each transformer."})
    num_inference_steps: int = field(default=25, metadata={"help": "Heun steps of the sampler."})
    guidance_scale: float = field(default=2.0, metadata={"help": "Classifier-free guidance."})
    guidance_interval: list[float] = field(
        default_factory=lambda: [0.0, 0.75], metadata={"help": "Noise levels LO HI in which guidance acts."}
    )
    seed: int = field(default=0, metadata={"help": "Of every stage."})


@dataclass(frozen=True)
class Stage:
    """One command, and the directory whose presence says that it has run."""

    name: str
    title: str
    command: list[str]
    directory: Path

    def run(self) -> None:
        """Runs the command unless it has run before with the same words; its seconds are kept in `DONE`."""
        marker = self.directory / DONE
        if marker.is_file() and json.loads(marker.read_text())["command"] == self.command:
            tqdm.write(f"[{self.name}] has run before")
            return
        tqdm.write(f"\n[{self.name}] {self.title}\n$ {shlex.join(self.command)}")
        shutil.rmtree(self.directory, ignore_errors=True)
        start = time.perf_counter()
        finished = subprocess.run([sys.executable, *self.command], env=_environment())
        if finished.returncode:
            raise SystemExit(f"The stage {self.name} failed (exit status {finished.returncode}); its output is above.")
        seconds = time.perf_counter() - start
        marker.write_text(json.dumps({"command": self.command, "seconds": seconds}, indent=2) + "\n")

    @property
    def seconds(self) -> float:
        return json.loads((self.directory / DONE).read_text())["seconds"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all stages, then writes metrics.json, report.png and report.html; returns the exit status."""
    (arguments,) = parse(DemoArguments, argv=argv, description=__doc__)
    if not (ROOT / "training").is_dir():
        raise SystemExit("The demo runs the scripts of the repository: clone it, and call `make demo` there.")
    from .report import write_report

    output_dir = Path(arguments.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    stages = plan(arguments, output_dir)
    started = time.perf_counter()
    with tqdm(stages, desc="demo", unit="stage") as bar:
        for stage in bar:
            bar.set_postfix_str(stage.name)
            stage.run()
    write_report(output_dir, stages)
    tqdm.write(
        f"\nDone in {time.perf_counter() - started:.0f} s. Open {output_dir / 'report.html'} (or report.png); figures "
        f"are in {output_dir / 'metrics.json'}, the pipeline in {output_dir / 'sit_eq'}."
    )
    return 0


def plan(arguments: DemoArguments, output_dir: Path) -> list[Stage]:
    """Every stage in order; the two branches, with and without EQ, differ in `--regularizers` alone."""
    train, held_out = _pictures(arguments, output_dir)
    (output_dir / "autoencoder.json").write_text(json.dumps(AUTOENCODER, indent=2) + "\n")
    (output_dir / "transformer.json").write_text(json.dumps(TRANSFORMER, indent=2) + "\n")

    def stage(name: str, title: str, script: str, **flags: Any) -> Stage:
        words = [str(ROOT / script), "--output_dir", str(output_dir / name)]
        for flag, value in flags.items():
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
        return Stage(name, title, words, output_dir / name)

    autoencoder: dict[str, Any] = {
        **train,
        **held_out,
        "resolution": arguments.resolution,
        "perceptual_weight": 0,
        "disc_weight": 0,
        # A short run of a young autoencoder: more plain steps than the paper's, so that reconstruction keeps up.
        "p_equivariance": 0.35,
        "p_low_resolution": 0.1,
        "train_batch_size": 8,
        "ema_decay": 0.99,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 20,
        "checkpointing_steps": 0,
        "validation_steps": 0,
        "num_normalization_images": 64,
        "report_to": "none",
        "seed": arguments.seed,
    }
    stages = [
        stage(
            "autoencoder",
            "A small autoencoder from scratch.",
            "training/train_autoencoder.py",
            model_config=output_dir / "autoencoder.json",
            regularizers="none",
            max_train_steps=arguments.autoencoder_steps,
            learning_rate=2e-3,
            **autoencoder,
        )
    ]
    for branch, regularizer in (("plain", "none"), ("eq", "equivariance")):
        stages += [
            stage(
                f"autoencoder_{branch}",
                f"A copy fine-tuned with the regulariser {regularizer}.",
                "training/train_autoencoder.py",
                pretrained_model_name_or_path=output_dir / "autoencoder",
                regularizers=regularizer,
                max_train_steps=arguments.finetuning_steps,
                learning_rate=1e-3,
                **autoencoder,
            ),
            stage(
                f"latents_{branch}",
                "Its latents, with mean and standard deviation.",
                "training/encode_latents.py",
                vae=output_dir / f"autoencoder_{branch}",
                resolution=arguments.resolution,
                dtype="fp32",
                **train,
            ),
            stage(
                f"sit_{branch}",
                "A small SiT on these latents.",
                "training/train_transformer.py",
                model=output_dir / "transformer.json",
                latents_dir=output_dir / f"latents_{branch}",
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
            ),
        ]
    sampling: dict[str, Any] = {
        "num_samples": 30,
        "batch_size": 30,
        "label_policy": "balanced",
        "scheduler": "ode-heun",
        "num_inference_steps": arguments.num_inference_steps,
        "guidance_scale": arguments.guidance_scale,
        "seed": arguments.seed,
    }
    for name, branch, interval in (
        ("samples_plain_interval", "plain", arguments.guidance_interval),
        ("samples_eq_interval", "eq", arguments.guidance_interval),
        ("samples_eq_full", "eq", [0.0, 1.0]),
    ):
        title = f"Samples of the saved pipeline, loaded in a fresh process, guided in {interval}."
        stages.append(
            stage(
                name,
                title,
                "pipelines/sample.py",
                model=output_dir / f"sit_{branch}",
                guidance_interval=interval,
                **sampling,
            )
        )
    return stages


def _pictures(arguments: DemoArguments, output_dir: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The flags that name training pictures and, for the built-in photographs, other crops of them to measure on."""
    if arguments.train_data_dir and arguments.dataset:
        raise SystemExit("Give either --train_data_dir or --dataset, not both.")
    if arguments.train_data_dir:
        return {"train_data_dir": arguments.train_data_dir}, {}
    if arguments.dataset:
        return {"dataset_name": arguments.dataset}, {}
    pictures = output_dir / "pictures"
    side_px = arguments.resolution * 3 // 2
    for name, per_class, seed in (("train", 40, 0), ("held_out", 4, 1)):
        if not (pictures / name).is_dir():
            write_photographs(pictures / name, per_class=per_class, side_px=side_px, seed=seed)
    return {"train_data_dir": str(pictures / "train")}, {"validation_data_dir": str(pictures / "held_out")}


def _environment() -> dict[str, str]:
    """The stages see the package that runs the demo, also when it is not installed."""
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}
