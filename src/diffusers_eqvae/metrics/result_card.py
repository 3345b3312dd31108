"""Result cards: beside every number, how it was made; and whether numbers of several cards may be compared."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..classes import ClassTable
from ..files import read_json, require_format_version, write_json
from ..provenance import hash_file, portable

FORMAT_VERSION = 4  # 3 hashed weights in several ways
# What was looked for and could not be known; never equal to anything.
UNKNOWN = "unknown"
_NETWORK = {
    "feature_network": "distances by different networks have different units",
    "feature_network_version": "another transcription or protocol may give other features",
    "feature_network_weights": "distances by different weights have different units",
    "input_rule": "resizing to the network's size changes features",
}
_UINT8 = {"uint8_rule": "another rounding shifts all values"}
_RESIZE = {
    "image_size": "images of another size are other images",
    "resize_rule": "resized and cropped images have other spectra",
}
_REFERENCE = {
    "reference_weights": "statistics of another network have other units",
    "reference_size": "images of another size are other images",
    "reference_resize_rule": "resized and cropped images have other spectra",
}
# Cards of a task that differ in one of these measure different things, for the reason given; `compare_cards` says so.
PROTOCOLS: dict[str, dict[str, str]] = {
    "generation": {
        **_NETWORK,
        "reference_hash": "distances to different references are different distances",
        **_REFERENCE,
        "num_samples": "FID falls with the number of samples, and precision and recall move",
        "label_policy": "random and class-balanced labels give different distributions",
        **_UINT8,
        **_RESIZE,
    },
    # They compare a reconstruction with its own image.
    "reconstruction": {
        "data_hash": "metrics of other images are other metrics",
        "num_images": "metrics of other images are other metrics",
        **_RESIZE,
        "posterior": "a sample of the posterior reconstructs worse than its mean",
        "definitions": "another definition of a metric gives other numbers",
        "intrinsic_dimension_points": "the intrinsic dimension grows with the number of points",
        "lpips_net": "distances by different networks have different units",
        "lpips_weights_hash": "distances by different weights have different units",
        **_NETWORK,
        **_UINT8,
    },
    # What latents know of annotated images.
    "perception": {
        "annotation": "classes and depths, and what of them counts, have different metrics",
        "data_hash": "metrics of other images are other metrics",
        "targets_hash": "other annotations are another truth",
        "num_annotated": "more annotated images teach more",
        "num_tested": "metrics of other images are other metrics",
        **_RESIZE,
    },
}
# What matters only where all cards have a number whose name begins like this.
_DISTANCES = ("mind", "fid", "fd_", "sfid", "sfd_", "precision", "recall", "kid", "kd_")
CONCERNS: dict[str, dict[str, tuple[str, ...]]] = {
    "generation": {
        **dict.fromkeys(_NETWORK, (*_DISTANCES, "inception_score")),
        "reference_hash": _DISTANCES,
        **dict.fromkeys(_REFERENCE, ("fid", "fd_", "sfid", "sfd_")),
    },
    "reconstruction": {
        "intrinsic_dimension_points": ("intrinsic_dimension",),
        "lpips_net": ("lpips",),
        "lpips_weights_hash": ("lpips",),
        **dict.fromkeys((*_NETWORK, *_UINT8), ("rfid", "rfd_", "rsfid", "rsfd_", "ifid", "ifd_")),
    },
    "perception": {},
}
OTHER_PROTOCOL = "another setting of this metric gives other numbers"
# What an experiment varies; compared numbers may differ in these, and the table shows where.
SETTINGS = (
    "model",
    "model_class",
    "autoencoder",
    "transformer",
    "guide",
    "preview_decoder",
    "alignment_network",
    "head",
    "window",
    "neighbours",
    "guidance_scale",
    "guidance_interval",
    "guided_channels",
    "scheduler",
    "num_inference_steps",
    "nfe",
    "dtype",
    "ema",
    "seed",
)


@dataclass
class ResultCard:
    """Numbers and how they were made; paths in it are `portable`, since cards are shown to others.

    Attributes:
        metrics: number by name.
        caveats: reason by name, for numbers not to be trusted.
        protocol: what `PROTOCOLS[task]` lists, and "METRIC.KEY" of further metrics; what is not stated is unknown.
        settings: what `SETTINGS` lists; `autoencoder` and `transformer` identify weights.
        provenance: name of the reference, `data_hash` of the samples, `hub_commit` of the model where it came from
            the Hub, hardware, versions, extensions, date.
        task: "generation", "reconstruction" or "perception".
        details: what is measured beside numbers, such as spectra.
        errors: standard error by name, as far as it is known.
        better: "higher" or "lower" by name; neither of a number without a direction.

    Example:
        >>> card = ResultCard({"psnr": 25.8}, {"num_images": 5000}, task="reconstruction", errors={"psnr": 0.05})
        >>> card.summary()
        'psnr = 25.8 +- 0.05'
    """

    metrics: dict[str, float]
    protocol: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    caveats: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    task: str = "generation"
    details: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    better: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.task not in PROTOCOLS:
            raise ValueError(f"A card's task is one of {', '.join(PROTOCOLS)}; got {self.task!r}.")
        for name, given, known in (
            ("protocol", {key for key in self.protocol if "." not in key}, tuple(PROTOCOLS[self.task])),
            ("settings", set(self.settings), SETTINGS),
        ):
            if unknown := sorted(given - set(known)):
                raise ValueError(f"A card's {name} holds {', '.join(known)}; got {', '.join(unknown)}.")
        self.settings, self.provenance, self.details = map(portable, (self.settings, self.provenance, self.details))

    def summary(self) -> str:
        """A line per number, with its standard error and its caveat."""
        return "\n".join(
            f"{name} = {value:.6g}"
            + (f" +- {self.errors[name]:.2g}" if name in self.errors else "")
            + (f" ({self.caveats[name]})" if name in self.caveats else "")
            for name, value in self.metrics.items()
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """JSON that is either whole or absent."""
        write_json(path, {"format_version": FORMAT_VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ResultCard:
        """What `save` wrote; refused where the file is not a result card, or of an older or a newer format."""
        content = read_json(path, needs={"metrics": object, "protocol": object})
        found = content.pop("format_version", content.pop("format", None))
        require_format_version(found, FORMAT_VERSION, path=path, remedy="measure again")
        if unknown := sorted(set(content) - {entry.name for entry in fields(cls)}):
            raise ValueError(f"{path} holds {', '.join(unknown)}, which a card does not have.")
        for key, value in content.items():
            if not isinstance(value, str if key == "task" else dict):
                raise ValueError(f"{path} is not a result card: its {key} is a {type(value).__name__}.")
        for key in ("metrics", "errors"):
            if not all(value is None or _is_number(value) for value in content.get(key, {}).values()):
                raise ValueError(f"{path} is not a result card: its {key} must map names to numbers, finite ones.")
        return cls(**content)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_card_of(path: str | os.PathLike[str], **subject: Any) -> bool:
    """Whether a file is the result card of a subject, which a new one of it may replace.

    Args:
        subject: what its task, protocol, settings or provenance say, as far as it is known before measuring; a value
            of None is not asked for.

    Example:
        >>> is_card_of("eq-vae.json", task="reconstruction", model="runs/eq-vae")
    """
    try:
        card = ResultCard.load(path)
    except (OSError, ValueError):
        return False
    said = {**card.provenance, **card.settings, **card.protocol, "task": card.task}
    return all(said.get(key) == portable(value) for key, value in subject.items() if value is not None)


def sampling_settings(samples: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any], ClassTable | None]:
    """What `pipelines/sample.py` wrote beside its samples: settings of a card, label policy and uint8 rule, classes.

    It is read for the set it describes, which is samples.npz in the folder of sampling.json, its folder png/ or that
    folder itself; samples.npz must be the file that was written. Of any other file nothing is known: {}, None for
    both rules, and None. Whether the weights are an average is read from the run's `resolved_arguments.json`, where
    the model is a local directory.
    """
    samples = Path(samples)
    folder = samples if samples.is_dir() and samples.name != "png" else samples.parent
    record = folder / "sampling.json"
    described = samples.is_dir() or samples.name == "samples.npz"
    content = read_json(record, needs={"settings": dict}) if described and record.is_file() else {}
    if samples.is_file() and "samples_hash" in content and content["samples_hash"] != hash_file(samples):
        raise ValueError(
            f"{samples} is not the set that {record} describes (it is damaged, or another file under its name). "
            "Sample again, or move it to a folder of its own to measure it as samples of which nothing is known."
        )
    known = content.get("settings", {}) | {key: value for key, value in content.items() if key != "settings"}
    settings = {key: known[key] for key in SETTINGS if key in known}
    if "scheduler_config" in known:  # what the flag's word meant
        settings["scheduler"] = known["scheduler_config"]
    settings |= run_settings(str(settings.get("model")))
    rules = {key: known.get(key) for key in ("label_policy", "uint8_rule")}
    return settings, rules, ClassTable.from_config(content)


def run_settings(model: str | os.PathLike[str]) -> dict[str, Any]:
    """`ema`, whether the weights are an average, where `model` is the directory of a training run; else nothing."""
    resolved = Path(model) / "resolved_arguments.json"
    return {"ema": read_json(resolved).get("use_ema")} if resolved.is_file() else {}


@dataclass(frozen=True)
class Comparison:
    """What `compare_cards` found.

    Attributes:
        table: lines to print: numbers first, then the protocol and settings in which the cards differ.
        incomparable: one sentence per difference that forbids to compare; empty where the cards are comparable.
    """

    table: list[str]
    incomparable: list[str]


def compare_cards(names: Sequence[str], cards: Sequence[ResultCard]) -> Comparison:
    """Lines up two or more cards.

    Cards of different tasks, differences in their `PROTOCOLS`, and parts of it that a card does not state forbid to
    compare; of a network that is said only where all cards have a number by it. A number with a caveat has an
    asterisk. Differences in settings are what an experiment is about; they are listed and forbid nothing.

    Example:
        >>> compare_cards(["a", "b"], [ResultCard.load("a.json"), ResultCard.load("b.json")]).incomparable
        []
    """
    if len(cards) < 2 or len(names) != len(cards):
        raise ValueError(f"Two or more cards are compared, each by a name; got {len(cards)} with {len(names)} names.")
    rows = [["", *names]]
    for metric in dict.fromkeys(metric for card in cards for metric in card.metrics):
        values = [card.metrics.get(metric) for card in cards]
        starred = ["*" if metric in card.caveats else "" for card in cards]
        rows.append([metric, *("-" if v is None else f"{v:.6g}{s}" for v, s in zip(values, starred, strict=True))])
    for key, values in _differences(cards):
        rows.append([key, *map(_shown, _told_apart(values))])
    caveats = [
        f"* {metric} of {name}: {reason}"
        for name, card in zip(names, cards, strict=True)
        for metric, reason in card.caveats.items()
    ]
    return Comparison([*aligned(rows), *caveats], _incomparable(names, cards))


def _differences(cards: Sequence[ResultCard]) -> list[tuple[str, list[Any]]]:
    stated: list[Mapping[str, Any]] = [{**card.protocol, **card.settings, "task": card.task} for card in cards]
    protocol = (key for card in cards for key in (*PROTOCOLS[card.task], *card.protocol))
    columns = [(key, [each.get(key) for each in stated]) for key in dict.fromkeys(["task", *protocol, *SETTINGS])]
    return [(key, values) for key, values in columns if any(value != values[0] for value in values)]


def _incomparable(names: Sequence[str], cards: Sequence[ResultCard]) -> list[str]:
    tasks = [card.task for card in cards]
    if len(set(tasks)) > 1:
        reason = (
            "a reconstruction is measured against its own image, a sample against a distribution, what latents know "
            "against annotations"
        )
        return [f"task differs ({', '.join(tasks)}): {reason}"]
    sentences = []
    shared = set.intersection(*(set(card.metrics) for card in cards))
    further = {key: OTHER_PROTOCOL for card in cards for key in card.protocol if "." in key}
    for key, reason in (PROTOCOLS[tasks[0]] | further).items():
        concerns = (key.split(".")[0],) if key in further else CONCERNS[tasks[0]].get(key)
        if concerns is not None and not any(metric.startswith(concerns) for metric in shared):
            continue
        values = [card.protocol.get(key) for card in cards]
        silent = [name for name, value in zip(names, values, strict=True) if value in (None, UNKNOWN)]
        if silent:
            sentences.append(f"{key} is not stated by {', '.join(silent)}: {reason}")
        elif any(value != values[0] for value in values):
            sentences.append(f"{key} differs ({', '.join(map(_shown, values))}): {reason}")
    if not shared:
        sentences.append("no number stands on all cards")
    return sentences


def _told_apart(values: Sequence[Any]) -> Sequence[Any]:
    """Of identities with parts those parts that differ, each by one of its hashes; anything else as it is."""
    if not all(isinstance(value, Mapping) for value in values):
        return values
    parts = dict.fromkeys(part for value in values for part in value)
    differing = [part for part in parts if any(value.get(part) != values[0].get(part) for value in values)]
    return [", ".join(f"{part} {_one_hash(value.get(part))}" for part in differing) for value in values]


def _one_hash(part: Any) -> Any:
    return next(iter(part.values()), None) if isinstance(part, Mapping) else part


def _shown(value: Any) -> str:
    return "not stated" if value is None else value if isinstance(value, str) else json.dumps(value)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, its columns below each other."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
