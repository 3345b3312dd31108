"""What a run says about itself (`RunFacts`, run_facts.json) and the model card made from it.

The templates are model_cards/*.md of the repository; a wheel carries them as diffusers_eqvae/model_cards/. A card
shows what the facts hold and leaves out the rest: nothing is estimated or filled in.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import jinja2
from huggingface_hub import ModelCard, ModelCardData

from .files import write_json

COMPATIBILITIES = ("drop-in", "decoder-only", "adapt")
TEMPLATE_FOLDERS = (Path(__file__).parent / "model_cards", Path(__file__).parents[2] / "model_cards")
PURPOSES = {
    "discriminator/": "the discriminator, to continue adversarial training",
    "alignment_network/": "the alignment network, from latents to features",
    "mean_std.json": "latent statistics, also in the config of the autoencoder",
    "metrics.jsonl": "the logged curves",
    "run_facts.json": "what this card was made from",
    "transformer/": "the generator",
    "vae/": "its autoencoder",
    "scheduler/": "the sampler's settings",
}
_OUR_AUTOENCODERS = ("AutoencoderKLEQ",)


@dataclass
class RunFacts:
    """What a finished run knows about itself; every field may be left out.

    base_model, vae, dataset: Hub id, or the name of something local. losses: weight by name.
    regularizers: settings by name, the tau distribution among them, e.g. {"equivariance": {"p_equivariance": 0.5,
    "p_low_resolution": 0.25, "scale": "isotropic", "rotation": True}}. normalization: mean, std (lists or numbers),
    scaling_factor, shift_factor, num_samples. figures: {"name", "value", "how"}, where how says how the value was
    measured. images: {"path" relative to the run, "caption"}. compatibility with models trained on base_model's
    latents: "drop-in", "decoder-only" or "adapt". labels: class names in the order of their ids.

    Raises ValueError for an unknown compatibility, a compatibility that contradicts latent_space_changed, a figure
    without "how" and a image without "path".
    """

    name: str | None = None
    base_model: str | None = None
    vae: str | None = None
    dataset: str | None = None
    license: str | None = None
    model_class: str | None = None
    architecture: str | None = None
    objective: str | None = None
    padding_mode: str | None = None
    resolution_px: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    mixed_precision: str | None = None
    ema_decay: float | None = None
    seed: int | None = None
    hardware: str | None = None
    seconds: float | None = None
    losses: dict[str, float] = field(default_factory=dict)
    regularizers: dict[str, dict[str, Any]] = field(default_factory=dict)
    normalization: dict[str, Any] = field(default_factory=dict)
    figures: list[dict[str, Any]] = field(default_factory=list)
    images: list[dict[str, str]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    command: str | None = None
    latent_space_changed: bool | None = None
    compatibility: str | None = None
    num_classes: int | None = None
    labels: list[str] = field(default_factory=list)
    sampling: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.compatibility not in (None, *COMPATIBILITIES):
            raise ValueError(f"compatibility must be one of {COMPATIBILITIES}, got {self.compatibility!r}")
        if self.latent_space_changed and self.compatibility in ("drop-in", "decoder-only"):
            raise ValueError(f"a changed latent space is not {self.compatibility}: use compatibility='adapt'")
        for figure in self.figures:
            if not {"name", "value", "how"} <= figure.keys():
                raise ValueError(f"a figure needs name, value and how it was measured, got {figure}")
        for image in self.images:
            if "path" not in image:
                raise ValueError(f"a image needs a path relative to the run's directory, got {image}")

    @classmethod
    def from_mapping(cls, facts: RunFacts | Mapping[str, Any]) -> RunFacts:
        """The facts of a mapping; ValueError names keys that are no facts."""
        if isinstance(facts, RunFacts):
            return facts
        unknown = sorted(facts.keys() - {item.name for item in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"unknown run facts {', '.join(unknown)}; the known ones are the fields of RunFacts")
        return cls(**facts)


def redact(text: str) -> str:
    """The text without access tokens: the one in use, and whatever is shaped like one."""
    token = huggingface_hub.get_token()
    if token:
        text = text.replace(token, "[token]")
    return re.sub(r"\bhf_[A-Za-z0-9_]{8,}", "[token]", text)


def write_run_facts(path: str | Path, facts: RunFacts | Mapping[str, Any]) -> None:
    """Write run_facts.json atomically and fit for publication.

    Of a local base model, autoencoder or dataset only the last part of the path is kept; tokens and the home folder
    are taken out of the command.
    """
    values = dataclasses.asdict(RunFacts.from_mapping(facts))
    for name in ("base_model", "vae", "dataset"):
        if values[name] is not None and Path(values[name]).exists():
            values[name] = Path(values[name]).resolve().name
    if values["command"] is not None:
        values["command"] = redact(values["command"]).replace(str(Path.home()), "~")
    known = {name: value for name, value in values.items() if value not in (None, {}, [])}
    write_json(path, known)


def read_run_facts(path: str | Path) -> RunFacts:
    """The facts in a run_facts.json; ValueError for unknown keys."""
    return RunFacts.from_mapping(json.loads(Path(path).read_text(encoding="utf-8")))


def render_autoencoder_card(
    facts: RunFacts | Mapping[str, Any], *, repo_id: str | None = None, files: Sequence[str] = ()
) -> str:
    """The model card (Markdown with its metadata) of an autoencoder run.

    `repo_id` is what the examples load, `files` what the card lists. Raises ValueError as `RunFacts` does.
    """
    facts = RunFacts.from_mapping(facts)
    sentence = "An image autoencoder"
    if facts.base_model:
        sentence += f", fine-tuned from {_link(facts.base_model)}"
    if facts.regularizers:
        sentence += f" with the regularizers {' and '.join(facts.regularizers)}"
    if facts.dataset:
        sentence += f" on {_link(facts.dataset, 'datasets/')}"
    ours = facts.model_class or "AutoencoderKLEQ"
    tags = ["autoencoder", "vae", *(f"{name}-regularization" for name in facts.regularizers)]
    return _render(
        "autoencoder.md",
        facts,
        repo_id=repo_id,
        files=files,
        tags=tags,
        introduction=sentence + ".",
        base=_link(facts.base_model) if facts.base_model else "its base model",
        our_class="AutoencoderKLEQ" if ours == "AutoencoderKL" else ours if ours in _OUR_AUTOENCODERS else None,
    )


def render_pipeline_card(
    facts: RunFacts | Mapping[str, Any], *, repo_id: str | None = None, files: Sequence[str] = ()
) -> str:
    """The model card of a class-conditional pipeline; arguments as in `render_autoencoder_card`."""
    facts = RunFacts.from_mapping(facts)
    sentence = "A class-conditional image generator"
    sentence += f" ({facts.architecture})" if facts.architecture else ""
    sentence += f" on the latents of {_link(facts.vae)}" if facts.vae else ""
    sentence += f", trained on {_link(facts.dataset, 'datasets/')}" if facts.dataset else ""
    label = repr(facts.labels[0]) if facts.labels else "0"
    names = ", ".join(f"`{label}`" for label in facts.labels[:10]) + (", ..." if len(facts.labels) > 10 else "")
    return _render(
        "pipeline.md",
        facts,
        repo_id=repo_id,
        files=files,
        tags=["class-conditional-image-generation"],
        introduction=sentence + ".",
        call=", ".join([f"class_labels=[{label}]", *(f"{name}={value!r}" for name, value in facts.sampling.items())]),
        labels=f", or names: {names}" if names else "",
    )


def _render(template: str, facts: RunFacts, *, repo_id: str | None, files: Sequence[str], tags: list[str], **words):
    normalization = {name: value for name, value in facts.normalization.items() if name != "num_samples"}
    has_mean = normalization.get("mean") is not None
    stock_class = "AutoencoderKL" if facts.model_class in (None, *_OUR_AUTOENCODERS) else facts.model_class
    card_data = ModelCardData(
        library_name="diffusers",
        license=facts.license,
        base_model=facts.base_model if facts.base_model and _is_hub_id(facts.base_model) else None,
        datasets=[facts.dataset] if facts.dataset and _is_hub_id(facts.dataset) else None,
        tags=["diffusers", "diffusers_eqvae", *tags],
    )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE_FOLDERS),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": _cell, "settings": _settings}
    text = environment.get_template(template).render(
        card_data=card_data.to_yaml(),
        facts=dataclasses.replace(facts, images=[{"caption": "", **image} for image in facts.images]),
        name=facts.name or (repo_id or template.removesuffix(".md")).split("/")[-1],
        repo_id=repo_id or "path/to/this/directory",
        stock_class=stock_class,
        files=files,
        purpose=_purpose,
        training=_training(facts),
        normalization=normalization,
        num_samples=facts.normalization.get("num_samples"),
        formula="(z - mean) * scaling_factor / std" if has_mean else "(z - shift_factor) * scaling_factor",
        **words,
    )
    return str(ModelCard(redact(re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n")))


def _training(facts: RunFacts) -> list[tuple[str, Any]]:
    """The rows of the card's training table that this run knows."""
    rows: list[tuple[str, Any]] = [
        ("base model", facts.base_model and _link(facts.base_model)),
        ("autoencoder", facts.vae and _link(facts.vae)),
        ("dataset", facts.dataset and _link(facts.dataset, "datasets/")),
        ("architecture", facts.architecture),
        ("objective", facts.objective),
        ("resolution", facts.resolution_px and f"{facts.resolution_px} px"),
        ("optimizer steps", facts.steps),
        ("batch size (all devices, with accumulation)", facts.batch_size),
        ("learning rate", facts.learning_rate),
        ("mixed precision", facts.mixed_precision),
        ("EMA decay", facts.ema_decay),
        ("losses and their weights", _settings(facts.losses)),
        *((f"regularizer {name}", _settings(settings) or "on") for name, settings in facts.regularizers.items()),
        ("seed", facts.seed),
        ("hardware", facts.hardware),
        ("time", facts.seconds and f"{facts.seconds:.0f} s"),
    ]
    return [(setting, value) for setting, value in rows if value not in (None, "")]


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_cell(value)}" for name, value in settings.items())


def _cell(value: Any) -> str:
    """A value as one cell of a Markdown table; floats to six significant digits."""
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value)
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("\n", " ").replace("|", "\\|")


def _is_hub_id(source: str) -> bool:
    return re.fullmatch(r"[\w][\w.-]*/[\w.-]+", source) is not None


def _link(source: str, prefix: str = "") -> str:
    """A link to a Hub id; of a local path only the last part, because the rest means nothing elsewhere."""
    return f"[{source}](https://huggingface.co/{prefix}{source})" if _is_hub_id(source) else f"`{Path(source).name}`"


def _purpose(path: str) -> str:
    return next((f": {purpose}" for start, purpose in PURPOSES.items() if path.startswith(start)), "")
