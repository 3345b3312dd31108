"""Publish a finished run on the Hub, with its model card, by a push whose failure never costs the run.

The access token is huggingface_hub's own business (`hf auth login`, or HF_TOKEN): it is never an argument here and
never part of a log line, a file or a card.
"""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import validate_repo_id

from .classes import parse_id2label
from .files import read_json
from .model_card import METADATA_FILE, RunMetadata, redact, render_model_card

__all__ = ["prepare_push", "push_run"]

logger = logging.getLogger(__name__)

CARD = "README.md"
STATISTICS = "mean_std.json"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
# Of the run and of each component's folder these are uploaded, and nothing else.
UPLOADED = ("model_index.json", "config.json", "scheduler_config.json", STATISTICS, *WEIGHTS)
UPLOADED_OF_RUN = (METADATA_FILE, "metrics.jsonl", CARD)
TEXT_SUFFIXES = (".json", ".jsonl", ".md")


def push_run(
    output_dir: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    license: str | None = None,
) -> bool:
    """Publishes a run's directory as one commit and says whether that worked; call it on the main process only.

    A directory without a model and a name that no repository can have are logged with the reason alone, whatever else
    goes wrong (no network, a refused token) with the command that tries again. Nothing in `output_dir` is written or
    removed: a failing push never costs a run.

    Args:
        output_dir: a finished run: an autoencoder, or a pipeline where there is a model_index.json.
        repo_id: "name" or "owner/name"; the repository is created where it does not exist.
        private: makes a new repository private; otherwise the owner's default holds.
        revision: branch to commit to, created where it does not exist; default main.
        commit_message: default "Upload NAME".
        license: the licence that the card states; default the one in run_metadata.json, else none.

    Example:
        >>> push_run("runs/eq-vae", "me/eq-vae", private=True)  # doctest: +SKIP
        True
    """
    root = Path(output_dir)
    try:
        validate_repo_id(repo_id)
        saved_files(root)
    except Exception as error:
        logger.error(redact(f"Could not push {root} to {repo_id}: {_one_line(error)}."))
        return False
    try:
        api = HfApi()
        name = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
        files, card = prepare_push(root, name, license=license)
        api.create_repo(name, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        # Not upload_folder, which would need the card on disk: one commit, so that nobody downloads half of a push.
        operations = [CommitOperationAdd(path, card.encode() if path == CARD else str(root / path)) for path in files]
        message = commit_message or f"Upload {root.resolve().name}"
        commit = api.create_commit(name, operations, commit_message=message, revision=revision)
    except Exception as error:
        options = {"hub_model_id": repo_id, "revision": revision, "commit_message": commit_message, "license": license}
        command = ["eqvae", "push", str(root)]
        command += [word for key, value in options.items() if value is not None for word in (f"--{key}", value)]
        command += ["--private"] if private else []
        logger.error(
            redact(
                f"Could not push {root} to {repo_id} on {HfApi().endpoint}: {_one_line(error)}. The run on disk is "
                f"complete and unchanged; to try again: {shlex.join(command)}"
            )
        )
        return False
    logger.info("Pushed %s to %s", root, commit.commit_url)
    return True


def prepare_push(
    output_dir: str | Path, repo_id: str | None = None, *, license: str | None = None
) -> tuple[list[str], str]:
    """The files of a run that a push uploads (relative paths, README.md among them) and the model card.

    A README.md in the directory is taken as it is; otherwise the card is rendered from run_metadata.json and from what
    the saved model itself says (normalisation, class, number of classes). A file that holds the access token is an
    error.

    Example:
        >>> files, card = prepare_push("runs/eq-vae", "me/eq-vae", license="apache-2.0")  # doctest: +SKIP
    """
    root = Path(output_dir)
    if repo_id is not None:
        validate_repo_id(repo_id)
    saved = saved_files(root)
    metadata = _metadata_of(root)
    if license is not None:
        metadata.model["license"] = license
    files = sorted({*saved, *(image["path"] for image in metadata.evaluation.get("images", [])), CARD})
    token = huggingface_hub.get_token()
    for file in (root / path for path in files):
        if token and file.suffix in TEXT_SUFFIXES and file.exists() and token in file.read_text(encoding="utf-8"):
            raise ValueError(f"{file} holds your access token and would publish it; remove it first")
    if (root / CARD).exists():
        if license is not None:
            logger.warning("license=%s is not used: %s is uploaded as it is, so state it there", license, root / CARD)
        return files, (root / CARD).read_text(encoding="utf-8")
    kind: Literal["autoencoder", "pipeline"] = "pipeline" if "model_index.json" in saved else "autoencoder"
    return files, render_model_card(metadata, kind, repo_id=repo_id, files=files)


def saved_files(root: Path) -> list[str]:
    """Weights, configs, statistics, metadata and curves of a run and its components, as relative paths.

    Example:
        >>> saved_files(Path("runs/eq-vae"))  # doctest: +SKIP
        ['config.json', 'diffusion_pytorch_model.safetensors', 'mean_std.json', 'metrics.jsonl', 'run_metadata.json']
    """
    if not root.is_dir():
        raise ValueError(f"there is no directory {root}")
    if (root / "model_index.json").exists():
        index = _read_json(root / "model_index.json")
        named = [name for name, value in index.items() if name[0] != "_" and isinstance(value, list) and all(value)]
        if missing := [name for name in named if not (root / name).is_dir()]:
            raise ValueError(f"{root} lacks the folders {', '.join(missing)} that its model_index.json names")
    elif not (root / "config.json").exists() or not any(root.glob("*.safetensors")):
        raise ValueError(f"{root} does not hold a saved model (model_index.json, or config.json and *.safetensors)")
    found = {file for folder in (root, *_components(root)) for pattern in UPLOADED for file in folder.glob(pattern)}
    found |= {root / name for name in UPLOADED_OF_RUN}
    return sorted(file.relative_to(root).as_posix() for file in found if file.is_file())


def _components(folder: Path) -> Iterator[Path]:
    """The folders of diffusers components (vae/, discriminator/) and of theirs (vae/alignment_network/)."""
    for config in sorted(folder.glob("*/*config.json")):
        if config.name in UPLOADED and not (config.parent / METADATA_FILE).exists():
            yield config.parent
            yield from _components(config.parent)


def _metadata_of(root: Path) -> RunMetadata:
    """run_metadata.json, with what the saved model says about itself in place of what was noted earlier.

    The latent store's statistics are often written into the config after training, so the config is asked last.
    """
    noted = RunMetadata.load(root / METADATA_FILE) if (root / METADATA_FILE).exists() else RunMetadata()
    index = _read_json(root / "model_index.json")
    vae = root / "vae" if index else root
    config = _read_json(vae / "config.json")
    model = {"class": config.get("_class_name"), "padding_mode": config.get("padding_mode")}
    model["normalization"] = _normalization(config, vae / STATISTICS)
    if index:
        trained = _read_json(root / "transformer" / "config.json")
        model["num_classes"] = trained.get("num_classes")
        named = index.get("id2label") or trained.get("id2label")
        names = parse_id2label(named, model["num_classes"] or noted.model.get("num_classes"))
        model["labels"] = [names[key][0] for key in sorted(names)]
    model = noted.model | {key: value for key, value in model.items() if value}
    images = [image for image in noted.evaluation.get("images", []) if _is_image(root, image["path"])]
    return replace(noted, model=model, evaluation={**noted.evaluation, "images": images})


def _normalization(config: dict[str, Any], statistics: Path) -> dict[str, Any]:
    """The normalisation in an autoencoder's config; num_samples where mean_std.json belongs to the same mean."""
    keys = ("latents_mean", "latents_std", "scaling_factor", "shift_factor")
    found = {key.removeprefix("latents_"): config.get(key) for key in keys}
    measured = _read_json(statistics)
    mean, noted = found["mean"], measured.get("latents_mean")
    if mean and noted and len(mean) == len(noted) and all(map(math.isclose, mean, noted)):
        found["num_samples"] = measured.get("num_samples")
    return {name: value for name, value in found.items() if value is not None}


def _is_image(root: Path, path: str) -> bool:
    target = (root / path).resolve()
    if target.is_file() and target.is_relative_to(root.resolve()):
        return True
    logger.warning("The image %s is not a file below %s and is left out of the card", path, root)
    return False


def _one_line(error: Exception) -> str:
    text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:400].rstrip(".")


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
