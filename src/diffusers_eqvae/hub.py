"""Publish a finished run: what goes to the Hub, its model card, and a push that never costs the run.

The access token is huggingface_hub's own business (`hf auth login`, or HF_TOKEN): it is never an argument here and
never part of a log line, a file or a card.
"""

from __future__ import annotations

import json
import logging
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from diffusers_eqvae.model_card import (
    RunFacts,
    read_run_facts,
    redact,
    render_autoencoder_card,
    render_pipeline_card,
    write_run_facts,
)
from diffusers_eqvae.pipelines.labels import parse_id2label

__all__ = [
    "RunFacts",
    "prepare_push",
    "push_run",
    "read_run_facts",
    "render_autoencoder_card",
    "render_pipeline_card",
    "write_run_facts",
]

logger = logging.getLogger(__name__)

CARD = "README.md"
FACTS = "run_facts.json"
STATISTICS = "mean_std.json"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
ROOT_FILES = ("config.json", "model_index.json", *WEIGHTS, STATISTICS, FACTS, "metrics.jsonl")
COMPONENT_FILES = ("config.json", "scheduler_config.json", STATISTICS, *WEIGHTS)
EXTRA_COMPONENTS = ("discriminator", "alignment_network")
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
    """Publish a run's directory as one commit and say whether that worked.

    A directory without a model and a name that no repository can have are logged with the reason alone; whatever else
    goes wrong (no network, a refused token) together with the command that tries again. Nothing below `output_dir` is
    written or removed: a failing push never costs a run. Call it on the main process only.

    Args:
        output_dir: a finished run: an autoencoder, or a pipeline where there is a model_index.json.
        repo_id: "name" or "owner/name"; the repository is made where there is none.
        private: make a new repository private; otherwise the owner's default holds.
        revision: branch to commit to, made where there is none; default main.
        commit_message: default "Upload NAME".
        license: the licence that the card states; default the one in run_facts.json, else none.
    """
    try:
        validate_repo_id(repo_id)
        publishable_files(Path(output_dir))
    except Exception as error:
        logger.error(redact(f"Could not push {output_dir} to {repo_id}: {_reason(error)}."))
        return False
    try:
        url = _push(Path(output_dir), repo_id, private, revision, commit_message, license)
    except Exception as error:
        options = {"hub_model_id": repo_id, "revision": revision, "commit_message": commit_message, "license": license}
        command = ["eqvae", "push", str(output_dir)]
        command += [word for name, value in options.items() if value is not None for word in (f"--{name}", value)]
        command += ["--private"] if private else []
        logger.error(
            redact(
                f"Could not push {output_dir} to {repo_id}: {_reason(error)}. The run on disk is complete and "
                f"unchanged; to try again: {shlex.join(command)}"
            )
        )
        return False
    logger.info("Pushed %s to %s", output_dir, url)
    return True


def prepare_push(
    output_dir: str | Path, repo_id: str | None = None, *, license: str | None = None
) -> tuple[list[str], str]:
    """The files of a run that a push uploads (relative paths, README.md among them) and the model card.

    A README.md in the directory is taken as it is; otherwise the card is rendered from run_facts.json and from what
    the saved model itself says (normalisation, class, number of classes).

    Raises ValueError where the directory holds no saved model, where no repository can be called `repo_id`, or where a
    text file holds the access token.
    """
    root = Path(output_dir)
    if repo_id is not None:
        validate_repo_id(repo_id)
    facts = _facts_of(root)
    if license is not None:
        facts.license = license
    images = [image["path"] for image in facts.images]
    files = sorted({*publishable_files(root), *images, CARD})
    own_card = root / CARD
    if own_card.exists():
        card = own_card.read_text(encoding="utf-8")
        if license is not None:
            logger.warning("license=%s is not used: %s is uploaded as it is, so state it there", license, own_card)
    elif (root / "model_index.json").exists():
        card = render_pipeline_card(facts, repo_id=repo_id, files=files)
    else:
        card = render_autoencoder_card(facts, repo_id=repo_id, files=files)
    _refuse_tokens(root, files)
    return files, card


def publishable_files(root: Path) -> list[str]:
    """Weights, configs, statistics, curves and the components' folders; neither checkpoints nor logs nor *.tmp.

    Raises ValueError where there is no saved model at the root or one of a pipeline's components is missing.
    """
    if not root.is_dir():
        raise ValueError(f"there is no directory {root}")
    found = _matching(root, root, ROOT_FILES)
    components = list(EXTRA_COMPONENTS)
    if "model_index.json" in found:
        index = _read_json(root / "model_index.json")
        saved = [name for name, value in index.items() if name[0] != "_" and isinstance(value, list) and all(value)]
        components += saved
        missing = [name for name in saved if not (root / name).is_dir()]
        if missing:
            raise ValueError(f"{root} lacks the folders {', '.join(missing)} that its model_index.json names")
    elif "config.json" not in found or not any(path.endswith(".safetensors") for path in found):
        raise ValueError(f"{root} holds no saved model (model_index.json, or config.json and *.safetensors)")
    nested = [f"{component}/{extra}" for component in components for extra in EXTRA_COMPONENTS]
    for component in components + nested:
        found += _matching(root, root / component, COMPONENT_FILES)
    return found


def _push(
    root: Path, repo_id: str, private: bool, revision: str | None, message: str | None, license: str | None
) -> str:
    """One commit, so that nobody ever downloads half of a push; returns its address."""
    api = HfApi()
    if "/" not in repo_id:
        repo_id = f"{api.whoami()['name']}/{repo_id}"
    files, card = prepare_push(root, repo_id, license=license)
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    operations = [CommitOperationAdd(path, card.encode() if path == CARD else str(root / path)) for path in files]
    message = message or f"Upload {root.resolve().name}"
    return api.create_commit(repo_id, operations, commit_message=message, revision=revision).commit_url


def _facts_of(root: Path) -> RunFacts:
    """run_facts.json, with what the saved model says about itself in place of what was noted earlier.

    The latent store's statistics are often written into the config after training, so the config is asked last.
    """
    facts = read_run_facts(root / FACTS) if (root / FACTS).exists() else RunFacts()
    is_pipeline = (root / "model_index.json").exists()
    vae = root / "vae" if is_pipeline else root
    config = _read_json(vae / "config.json")
    facts.model_class = config.get("_class_name", facts.model_class)
    facts.padding_mode = config.get("padding_mode", facts.padding_mode)
    facts.normalization = _normalization(config, vae / STATISTICS) or facts.normalization
    if is_pipeline:
        facts.num_classes = _read_json(root / "transformer/config.json").get("num_classes", facts.num_classes)
        names = parse_id2label(_read_json(root / "model_index.json").get("id2label"), facts.num_classes)
        facts.labels = [names[key][0] for key in sorted(names)] or facts.labels
    facts.images = [image for image in facts.images if _is_image(root, image["path"])]
    return facts


def _normalization(config: dict[str, Any], statistics: Path) -> dict[str, Any]:
    """The normalisation in an autoencoder's config; num_samples where mean_std.json belongs to the same mean."""
    names = {"mean": "latents_mean", "std": "latents_std", "scaling_factor": "scaling_factor"}
    names |= {"shift_factor": "shift_factor"}
    found = {name: config[key] for name, key in names.items() if config.get(key) is not None}
    measured = _read_json(statistics)
    mean, noted = found.get("mean"), measured.get("latents_mean")
    if mean and noted and len(mean) == len(noted) and all(map(math.isclose, mean, noted)):
        found["num_samples"] = measured.get("num_samples")
    return {name: value for name, value in found.items() if value is not None}


def _is_image(root: Path, path: str) -> bool:
    target = (root / path).resolve()
    if target.is_file() and target.is_relative_to(root.resolve()):
        return True
    logger.warning("The image %s is not a file below %s and is left out of the card", path, root)
    return False


def _refuse_tokens(root: Path, files: Sequence[str]) -> None:
    token = huggingface_hub.get_token()
    if token is None:
        return
    for path in files:
        file = root / path
        if file.suffix in TEXT_SUFFIXES and file.exists() and token in file.read_text(encoding="utf-8"):
            raise ValueError(f"{file} holds your access token and would publish it; take it out first")


def _reason(error: Exception) -> str:
    """What went wrong, in one line."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if isinstance(error, OfflineModeIsEnabled):
        text = "HF_HUB_OFFLINE is set"
    elif status in (401, 403):
        text = f"the Hub refused the access token (status {status}); log in with `hf auth login` or set HF_TOKEN"
    elif type(error).__module__.startswith("httpx"):
        text = f"{HfApi().endpoint} does not answer ({type(error).__name__}: {error})"
    else:
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return " ".join(redact(text).split())[:400].rstrip(".")


def _matching(root: Path, folder: Path, patterns: Sequence[str]) -> list[str]:
    """Relative paths of the files directly in a folder that match one of the patterns."""
    files = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return sorted(file.relative_to(root).as_posix() for file in files)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
