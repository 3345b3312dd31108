"""What a run says about itself (`RunMetadata`, run_metadata.json) and the model card made from it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from markupsafe import Markup
from yaml import YAMLError

from .files import read_json, require_format_version, write_json
from .pretrained import hub_file
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
        "base_license",
        "measured_compatibility",
        "padding_mode",
        "latent_space_changed",
        "compatibility",
        "normalization",
        "num_classes",
        "labels",
        "sampling",
        "papers",
    ),
    "evaluation": ("metrics", "images"),
    "provenance": ("command", "versions", "extensions", "hardware", "seconds"),
}
SOURCES = (("model", "base_model"), ("model", "autoencoder"), ("data", "dataset"))
# What the card relies on: of which type an entry is, where it is there.
TYPES: dict[tuple[str, str], type | tuple[type, ...]] = {
    **dict.fromkeys((("model", key) for key in ("name", "class", "base_model", "autoencoder")), str),
    **dict.fromkeys((("model", key) for key in ("license", "base_license")), str),
    **dict.fromkeys((("model", key) for key in ("normalization", "sampling", "measured_compatibility")), dict),
    **dict.fromkeys((("model", key) for key in ("labels", "papers")), (list, tuple)),
    ("model", "num_classes"): int,
    ("training", "regularizers"): dict,
    ("data", "dataset"): str,
    **dict.fromkeys((("evaluation", key) for key in ("metrics", "images")), (list, tuple)),
    ("provenance", "command"): str,
}
PIPELINE_TAGS = {"autoencoder": "image-to-image", "pipeline": "unconditional-image-generation"}


@dataclass
class RunMetadata:
    """What a finished run knows about itself, in five groups; every entry may be left out (or None).

    Attributes:
        model: `base_model` and `autoencoder` are Hub ids or local names; `normalization` holds mean, std (lists or
            numbers), scaling_factor, shift_factor and num_samples; `labels` are class names in the order of their ids;
            `sampling` are arguments of the pipeline's call; `compatibility` with what was trained on the latents of
            base_model is "drop-in", "decoder-only" or "adapt", and `measured_compatibility` what `eqvae compat` finds;
            `base_license` is the licence of base_model; `papers` [{"name", "arxiv"}] of the methods.
        training: settings by name, shown as they are, such as optimizer_steps, losses {name: weight} and
            regularizers {name: settings}.
        data: the same; `dataset` is a Hub id or a local name.
        evaluation: `metrics` [{"name", "value", "how", "before"}], where how says how it was measured and before is
            the value of the start; and `images` [{"path", "caption", "private"}], with paths relative to the run,
            where private is False if they show nothing that only the owner of the data has.
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
            if not isinstance(entries, dict):
                raise ValueError(f"{group} of RunMetadata must map names to values; got {type(entries).__name__}.")
            setattr(self, group, {key: value for key, value in entries.items() if value not in (None, {}, [])})
        for group, known in KEYS.items():
            if unknown := sorted(vars(self)[group].keys() - set(known)):
                raise ValueError(f"{group} of RunMetadata may hold {', '.join(known)}; got {', '.join(unknown)}.")
        for (group, key), kind in TYPES.items():
            value = vars(self)[group].get(key)
            if value is not None and not isinstance(value, kind):
                raise ValueError(f"{key} in {group} of RunMetadata has another type than it should; got {value!r}.")
        names = [self.model.get("class", "Class"), *self.model.get("sampling", {})]
        if wrong := [name for name in names if not name.isidentifier()]:
            raise ValueError(f"Names of classes and arguments in RunMetadata are Python's; got {wrong[0]!r}.")
        compatibility = self.model.get("compatibility")
        if compatibility not in (None, *COMPATIBILITIES):
            raise ValueError(f"compatibility must be one of {', '.join(COMPATIBILITIES)}; got {compatibility!r}.")
        if self.model.get("latent_space_changed") and compatibility in ("drop-in", "decoder-only"):
            raise ValueError(f"A changed latent space is not {compatibility}; use compatibility='adapt'.")
        entries = self.evaluation | {"papers": self.model.get("papers", [])}
        for key, needed in (
            ("metrics", {"name", "value", "how"}),
            ("images", {"path"}),
            ("papers", {"name", "arxiv"}),
        ):
            for entry in entries.get(key, []):
                if not isinstance(entry, dict) or not needed <= entry.keys():
                    raise ValueError(f"Each of {key} needs {', '.join(sorted(needed))}; got {entry}.")

    def save(self, path: str | Path) -> None:
        """Writes JSON that is fit for publication.

        Tokens leave the command; of paths on this machine the last part is kept (`without_folders`).
        """
        content = asdict(self)
        for group, key in SOURCES:
            if key in content[group]:
                content[group][key] = without_folders(content[group][key])
        if isinstance(report := content["data"].get("report"), dict):  # of a data set; names of its files stay here
            content["data"]["report"] = {key: each["count"] for key, each in report.items() if "count" in each}
        if "command" in self.provenance:
            content["provenance"]["command"] = redact(_words_without_folders(self.provenance["command"]))
        write_json(path, {"format_version": FORMAT_VERSION, **content})

    @classmethod
    def load(cls, path: str | Path) -> RunMetadata:
        """What `save` wrote."""
        content = read_json(path)
        remedy = "remove the file, or write it anew"
        require_format_version(content.pop("format_version", None), FORMAT_VERSION, path=path, remedy=remedy)
        if unknown := sorted(content.keys() - {entry.name for entry in fields(cls)}):
            raise ValueError(f"{path} holds {', '.join(unknown)}, which the metadata of a run does not have.")
        try:
            return cls(**content)
        except ValueError as error:
            raise ValueError(f"{path} cannot be used: {error}") from error


def stated_license(source: str, revision: str | None = None) -> str | None:
    """The licence that the README.md of a directory or Hub repository states, or the metadata of a run; else None.

    Example:
        >>> stated_license("stabilityai/sd-vae-ft-mse")  # doctest: +SKIP
        'mit'
    """
    readme, run = (hub_file(source, file, revision) for file in ("README.md", METADATA_FILE))
    try:
        stated = (metadata_load(readme) if readme else None) or {}
    except (ValueError, YAMLError):  # a header that nobody can read states nothing
        stated = {}
    license = stated.get("license")
    if license == "other":
        license = stated.get("license_name") or license
    if license is None and run is not None:
        with suppress(ValueError):
            model = RunMetadata.load(run).model
            license = model.get("license") or model.get("base_license")
    return None if license is None else " ".join(str(license).split())


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


def without_folders(source: str) -> str:
    """A name on the Hub as it is; of a path on this machine the last part.

    Example:
        >>> without_folders("/home/me/photographs"), without_folders("stabilityai/sd-vae-ft-mse")
        ('photographs', 'stabilityai/sd-vae-ft-mse')
    """
    if "://" in source or (is_hub_id(source) and not Path(source).exists()):
        return source
    return re.split(r"[/\\]", source.rstrip("/\\"))[-1]


def _words_without_folders(command: str) -> str:
    try:
        words = [word.rpartition("=") if word.startswith("-") else ("", "", word) for word in shlex.split(command)]
    except ValueError:  # not a command line
        return command
    return shlex.join(flag + equals + without_folders(word) for flag, equals, word in words)


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
    tags += [f"arxiv:{paper['arxiv']}" for paper in model["papers"] or []]
    card_data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=PIPELINE_TAGS[kind],
        license=" ".join(model["license"].split()) if model["license"] else None,
        base_model=model["base_model"] if model["base_model"] and is_hub_id(model["base_model"]) else None,
        datasets=[dataset] if dataset and is_hub_id(dataset) else None,
        tags=["diffusers", "diffusers_eqvae", *tags],
    )
    model_class = model["class"] or "AutoencoderKL"
    ours = "AutoencoderKLEQ" if model_class == "AutoencoderKL" else model_class
    text = render_template(
        f"{kind}.md",
        card_data=Markup(card_data.to_yaml()),  # quoted where YAML needs it
        model=model,
        dataset=dataset,
        resolution_px=metadata.data.get("resolution_px"),
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
