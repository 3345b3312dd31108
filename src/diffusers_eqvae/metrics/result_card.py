"""Result cards: beside every number, how it was made; and whether numbers of several cards may be compared."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..files import write_json

FORMAT = 1
# Cards that differ in one of these measure different things, for the reason given; `compare_cards` says so.
PROTOCOL = {
    "evaluator": "distances by different networks have different units",
    "evaluator_version": "another transcription or protocol may give other features",
    "weights_hash": "distances by different weights have different units",
    "input_rule": "resizing to the network's size changes features",
    "reference_hash": "distances to different references are different distances",
    "num_samples": "FID falls with the number of samples, and precision and recall move",
    "label_policy": "random and class-balanced labels give different distributions",
    "uint8_rule": "another rounding shifts all levels",
    "resize_rule": "resized and cropped images have other spectra",
}
# The same for figures of an autoencoder, which compare a reconstruction with its own image.
RECONSTRUCTION_PROTOCOL = {
    "data_hash": "figures of other images are other figures",
    "num_images": "figures of other images are other figures",
    "resize_rule": "resized and cropped images have other spectra",
    "posterior": "a sample of the posterior reconstructs worse than its mean",
    "definitions": "another definition of a figure gives other numbers",
    "intrinsic_dimension_points": "the intrinsic dimension grows with the number of points",
    "lpips_net": "distances by different networks have different units",
    "lpips_weights_hash": "distances by different weights have different units",
    **{key: PROTOCOL[key] for key in ("evaluator", "evaluator_version", "weights_hash", "input_rule", "uint8_rule")},
}
# The same for what latents know of annotated images.
PERCEPTION_PROTOCOL = {
    "annotation": "classes and depths, and what of them counts, have different figures",
    "images_hash": "figures of other images are other figures",
    "targets_hash": "other annotations are another truth",
    "num_annotated": "more annotated images teach more",
    "num_tested": "figures of other images are other figures",
    "resize_rule": "resized and cropped images have other spectra",
}
PROTOCOLS = {
    "generation": PROTOCOL,
    "reconstruction": RECONSTRUCTION_PROTOCOL,
    "perception": PERCEPTION_PROTOCOL,
}
# Facts that matter only where all cards have a number whose name begins like this.
_RFID = ("rfid", "rfd_", "rsfid", "rsfd_")
CONCERNS: dict[str, dict[str, tuple[str, ...]]] = {
    "generation": {},
    "reconstruction": {
        "intrinsic_dimension_points": ("intrinsic_dimension",),
        "lpips_net": ("lpips",),
        "lpips_weights_hash": ("lpips",),
        **dict.fromkeys(("evaluator", "evaluator_version", "weights_hash", "input_rule", "uint8_rule"), _RFID),
    },
    "perception": {},
}
# What an experiment varies; compared numbers may differ in these, and the table shows where.
SETTINGS = (
    "model",
    "model_class",
    "weights",
    "vae_revision",
    "transformer_revision",
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
    """Numbers and how they were made.

    Attributes:
        metrics: number by name.
        marks: reason by name, for numbers not to be trusted.
        protocol: the facts in `PROTOCOLS[task]`; what is not stated is unknown.
        settings: the facts in `SETTINGS`, of the model and its sampler.
        provenance: name of the reference, hash of the samples, hardware, versions, date.
        task: "generation", "reconstruction" or "perception".
        details: what is measured beside numbers, such as spectra.
    """

    metrics: dict[str, float]
    protocol: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    marks: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    task: str = "generation"
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.task not in PROTOCOLS:
            raise ValueError(f"A card's task is one of {', '.join(PROTOCOLS)}; got {self.task!r}.")
        for name, given, known in (
            ("protocol", self.protocol, tuple(PROTOCOLS[self.task])),
            ("settings", self.settings, SETTINGS),
        ):
            unknown = sorted(set(given) - set(known))
            if unknown:
                raise ValueError(f"A card's {name} holds {', '.join(known)}; got {', '.join(unknown)}.")

    def summary(self) -> str:
        """A line per number, with the reason where it is marked."""
        return "\n".join(
            f"{name} = {value:.6g}" + (f" ({self.marks[name]})" if name in self.marks else "")
            for name, value in self.metrics.items()
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """JSON that is either whole or absent."""
        write_json(path, {"format": FORMAT, **asdict(self)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ResultCard:
        """Raises ValueError where the file is no result card, or of another format."""
        try:
            content = json.loads(Path(path).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no result card: {error}.") from error
        if not isinstance(content, dict) or not {"metrics", "protocol"} <= content.keys():
            raise ValueError(f"{path} is no result card: it must hold metrics and protocol.")
        if content.pop("format", None) != FORMAT:
            raise ValueError(f"{path} is a card of another format than {FORMAT}; read it with the version it names.")
        unknown = sorted(set(content) - {entry.name for entry in fields(cls)})
        if unknown:
            raise ValueError(f"{path} holds {', '.join(unknown)}, which no card of format {FORMAT} has.")
        for key, value in content.items():
            if not isinstance(value, str if key == "task" else dict):
                raise ValueError(f"{path} is no result card: its {key} is a {type(value).__name__}.")
        if not all(isinstance(value, int | float | None) for value in content["metrics"].values()):
            raise ValueError(f"{path} is no result card: its metrics map names to numbers.")
        return cls(**content)


def sampling_facts(samples: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `pipelines/sample.py` wrote down beside its samples: settings of a card, and label policy and uint8 rule.

    It is read for the set it describes, which is samples.npz in the folder of sampling.json, its folder png/ or that
    folder itself. Of any other file nothing is known: {} and None for both rules. Whether the weights are an average
    is read from the run's `resolved_arguments.json`, where the model is a local directory.
    """
    samples = Path(samples)
    folder = samples if samples.is_dir() and samples.name != "png" else samples.parent
    record = folder / "sampling.json"
    described = samples.is_dir() or samples.name == "samples.npz"
    content = json.loads(record.read_text()) if described and record.is_file() else {}
    known = content.get("settings", {}) | {key: value for key, value in content.items() if key != "settings"}
    facts = {key: known[key] for key in SETTINGS if key in known}
    if "scheduler_config" in known:  # what the flag's word meant
        facts["scheduler"] = known["scheduler_config"]
    facts |= run_facts(str(facts.get("model")))
    return facts, {key: known.get(key) for key in ("label_policy", "uint8_rule")}


def run_facts(model: str | os.PathLike[str]) -> dict[str, Any]:
    """`ema`, whether the weights are an average, where `model` is the directory of a training run; else nothing."""
    resolved = Path(model) / "resolved_arguments.json"
    return {"ema": json.loads(resolved.read_text()).get("use_ema")} if resolved.is_file() else {}


@dataclass(frozen=True)
class Comparison:
    """What `compare_cards` found.

    Attributes:
        table: lines to print: numbers first, then the facts in which the cards differ.
        incomparable: one sentence per difference that forbids to compare; empty where the cards are comparable.
    """

    table: list[str]
    incomparable: list[str]


def compare_cards(names: Sequence[str], cards: Sequence[ResultCard]) -> Comparison:
    """Lines up two or more cards.

    Cards of different tasks, differences in their `PROTOCOLS`, and facts of it that a card does not state forbid to
    compare; of a network's facts that is said only where all cards have a number by it. A marked number has an
    asterisk. Differences in settings are what an experiment is about; they are listed and forbid nothing.

    Raises:
        ValueError: fewer than two cards, or another number of names.
    """
    if len(cards) < 2 or len(names) != len(cards):
        raise ValueError(f"Two or more cards are compared, each by a name; got {len(cards)} with {len(names)} names.")
    rows = [["", *names]]
    for metric in dict.fromkeys(metric for card in cards for metric in card.metrics):
        values = [card.metrics.get(metric) for card in cards]
        starred = ["*" if metric in card.marks else "" for card in cards]
        rows.append([metric, *("-" if v is None else f"{v:.6g}{s}" for v, s in zip(values, starred, strict=True))])
    for key, values in _differences(cards):
        rows.append([key, *map(_shown, values)])
    marks = [
        f"* {metric} of {name}: {reason}"
        for name, card in zip(names, cards, strict=True)
        for metric, reason in card.marks.items()
    ]
    return Comparison([*_aligned(rows), *marks], _incomparable(names, cards))


def _differences(cards: Sequence[ResultCard]) -> list[tuple[str, list[Any]]]:
    facts: list[Mapping[str, Any]] = [{**card.protocol, **card.settings, "task": card.task} for card in cards]
    keys = dict.fromkeys(["task", *(key for card in cards for key in PROTOCOLS[card.task]), *SETTINGS])
    columns = [(key, [each.get(key) for each in facts]) for key in keys]
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
    for key, reason in PROTOCOLS[tasks[0]].items():
        concerns = CONCERNS[tasks[0]].get(key)
        if concerns is not None and not any(metric.startswith(concerns) for metric in shared):
            continue
        values = [card.protocol.get(key) for card in cards]
        silent = [name for name, value in zip(names, values, strict=True) if value is None]
        if silent:
            sentences.append(f"{key} is not stated by {', '.join(silent)}: {reason}")
        elif any(value != values[0] for value in values):
            sentences.append(f"{key} differs ({', '.join(map(_shown, values))}): {reason}")
    if not shared:
        sentences.append("no number stands on all cards")
    return sentences


def _shown(value: Any) -> str:
    return "not stated" if value is None else value if isinstance(value, str) else json.dumps(value)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
