"""Options that both training scripts share: the run and its data."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.utils import validate_repo_id

from ..data.image_datasets import ImageSource, load_image_dataset
from ..options import Checked
from .optimizers import OPTIMIZERS, OptimizerName

logger = logging.getLogger(__name__)

# What --dtype says, and how torch calls it.
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass
class RunArguments(Checked):
    """How a training run is run: length, optimisation, checkpoints, tracking. Checked on construction."""

    output_dir: str = field(
        metadata={"help": "Directory of the run: finished weights at its root, checkpoints/, metrics.jsonl, logs/."}
    )
    seed: int = field(
        default=0,
        metadata={
            "help": "Everything random is a function of (seed, rank, step), so equal seeds give equal runs.",
            "range": "[0, 2**64)",
        },
    )
    train_batch_size: int = field(
        default=16, metadata={"help": "Examples per device and micro-batch.", "range": "(0, inf)"}
    )
    gradient_accumulation_steps: int = field(
        default=1,
        metadata={
            "help": "Micro-batches whose gradients are averaged before one optimizer step.",
            "range": "(0, inf)",
        },
    )
    learning_rate: float = field(
        default=1e-4,
        metadata={
            "help": "Peak learning rate, taken literally: never scaled by batch or devices.",
            "range": "[0, inf)",
        },
    )
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = field(
        default="constant", metadata={"help": "Shape of the learning rate after the warm-up; the others end at 0."}
    )
    lr_warmup_steps: int = field(
        default=0, metadata={"help": "Optimizer steps of linear warm-up from 0.", "range": "[0, inf)"}
    )
    max_train_steps: int | None = field(
        default=None,
        metadata={"help": "Optimizer steps of the whole run; unset, num_train_epochs decides.", "range": "(0, inf)"},
    )
    num_train_epochs: int = field(
        default=1,
        metadata={
            "help": "Passes over the data when max_train_steps is unset (rounded up to whole steps).",
            "range": "(0, inf)",
        },
    )
    mixed_precision: Literal["no", "bf16", "fp16"] | None = field(
        default=None,
        metadata={
            "help": "bf16 computes the forward in bfloat16 while weights, optimizer and EMA stay float32; no is "
            "float32 throughout (for cards older than Ampere: V100, T4, RTX 20); fp16 is refused (its range ends at "
            "65504). Unset: what `accelerate config` says."
        },
    )
    allow_tf32: bool = field(
        default=False, metadata={"help": "Let float32 matrix products use TensorFloat-32 (Ampere and newer; faster)."}
    )
    max_grad_norm: float | None = field(
        default=None,
        metadata={
            "help": "Clip the gradient norm of each optimized module to this; unset, no clipping.",
            "range": "(0, inf)",
        },
    )
    max_nonfinite_steps: int = field(
        default=20,
        metadata={
            "help": "Steps with a NaN or infinite gradient change nothing and are counted; after this many in a row "
            "the run writes a checkpoint and stops.",
            "range": "(0, inf)",
        },
    )
    use_ema: bool = field(default=True, metadata={"help": "Keep a float32 moving average of the weights."})
    ema_decay: float = field(
        default=0.9999,
        metadata={
            "help": "ema = decay * ema + (1 - decay) * weights after every step; no warm-up.",
            "range": "[0, 1)",
        },
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in the backward: less memory, about 30 % slower."}
    )
    compile: bool = field(default=False, metadata={"help": "Run the trained modules through torch.compile."})
    dataloader_num_workers: int = field(
        default=0,
        metadata={
            "help": "Processes that load data; 0 loads in the main process. Changes no result.",
            "range": "[0, inf)",
        },
    )
    checkpointing_steps: int = field(
        default=500,
        metadata={
            "help": "A checkpoint every so many optimizer steps, and at the end; 0 for none.",
            "range": "[0, inf)",
        },
    )
    checkpoints_total_limit: int | None = field(
        default=2, metadata={"help": "Keep only this many newest checkpoints.", "range": "(0, inf)"}
    )
    keep_best: str | None = field(
        default=None,
        metadata={
            "help": "A measured figure, e.g. psnr or fid: the checkpoint that is best by it stays besides those of "
            "checkpoints_total_limit."
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "A checkpoint directory, or latest: the newest complete one of output_dir (a fresh start if there "
            "is none and no finished run). The resumed run equals an uninterrupted one."
        },
    )
    allow_changes: list[str] = field(
        default_factory=list,
        metadata={
            "help": "NAME ... of what may differ from the checkpoint that is resumed although it changes what is "
            "trained: options, or autoencoders and other networks by class."
        },
    )
    break_lock: bool = field(
        default=False, metadata={"help": "Take output_dir from another program, which must not run any more."}
    )
    max_hours: float | None = field(
        default=None,
        metadata={
            "help": "Stop after so many hours as by SIGTERM or SIGUSR1: with a checkpoint and status 75, on which a "
            "job script starts the same command again. Leave time for a step, a validation and the checkpoint.",
            "range": "(0, inf)",
        },
    )
    report_to: Literal["tensorboard", "wandb", "trackio", "all", "none"] = field(
        default="tensorboard",
        metadata={
            "help": "Where curves and images go besides metrics.jsonl and validation/; all: those that are installed."
        },
    )
    tracker_project_name: str | None = field(
        default=None, metadata={"help": "Project in the tracker; unset, autoencoder or transformer."}
    )
    logging_steps: int = field(
        default=10,
        metadata={
            "help": "Read losses back from the device every so many steps; logs hold their mean.",
            "range": "(0, inf)",
        },
    )
    validation_steps: int = field(
        default=500, metadata={"help": "Validation images every so many steps; 0: none.", "range": "[0, inf)"}
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Measure a few small steps, print what the run needs in memory and on disk, and exit."},
    )
    push_to_hub: bool = field(
        default=False, metadata={"help": "Upload the finished run; the token comes from the environment or `hf auth`."}
    )
    push_every: int = field(
        default=0,
        metadata={
            "help": "With push_to_hub: upload what there is every so many steps too, while training goes on; 0 never.",
            "range": "[0, inf)",
        },
    )
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Repository to push to (user/name); unset, the name of output_dir."}
    )
    hub_private: bool = field(default=False, metadata={"help": "Make a new repository private."})
    hub_revision: str | None = field(
        default=None, metadata={"help": "Branch to push to, created if missing; unset, main."}
    )
    hub_images: Literal["none", "validation"] | None = field(
        default=None,
        metadata={
            "help": "Images on the pushed card: none, or those of the validation; unset, the latter where they show "
            "nothing of a local folder. `eqvae push --dry_run` lists what a push uploads."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr_scheduler == "constant_with_warmup" and not self.lr_warmup_steps:
            raise ValueError("--lr_scheduler constant_with_warmup needs --lr_warmup_steps; use constant for none.")
        if not self.push_to_hub:
            own = [name for name in vars(self) if name.startswith("hub_") or name == "push_every"]
            warn_without_effect(self, own, "nothing is pushed without --push_to_hub")
        if self.push_to_hub or self.hub_model_id is not None:
            try:  # now, not after the training
                validate_repo_id(self.hub_model_id or Path(self.output_dir).name)
            except ValueError as error:
                raise ValueError(f"--hub_model_id must be a repository's name, owner/name. {error}") from error


@dataclass
class OptimizerArguments(Checked):
    """How weights are optimized."""

    optimizer: OptimizerName = field(
        default="adamw",
        metadata={
            "help": "adamw, adam; adamw_8bit: bitsandbytes', moments in 8 bits; adafactor: factored second moments "
            "alone, learning rate relative to the size of the weights; muon: of matrices inside blocks, and adamw of "
            "the rest."
        },
    )
    adam_beta1: float = field(default=0.9, metadata={"help": "First beta of Adam's forms.", "range": "[0, 1)"})
    adam_beta2: float = field(default=0.999, metadata={"help": "Second beta of Adam's forms.", "range": "[0, 1)"})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "Added to their denominator.", "range": "(0, inf)"})
    adam_weight_decay: float = field(
        default=0.0, metadata={"help": "Decoupled weight decay, of all but adam.", "range": "[0, inf)"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        OPTIMIZERS[self.optimizer].find()  # refused at once where this machine lacks it
        if self.adam_weight_decay and self.optimizer == "adam":
            raise ValueError(
                f"--adam_weight_decay {self.adam_weight_decay:g} is decoupled from the gradient, which adam's is not; "
                "give --optimizer adamw, or leave it out."
            )
        if self.optimizer == "adafactor":
            warn_without_effect(self, ["adam_beta1", "adam_beta2", "adam_epsilon"], "adafactor has none of them")

    @property
    def options(self) -> dict[str, Any]:
        """As `TrainingRun.add` takes them."""
        return {
            "optimizer": self.optimizer,
            "betas": (self.adam_beta1, self.adam_beta2),
            "eps": self.adam_epsilon,
            "weight_decay": self.adam_weight_decay,
        }


@dataclass
class DataArguments(Checked):
    """Which images to train on: exactly one of dataset_name and train_data_dir."""

    dataset_name: str | None = field(
        default=None,
        metadata={"reads": True, "help": "Dataset on the Hub, or a local directory that `datasets` understands."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    train_data_dir: str | None = field(
        default=None,
        metadata={"reads": True, "help": "Folder of images; one subfolder per class where labels are needed."},
    )
    split: str = field(default="train", metadata={"help": "Split of the dataset."})
    image_column: str = field(default="image", metadata={"help": "Column that holds the images."})
    label_column: str = field(default="label", metadata={"help": "Column that holds the class labels."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are cached."})
    resolution: int = field(
        default=256, metadata={"help": "Side in pixels of the square training images.", "range": "(0, inf)"}
    )
    center_crop: bool = field(
        default=False, metadata={"help": "Crop the centre (ADM crop) instead of a random square of the image."}
    )
    random_flip: bool = field(default=False, metadata={"help": "Mirror half of the images left to right."})
    skip_small: bool = field(
        default=False,
        metadata={"help": "Leave out images smaller than --resolution instead of enlarging them (reads all headers)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset_name and self.train_data_dir:
            raise ValueError("Give either --dataset_name or --train_data_dir, not both.")

    @property
    def name(self) -> str | None:
        """What the data are called: the name on the Hub, or that of the local folder without its path."""
        given = self.dataset_name or self.train_data_dir
        return Path(given).resolve().name if given and Path(given).is_dir() else given

    @property
    def is_local(self) -> bool:
        """Whether they lie on this machine, so that nobody knows who may see them."""
        return Path(str(self.dataset_name or self.train_data_dir)).exists()

    def load(self, *, require_labels: bool = False, channels: int = 3) -> ImageSource:
        """The images; raises as `load_image_dataset` does."""
        return load_image_dataset(
            self.dataset_name,
            self.dataset_config_name,
            self.train_data_dir,
            split=self.split,
            image_column=self.image_column,
            label_column=self.label_column,
            require_labels=require_labels,
            cache_dir=self.cache_dir,
            skip_below=self.resolution if self.skip_small else None,
            channels=channels,
        )


def warn_without_effect(arguments: Any, names: Iterable[str], reason: str) -> None:
    """Names in one warning those fields of a dataclass that were changed although `reason` leaves them no effect.

    Of the processes that a launcher started, the first one says it.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    defaults = {
        entry.name: entry.default if entry.default is not MISSING else entry.default_factory()  # type: ignore[misc]
        for entry in fields(arguments)
        if entry.default is not MISSING or entry.default_factory is not MISSING
    }
    changed = [f"--{name}" for name in names if getattr(arguments, name) != defaults[name]]
    if changed:
        logger.warning("Without effect, since %s: %s.", reason, ", ".join(changed))
