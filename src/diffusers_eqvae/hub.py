"""Publish a finished run on the Hub, with its model card, by a push whose failure never costs the run.

The access token is huggingface_hub's own business (`hf auth login`, or HF_TOKEN): it is never an argument here and
never part of a log line, a file or a card.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import validate_repo_id
from PIL import Image

from .classes import listed, parse_id2label
from .data.latent_format import MANIFEST
from .data.latent_store import LatentStore
from .directories import written_names
from .files import read_json, read_weights, strict_json
from .model_card import METADATA_FILE, RunMetadata, redact, render_model_card, without_folders
from .remote_code import with_code as with_sources
from .store_card import is_store, render_store_card

__all__ = ["prepare_push", "push_run"]

logger = logging.getLogger(__name__)

CARD = "README.md"
STATISTICS = "mean_std.json"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
# Of the run and of each component's folder these and the weights are uploaded, and nothing else.
UPLOADED = ("model_index.json", "config.json", "scheduler_config.json", "adapter_config.json", STATISTICS)
UPLOADED_OF_RUN = (METADATA_FILE, "metrics.jsonl", MANIFEST, CARD)
# Where diffusers notes the path that a model or a pipeline was loaded from.
CONFIGS = ("config.json", "model_index.json", "scheduler_config.json")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
HubImages = Literal["none", "validation"]
CODE_BRANCH = "code"


def push_run(
    output_dir: str | Path,
    repo_id: str | None,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    license: str | None = None,
    hub_images: HubImages | None = None,
    with_code: bool = False,
) -> bool:
    """Publishes a run's directory as one commit and says whether that worked; call it on the main process only.

    A directory without a model and a name that no repository can have are logged with the reason alone, whatever else
    goes wrong (no network, a refused token) with the command that tries again. Nothing in `output_dir` is written or
    removed: a failing push never costs a run.

    Args:
        output_dir: a finished run: an autoencoder, or a pipeline where there is a model_index.json; or a latent store,
            which becomes a data set.
        repo_id: "name" or "owner/name", default the directory's; the repository is created where it does not exist.
        private: makes a new repository private; otherwise the owner's default holds.
        revision: branch to commit to, created where it does not exist; default main.
        commit_message: default "Upload NAME".
        license: the licence that the card states; default the one in run_metadata.json, else none.
        hub_images: "validation" shows the run's images on the card, "none" shows none; default: those that show
            nothing of a local folder. What is shown and what is left out is logged before anything is uploaded.
        with_code: also commit it to the branch "code", with the sources of its classes beside the weights: that branch
            opens by trust_remote_code=True where this package is not installed.

    Example:
        >>> push_run("runs/eq-vae", "me/eq-vae", private=True)  # doctest: +SKIP
        True
    """
    root = Path(output_dir)
    repo_id = repo_id or root.resolve().name
    try:
        validate_repo_id(repo_id)
        saved_files(root)
        if with_code and is_store(root):
            raise ValueError("a latent store has no code to publish beside it; leave with_code out")
    except Exception as error:
        logger.error(redact(f"Could not push {root} to {repo_id}: {_one_line(error)}."))
        return False
    try:
        api = HfApi()
        name = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
        files, card = prepare_push(root, name, license=license, hub_images=hub_images)
        contents = {path: card.encode() if path == CARD else _published(root, path) for path in files}
        branches: dict[str | None, dict[str, Any]] = {revision: contents}
        if with_code:
            branches[CODE_BRANCH] = {**contents, **with_sources(root)}
        kind = "dataset" if is_store(root) else "model"
        api.create_repo(name, repo_type=kind, private=private or None, exist_ok=True)
        message = commit_message or f"Upload {root.resolve().name}"
        for branch, added in branches.items():
            if branch is not None:
                api.create_branch(name, branch=branch, repo_type=kind, exist_ok=True)
            # Not upload_folder, which would need the card on disk. One commit: nobody downloads half of a push.
            operations = [CommitOperationAdd(path, content) for path, content in added.items()]
            commit = api.create_commit(name, operations, commit_message=message, revision=branch, repo_type=kind)
    except Exception as error:
        options = {"hub_model_id": repo_id, "revision": revision, "commit_message": commit_message, "license": license}
        options |= {"hub_images": hub_images}
        command = ["eqvae", "push", str(root)]
        command += [word for key, value in options.items() if value is not None for word in (f"--{key}", value)]
        command += ["--private"] if private else []
        command += ["--with_code"] if with_code else []
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
    output_dir: str | Path,
    repo_id: str | None = None,
    *,
    license: str | None = None,
    hub_images: HubImages | None = None,
) -> tuple[list[str], str]:
    """The files of a run that a push uploads (relative paths, README.md among them) and the model card.

    A README.md in the directory is taken as it is; otherwise the card is rendered from run_metadata.json and from what
    the saved model itself says (normalisation, class, number of classes). `hub_images` as in `push_run`.

    Raises:
        ValueError: weights that are damaged or not finite; a file that holds the access token, or lies outside the
            directory (through a link, or by a name in model_index.json or run_metadata.json); an image that is none.

    Example:
        >>> files, card = prepare_push("runs/eq-vae", "me/eq-vae", license="apache-2.0")  # doctest: +SKIP
    """
    root = Path(output_dir)
    if repo_id is not None:
        validate_repo_id(repo_id)
    saved = saved_files(root)
    metadata = _metadata_of(root, hub_images)
    if license is not None:
        metadata.model["license"] = license
    files = sorted({*saved, *(image["path"] for image in metadata.evaluation.get("images", [])), CARD})
    token = huggingface_hub.get_token()
    for file in (root / path for path in files):
        if token and file.exists() and _holds(file, token.encode()):
            raise ValueError(f"{file} holds your access token and would publish it; remove it first")
    for file in (root / path for path in saved if path.endswith(".safetensors") and not is_store(root)):
        if broken := [name for name, tensor in read_weights(file).items() if not tensor.isfinite().all()]:
            raise ValueError(f"{file} holds NaN or infinity ({listed(broken)}); push an earlier checkpoint's weights")
    if (root / CARD).exists():
        if license is not None:
            logger.warning("license=%s is not used: %s is uploaded as it is, so state it there", license, root / CARD)
        return files, (root / CARD).read_text(encoding="utf-8")
    if is_store(root):
        size = sum((root / file).stat().st_size for file in saved)
        return files, render_store_card(root, repo_id=repo_id, license=license, size_bytes=size)
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
    named: list[str] = []
    if is_store(root):
        LatentStore(root)  # refuses what is damaged
    elif (root / "model_index.json").exists():
        named = _named_components(root)
        if missing := [name for name in named if not (root / name).is_dir()]:
            raise ValueError(f"{root} lacks the folders {', '.join(missing)} that its model_index.json names")
    elif not (root / "config.json").exists() or not any(root.glob("*.safetensors")):
        raise ValueError(
            f"{root} does not hold a saved model (model_index.json, or config.json and *.safetensors) nor a finished "
            f"latent store ({MANIFEST})"
        )
    found = {root / name for name in UPLOADED_OF_RUN}
    for folder in (root, *_components(root)):
        found |= {folder / name for name in UPLOADED} | {file for pattern in WEIGHTS for file in folder.glob(pattern)}
    saved = sorted(file.relative_to(root).as_posix() for file in found if os.path.lexists(file))
    if (written := written_names(root)) is not None:
        known = {*written, *named, *UPLOADED, *UPLOADED_OF_RUN}
        foreign = [path for path in saved if path.partition("/")[0] not in known]
        saved = [path for path in saved if path not in foreign]
        if foreign:
            logger.warning("%s did not write %s, which stays here.", root, listed(foreign))
    for path in saved:
        _require_inside(root, path)
    return saved


def _named_components(root: Path) -> list[str]:
    """The folders that model_index.json names: [library, class] each, and [null, null] where one is left out.

    Raises:
        ValueError: a component that loading would not see as one, or a name that is not that of a folder in there.
    """
    index, named = root / "model_index.json", []
    for name, value in read_json(index).items():
        if name.startswith("_"):
            continue
        if not name.isidentifier():
            raise ValueError(f"{index} names {name!r}, which is not the name of a folder beside it")
        if value == [None, None]:
            continue
        pair = isinstance(value, list) and len(value) == 2 and all(isinstance(word, str) for word in value)
        if pair:
            named.append(name)
        elif isinstance(value, list) or (root / name).exists():
            raise ValueError(
                f"{index} must say [library, class] of the component {name}, or it could not be loaded; got {value!r}"
            )
    return named


def _require_inside(root: Path, path: str) -> None:
    """Refuses what is not a file of the run: what a link or a name leads to elsewhere, a pipe, a link to nothing."""
    target = (root / path).resolve()
    if not target.is_relative_to(root.resolve()):
        raise ValueError(
            f"{root / path} leads to {target}, outside the run, and would publish it; copy it or remove it"
        )
    if not target.is_file():
        raise ValueError(f"{root / path} is not a file that can be read; replace or remove it")


def _holds(file: Path, content: bytes) -> bool:
    """Whether these bytes lie anywhere in a file, which may be larger than memory."""
    if not file.stat().st_size:
        return False
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return mapped.find(content) >= 0


def _published(root: Path, path: str) -> str | bytes:
    """A file to upload, or its content without the folder that a model came from."""
    if Path(path).name not in CONFIGS:
        return str(root / path)
    content = read_json(root / path)
    source = content.get("_name_or_path")
    if not isinstance(source, str) or without_folders(source) == source:
        return str(root / path)
    return strict_json(content | {"_name_or_path": without_folders(source)}).encode()


def _components(folder: Path) -> Iterator[Path]:
    """The folders of diffusers components (vae/, discriminator/) and of theirs (vae/alignment_network/)."""
    for config in sorted(folder.glob("*/*config.json")):
        if config.name in UPLOADED and not (config.parent / METADATA_FILE).exists():
            yield config.parent
            yield from _components(config.parent)


def _metadata_of(root: Path, hub_images: HubImages | None) -> RunMetadata:
    """run_metadata.json, with what the saved model says about itself in place of what was noted earlier.

    The latent store's statistics are often written into the config after training, so the config is asked last.
    """
    noted = RunMetadata.load(root / METADATA_FILE) if (root / METADATA_FILE).exists() else RunMetadata()
    index = _read(root / "model_index.json")
    vae = root / "vae" if index else root
    config = _read(vae / "config.json")
    model = {"class": config.get("_class_name"), "padding_mode": config.get("padding_mode")}
    model["normalization"] = _normalization(config, vae / STATISTICS)
    if index:
        trained = _read(root / "transformer" / "config.json")
        model["num_classes"] = trained.get("num_classes")
        named = index.get("id2label") or trained.get("id2label")
        names = parse_id2label(named, model["num_classes"] or noted.model.get("num_classes"))
        model["labels"] = [names[key][0] for key in sorted(names)]
    model = noted.model | {key: value for key, value in model.items() if value}
    images = _shown_images(root, noted.evaluation.get("images", []), hub_images)
    return replace(noted, model=model, evaluation={**noted.evaluation, "images": images})


def _shown_images(root: Path, noted: list[dict[str, Any]], hub_images: HubImages | None) -> list[dict[str, Any]]:
    """Those of run_metadata.json that the card shows; what is shown and what is not is logged."""
    there = [image for image in noted if (root / str(image["path"])).exists()]
    for image in there:
        _require_image(root, str(image["path"]))
    private = [image for image in there if image.get("private", True)]
    left_out = {"none": there, "validation": [], None: private}[hub_images]
    shown = [image for image in there if image not in left_out]
    for images, what in ((shown, "shows"), (left_out, "leaves out")):
        if images:
            logger.info("The card %s %s (hub_images).", what, ", ".join(str(image["path"]) for image in images))
    if hub_images is None and left_out:
        logger.info("They may show images of a local folder; hub_images='validation' publishes them.")
    for image in noted:
        if image not in there:
            logger.warning("The image %s is not a file below %s and is left out of the card", image["path"], root)
    return shown


def _require_image(root: Path, path: str) -> None:
    _require_inside(root, path)
    try:
        if Path(path).suffix.lower() not in IMAGE_SUFFIXES:
            raise ValueError(f"its name must end in {', '.join(IMAGE_SUFFIXES)}")
        with Image.open(root / path) as image:
            image.verify()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{root / path}, which {METADATA_FILE} calls an image, is not one: {error}") from error


def _normalization(config: dict[str, Any], statistics: Path) -> dict[str, Any]:
    """The normalisation in an autoencoder's config; num_samples where mean_std.json belongs to the same mean."""
    keys = ("latents_mean", "latents_std", "scaling_factor", "shift_factor")
    found = {key.removeprefix("latents_"): config.get(key) for key in keys}
    measured = _read(statistics)
    if any(isinstance(each, list) for each in found["mean"] or []):  # by position (RAE): as the run noted it
        return {}
    mean, noted = found["mean"], measured.get("latents_mean")
    if mean and noted and len(mean) == len(noted) and all(map(math.isclose, mean, noted)):
        found["num_samples"] = measured.get("num_samples")
    return {name: value for name, value in found.items() if value is not None}


def _one_line(error: Exception) -> str:
    text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:400].rstrip(".")


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
