"""The command line of every training script: dataclasses, a YAML preset, and what is saved beside the weights."""

import argparse
import difflib
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from ..data.image_datasets import ImageSource, load_image_dataset
from ..extensions import Registry, load_extension
from ..files import write_text

logger = logging.getLogger(__name__)

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
YAML_SUFFIXES = (".yaml", ".yml")


@dataclass
class RunArguments:
    """How a training run is run: length, optimisation, checkpoints, tracking. Checked on construction."""

    output_dir: str = field(
        metadata={"help": "Directory of the run: finished weights at its root, checkpoints/, metrics.jsonl, logs/."}
    )
    seed: int = field(
        default=0,
        metadata={"help": "Everything random is a function of (seed, rank, step), so equal seeds give equal runs."},
    )
    train_batch_size: int = field(default=16, metadata={"help": "Examples per device and micro-batch."})
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Micro-batches whose gradients are averaged before one optimizer step."}
    )
    learning_rate: float = field(
        default=1e-4, metadata={"help": "Peak learning rate, taken literally: never scaled by batch or devices."}
    )
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = field(
        default="constant", metadata={"help": "Shape of the learning rate after the warm-up; the others end at 0."}
    )
    lr_warmup_steps: int = field(default=0, metadata={"help": "Optimizer steps of linear warm-up from 0."})
    max_train_steps: int | None = field(
        default=None, metadata={"help": "Optimizer steps of the whole run; unset, num_train_epochs decides."}
    )
    num_train_epochs: int = field(
        default=1, metadata={"help": "Passes over the data when max_train_steps is unset (rounded up to whole steps)."}
    )
    mixed_precision: Literal["no", "bf16", "fp16"] | None = field(
        default=None,
        metadata={
            "help": "bf16 computes the forward in bfloat16 while weights, optimizer and EMA stay float32; no is "
            "float32 throughout; fp16 is refused (its range ends at 65504). Unset: what `accelerate config` says."
        },
    )
    allow_tf32: bool = field(
        default=False, metadata={"help": "Let float32 matrix products use TensorFloat-32 (Ampere and newer; faster)."}
    )
    max_grad_norm: float | None = field(
        default=None, metadata={"help": "Clip the gradient norm of each optimized module to this; unset, no clipping."}
    )
    max_nonfinite_steps: int = field(
        default=20,
        metadata={
            "help": "Steps with a NaN or infinite gradient change nothing and are counted; after this many in a row "
            "the run writes a checkpoint and stops."
        },
    )
    use_ema: bool = field(default=True, metadata={"help": "Keep a float32 moving average of the weights."})
    ema_decay: float = field(
        default=0.9999, metadata={"help": "ema = decay * ema + (1 - decay) * weights after every step; no warm-up."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in the backward: less memory, about 30 %% slower."}
    )
    compile: bool = field(default=False, metadata={"help": "Run the trained modules through torch.compile."})
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "Processes that load data; 0 loads in the main process. Changes no result."}
    )
    checkpointing_steps: int = field(
        default=500, metadata={"help": "A checkpoint every so many optimizer steps, and at the end; 0 for none."}
    )
    checkpoints_total_limit: int | None = field(
        default=2, metadata={"help": "Keep only this many newest checkpoints."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "A checkpoint directory, or latest: the newest complete one of output_dir (a fresh start if there "
            "is none and no finished run). The resumed run equals an uninterrupted one."
        },
    )
    report_to: Literal["tensorboard", "wandb", "none"] = field(
        default="tensorboard", metadata={"help": "Where curves and images go besides metrics.jsonl and validation/."}
    )
    logging_steps: int = field(
        default=10, metadata={"help": "Read losses back from the device every so many steps; logs hold their mean."}
    )
    validation_steps: int = field(default=500, metadata={"help": "Validation images every so many steps; 0: none."})
    dry_run: bool = field(
        default=False,
        metadata={"help": "Measure memory on one example, print what the run needs in memory and on disk, and exit."},
    )
    push_to_hub: bool = field(
        default=False, metadata={"help": "Upload the finished run; the token comes from the environment or `hf auth`."}
    )
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Repository to push to (user/name); unset, the name of output_dir."}
    )

    def __post_init__(self) -> None:
        positive = ["train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "logging_steps"]
        positive += ["max_nonfinite_steps", "max_train_steps", "checkpoints_total_limit", "max_grad_norm"]
        for name in positive:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"--{name} must be positive; got {value}.")
        for name in ("seed", "lr_warmup_steps", "checkpointing_steps", "validation_steps", "dataloader_num_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must not be negative; got {getattr(self, name)}.")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"--ema_decay must lie in [0, 1); got {self.ema_decay}. Use --no_use_ema for no EMA.")
        if self.lr_scheduler not in SCHEDULES:
            raise ValueError(f"--lr_scheduler must be one of {', '.join(SCHEDULES)}; got {self.lr_scheduler!r}.")
        if self.lr_scheduler == "constant_with_warmup" and not self.lr_warmup_steps:
            raise ValueError("--lr_scheduler constant_with_warmup needs --lr_warmup_steps; use constant for none.")


@dataclass
class DataArguments:
    """Which images to train on: exactly one of dataset_name and train_data_dir."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset on the Hub, or a local directory that `datasets` understands."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    train_data_dir: str | None = field(
        default=None, metadata={"help": "Folder of images; one subfolder per class where labels are needed."}
    )
    split: str = field(default="train", metadata={"help": "Split of the dataset."})
    image_column: str = field(default="image", metadata={"help": "Column that holds the images."})
    label_column: str = field(default="label", metadata={"help": "Column that holds the class labels."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are cached."})
    resolution: int = field(default=256, metadata={"help": "Side in pixels of the square training images."})
    center_crop: bool = field(
        default=False, metadata={"help": "Crop the centre (ADM crop) instead of a random square of the image."}
    )
    random_flip: bool = field(default=False, metadata={"help": "Mirror half of the images left to right."})

    def __post_init__(self) -> None:
        if self.dataset_name and self.train_data_dir:
            raise ValueError("Give either --dataset_name or --train_data_dir, not both.")
        if self.resolution <= 0:
            raise ValueError(f"--resolution must be positive; got {self.resolution}.")

    @property
    def name(self) -> str | None:
        """What the data are called: the name on the Hub, or that of the local folder without its path."""
        given = self.dataset_name or self.train_data_dir
        return Path(given).resolve().name if given and Path(given).is_dir() else given

    def load(self, *, require_labels: bool = False) -> ImageSource:
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


@dataclass(frozen=True)
class Choice:
    """Members of one room that an option chose: their own options join the script's.

    Args:
        registry: the room.
        names: those chosen.
        flag: the option that chose them.
    """

    registry: Registry[Any]
    names: tuple[str, ...]
    flag: str

    def arguments(self) -> dict[str, type]:
        """Name -> `Arguments` of those that have any."""
        found = {name: getattr(self.registry[name], "Arguments", None) for name in self.names}
        return {name: kind for name, kind in found.items() if kind is not None}


def load_extensions(argv: Sequence[str]) -> list[str]:
    """Loads what `--extension FILE_OR_MODULE` names, and gives back the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--extension", action="append", default=[])
    given, rest = parser.parse_known_args(argv)
    for extension in given.extension:
        load_extension(extension)
    return rest


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows a script's docstring line by line, and every default."""


def parse(
    *dataclass_types: type,
    argv: Sequence[str] | None = None,
    description: str | None = None,
    choices: Callable[[Mapping[str, Any]], Sequence[Choice]] | None = None,
) -> tuple[Any, ...]:
    """Reads `[PRESET.yaml] [--flag value ...]` into one instance per dataclass; flags win over the preset.

    Args:
        dataclass_types: dataclasses whose fields carry their help in `metadata`; names must differ between them.
        argv: arguments without the program name; None reads `sys.argv`.
        description: what --help says first.
        choices: from the values read so far (name -> value), whose further options there are; their instances are
            the last value returned, by member name.

    Raises:
        ValueError: a preset that is absent, not a flat mapping, or holds an unknown key (the nearest is named), or a
            value that a dataclass refuses. Unknown flags end the program, also with the nearest name.

    Example:
        >>> (run,) = parse(RunArguments, argv=["--output_dir", "runs/x", "--seed", "3"])
        >>> run.seed
        3
    """
    from transformers import HfArgumentParser

    argv, base, methods = load_extensions(sys.argv[1:] if argv is None else argv), dataclass_types, {}
    if choices is not None:
        early = HfArgumentParser(dataclass_types, add_help=False, allow_abbrev=False)
        for action in early._actions:
            action.required = False
        given = vars(early.parse_known_args(argv)[0])
        methods = {name: kind for choice in choices(given) for name, kind in choice.arguments().items()}
        dataclass_types = (*dataclass_types, *methods.values())
    parser = HfArgumentParser(
        dataclass_types, description=description, allow_abbrev=False, formatter_class=_HelpFormatter
    )
    parser.usage = "%(prog)s [PRESET.yaml] [--flag value ...]"
    parser.epilog = "A YAML preset may come first; its keys are the flags' names, and flags given after it win."
    for action in parser._actions:  # the --no_X that HfArgumentParser adds would repeat X's help and the wrong default
        if action.option_strings[0].startswith("--no_") and action.nargs == 0:
            action.help, action.default = f"Turn --{action.dest} off.", argparse.SUPPRESS
    known = [entry.name for dataclass_type in dataclass_types for entry in fields(dataclass_type) if entry.init]
    if argv and Path(argv[0]).suffix in YAML_SUFFIXES:
        argv = _preset_as_flags(Path(argv[0]), known) + argv[1:]
    *parsed, unknown = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    misplaced = [word for word in unknown if Path(word).suffix in YAML_SUFFIXES]
    if misplaced:
        parser.error(f"the preset must come first, before every flag; {misplaced[0]} does not")
    if unknown:
        parser.error(f"unknown argument {unknown[0]}; the nearest flag is --{_nearest(unknown[0].lstrip('-'), known)}")
    if choices is None:
        return tuple(parsed)
    return (*parsed[: len(base)], dict(zip(methods, parsed[len(base) :], strict=True)))


def _nearest(name: str, known: Sequence[str]) -> str:
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]


def _preset_as_flags(path: Path, known: Sequence[str]) -> list[str]:
    """The preset as command-line words, so that one parser checks types for both; null means 'not given'."""
    if not path.is_file():
        raise ValueError(f"The preset {path} does not exist; presets are in training/configs.")
    content = yaml.safe_load(path.read_text()) or {}
    if not isinstance(content, dict):
        raise ValueError(f"A preset must map flag names to values; {path} holds a {type(content).__name__}.")
    flags: list[str] = []
    for key, value in content.items():
        if key not in known:
            nearest = _nearest(str(key), known)
            raise ValueError(f"Unknown key {key!r} in the preset {path}; the nearest flag is {nearest!r}.")
        if isinstance(value, dict):
            raise ValueError(f"The value of {key!r} in the preset {path} must be a scalar or a list, not a mapping.")
        if value is not None:
            flags += [f"--{key}", *(str(item) for item in (value if isinstance(value, list) else [value]))]
    return flags


def read_model_config(path: str | Path, model_class: type) -> dict[str, Any]:
    """The init arguments of `model_class` in a JSON file; what diffusers notes beside them (_class_name) is left out.

    Raises:
        ValueError: a file that is absent or holds no mapping; a key that the class does not have (the nearest is
            named).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"The model config {path} does not exist; it is a JSON file with init arguments.")
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"A model config must map init arguments to values; {path} holds a {type(content).__name__}.")
    known = [name for name in inspect.signature(model_class).parameters if name not in ("args", "kwargs")]
    config = {key: value for key, value in content.items() if not key.startswith("_")}
    for key in config:
        if key not in known:
            raise ValueError(
                f"Unknown key {key!r} in {path}; the nearest of {model_class.__name__} is {_nearest(key, known)!r}."
            )
    return config


def resolved(*arguments: Any) -> dict[str, Any]:
    """All fields of several argument dataclasses as one flat mapping, in their order."""
    merged: dict[str, Any] = {}
    for group in arguments:
        merged.update(asdict(group))
    return merged


def save_resolved(values: dict[str, Any], directory: Path) -> None:
    """Writes `resolved_arguments.json` and `.yaml` (which is a preset that repeats the run)."""
    write_text(directory / "resolved_arguments.json", json.dumps(values, indent=2) + "\n")
    write_text(directory / "resolved_arguments.yaml", yaml.safe_dump(values, sort_keys=False))
