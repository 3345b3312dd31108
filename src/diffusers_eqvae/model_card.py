"""What a run says about itself (`RunMetadata`, run_metadata.json) and the model card made from it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
from huggingface_hub import ModelCard, ModelCardData

from .files import read_json, write_json
from .templates import is_hub_id, render_template

FORMAT_VERSION = 1
METADATA_FILE = "run_metadata.json"
COMPATIBILITIES = ("drop-in", "decoder-only", "adapt")
OUR_AUTOENCODERS = ("AutoencoderKLEQ",)
# The entries that templates name; training and data hold whatever a run has to say.
KEYS = {
    "model": (
        "name",
        "class",
        "base_model",
        "autoencoder",
        "architecture",
        "license",
        "padding_mode",
        "latent_space_changed",
        "compatibility",
        "normalization",
        "num_classes",
        "labels",
        "sampling",
    ),
    "evaluation": ("metrics", "images"),
    "provenance": ("command", "versions", "extensions", "hardware", "seconds"),
}
SOURCES = (("model", "base_model"), ("model", "autoencoder"), ("data", "dataset"))


@dataclass
class RunMetadata:
    """What a finished run knows about itself, in five groups; every entry may be left out (or None).

    Attributes:
        model: `base_model` and `autoencoder` are Hub ids or local names; `normalization` holds mean, std (lists or
            numbers), scaling_factor, shift_factor and num_samples; `labels` are class names in the order of their ids;
            `sampling` are arguments of the pipeline's call; `compatibility` with what was trained on the latents of
            base_model is "drop-in", "decoder-only" or "adapt".
        training: settings by name, shown as they are, such as optimizer_steps, losses {name: weight} and
            regularizers {name: settings}.
        data: the same; `dataset` is a Hub id or a local name.
        evaluation: `metrics` [{"name", "value", "how"}], where how says how it was measured, and `images`
            [{"path", "caption"}], with paths relative to the run.
        provenance: command, versions {package: version}, hardware, seconds.

    Example:
        >>> metadata = RunMetadata(model={"base_model": "madebyollin/taesd"}, training={"optimizer_steps": 500})
        >>> "| optimizer steps | 500 |" in render_model_card(metadata, "autoencoder")
        True
    """

    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for group, entries in vars(self).items():
            setattr(self, group, {key: value for key, value in entries.items() if value not in (None, {}, [])})
        for group, known in KEYS.items():
            if unknown := sorted(vars(self)[group].keys() - set(known)):
                raise ValueError(f"{group} of RunMetadata may hold {', '.join(known)}; got {', '.join(unknown)}.")
        compatibility = self.model.get("compatibility")
        if compatibility not in (None, *COMPATIBILITIES):
            raise ValueError(f"compatibility must be one of {', '.join(COMPATIBILITIES)}; got {compatibility!r}.")
        if self.model.get("latent_space_changed") and compatibility in ("drop-in", "decoder-only"):
            raise ValueError(f"A changed latent space is not {compatibility}; use compatibility='adapt'.")
        for key, needed in (("metrics", {"name", "value", "how"}), ("images", {"path"})):
            for entry in self.evaluation.get(key, []):
                if not needed <= entry.keys():
                    raise ValueError(f"Each of {key} needs {', '.join(sorted(needed))}; got {entry}.")

    def save(self, path: str | Path) -> None:
        """Writes JSON that is fit for publication.

        Of local paths of models and data the last part is kept; tokens and the home folder leave the command.
        """
        content = asdict(self)
        for group, key in SOURCES:
            source = content[group].get(key)
            if source is not None and Path(source).exists():
                content[group][key] = Path(source).resolve().name
        if "command" in self.provenance:
            content["provenance"]["command"] = redact(self.provenance["command"]).replace(str(Path.home()), "~")
        write_json(path, {"format_version": FORMAT_VERSION, **content})

    @classmethod
    def load(cls, path: str | Path) -> RunMetadata:
        """What `save` wrote."""
        content = read_json(path)
        version = content.pop("format_version", 0)
        if version != FORMAT_VERSION:
            remedy = "update the package" if version > FORMAT_VERSION else "remove the file, or write it anew"
            raise ValueError(
                f"{path} has format_version {version}, and this version of diffusers_eqvae reads {FORMAT_VERSION}: "
                f"{remedy}."
            )
        return cls(**content)


def _settings(metadata: RunMetadata) -> dict[str, Any]:
    """The rows of the card's table of settings."""
    shown = ("base_model", "autoencoder", "architecture", "hardware", "seconds")
    own = {key: value for key, value in {**metadata.model, **metadata.provenance}.items() if key in shown}
    return {**own, **metadata.data, **metadata.training}


def redact(text: str) -> str:
    """The text without access tokens: the one in use, and whatever has the form of one.

    Example:
        >>> redact("--hub_token hf_abcdefghijklmn")
        '--hub_token [token]'
    """
    token = huggingface_hub.get_token()
    if token:
        text = text.replace(token, "[token]")
    return re.sub(r"\bhf_[A-Za-z0-9_]{8,}", "[token]", text)


def render_model_card(
    metadata: RunMetadata,
    kind: Literal["autoencoder", "pipeline"],
    *,
    repo_id: str | None = None,
    files: Sequence[str] = (),
) -> str:
    """The model card (Markdown with its YAML header) of a run: what the metadata holds, and nothing else.

    `repo_id` is what the examples on the card load, `files` what it lists.

    Example:
        >>> "# eq-vae" in render_model_card(RunMetadata(), "autoencoder", repo_id="me/eq-vae")
        True
    """
    model: dict[str, Any] = dict.fromkeys(KEYS["model"]) | metadata.model
    dataset = metadata.data.get("dataset")
    regularizers = metadata.training.get("regularizers", {})
    tags = ["class-conditional-image-generation"]
    if kind == "autoencoder":
        tags = ["autoencoder", "vae", *(f"{name}-regularization" for name in regularizers)]
    card_data = ModelCardData(
        library_name="diffusers",
        license=model["license"],
        base_model=model["base_model"] if model["base_model"] and is_hub_id(model["base_model"]) else None,
        datasets=[dataset] if dataset and is_hub_id(dataset) else None,
        tags=["diffusers", "diffusers_eqvae", *tags],
    )
    model_class = model["class"] or "AutoencoderKL"
    ours = "AutoencoderKLEQ" if model_class == "AutoencoderKL" else model_class
    text = render_template(
        f"{kind}.md",
        card_data=card_data.to_yaml(),
        model=model,
        dataset=dataset,
        regularizers=list(regularizers),
        settings=_settings(metadata),
        evaluation=metadata.evaluation,
        provenance=metadata.provenance,
        name=model["name"] or (repo_id or kind).split("/")[-1],
        repo_id=repo_id or "path/to/this/directory",
        stock_class="AutoencoderKL" if model_class in OUR_AUTOENCODERS else model_class,
        our_class=ours if ours in OUR_AUTOENCODERS else None,
        files=files,
    )
    return str(ModelCard(redact(re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n")))
