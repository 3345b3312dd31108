"""Result cards: beside every number, how it was made; and whether numbers of several cards may be compared."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
UINT8_RULE = "clamp(127.5 x + 128), truncated"
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
    "resize_rule": "resized and cropped pictures have other spectra",
}
# What an experiment varies; compared numbers may differ in these, and the table shows where.
SETTINGS = (
    "model",
    "weights",
    "vae_revision",
    "transformer_revision",
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
        protocol: the facts in `PROTOCOL`; what is not stated is unknown.
        settings: the facts in `SETTINGS`, of the sampler.
        provenance: name of the reference, hash of the samples, hardware, versions, date.
    """

    metrics: dict[str, float]
    protocol: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    marks: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, given, known in (
            ("protocol", self.protocol, tuple(PROTOCOL)),
            ("settings", self.settings, SETTINGS),
        ):
            unknown = sorted(set(given) - set(known))
            if unknown:
                raise ValueError(f"A card's {name} holds {', '.join(known)}; got {', '.join(unknown)}.")

    def save(self, path: str | os.PathLike[str]) -> None:
        """JSON that is either whole or absent."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n")
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ResultCard:
        """Raises ValueError where the file is no result card, or of a later format."""
        try:
            content = json.loads(Path(path).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no result card: {error}.") from error
        if not isinstance(content, dict) or "metrics" not in content or "protocol" not in content:
            raise ValueError(f"{path} is no result card: it must hold metrics and protocol.")
        if content.pop("format", None) != FORMAT:
            raise ValueError(f"{path} is a card of another format than {FORMAT}; read it with the version it names.")
        return cls(**content)


def hardware(**versions: str) -> dict[str, Any]:
    """Where and when: device, threads, versions (those given besides torch and Python), date (UTC)."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "hardware": device,
        "threads": torch.get_num_threads(),
        "versions": {**versions, "torch": torch.__version__, "python": platform.python_version()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def sampling_facts(samples: str | os.PathLike[str]) -> tuple[dict[str, Any], str | None]:
    """What the `sampling.json` beside an .npz (or in a folder) says: settings of a card, and the label policy.

    A folder png/ below the directory of a set has it one level up. Without the file nothing is known: ({}, None).
    Whether the weights are an average is read from the run's `resolved_arguments.json`, where the model is a local
    directory.
    """
    samples = Path(samples)
    folders = [samples, samples.parent] if samples.is_dir() else [samples.parent]
    record = next((folder / "sampling.json" for folder in folders if (folder / "sampling.json").is_file()), None)
    if record is None:
        return {}, None
    content = json.loads(record.read_text())
    known = content.get("settings", {}) | {key: content[key] for key in ("model", "nfe") if key in content}
    facts = {key: known[key] for key in SETTINGS if key in known}
    if facts.get("scheduler") == "saved":
        # Which one that was; its own options are in the file of the set.
        facts["scheduler"] = {"saved": known.get("scheduler_config")}
    resolved = Path(str(facts.get("model"))) / "resolved_arguments.json"
    if resolved.is_file():
        facts["ema"] = json.loads(resolved.read_text()).get("use_ema")
    return facts, known.get("label_policy")


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

    Differences in `PROTOCOL`, and facts of it that a card does not state, forbid to compare. A marked number has an
    asterisk. Differences in settings are what an experiment is about; they are listed and forbid nothing.

    Raises:
        ValueError: fewer than two cards, or another number of names.
    """
    if len(cards) < 2 or len(names) != len(cards):
        raise ValueError(f"Two or more cards, each with a name, can be compared; got {len(cards)} and {len(names)}.")
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
    facts: list[Mapping[str, Any]] = [{**card.protocol, **card.settings} for card in cards]
    columns = [(key, [each.get(key) for each in facts]) for key in (*PROTOCOL, *SETTINGS)]
    return [(key, values) for key, values in columns if any(value != values[0] for value in values)]


def _incomparable(names: Sequence[str], cards: Sequence[ResultCard]) -> list[str]:
    sentences = []
    for key, reason in PROTOCOL.items():
        values = [card.protocol.get(key) for card in cards]
        silent = [name for name, value in zip(names, values, strict=True) if value is None]
        if silent:
            sentences.append(f"{key} is not stated by {', '.join(silent)}: {reason}")
        elif any(value != values[0] for value in values):
            sentences.append(f"{key} differs ({', '.join(map(_shown, values))}): {reason}")
    shared = set.intersection(*(set(card.metrics) for card in cards))
    if not shared:
        sentences.append("no number stands on all cards")
    return sentences


def _shown(value: Any) -> str:
    return "not stated" if value is None else value if isinstance(value, str) else json.dumps(value)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
