"""Fetches to the Hub's cache what a command or a preset reads there, for machines without a network."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile

import eqvae_command

from ..models.backbone import backbones
from ..options import options_of
from ..pretrained import hub_silence
from ..templates import is_hub_id
from ..training_utils import command_line
from . import command_parser

EPILOG = """
  eqvae prefetch train-autoencoder autoencoder_taesd_cpu
  eqvae prefetch train-transformer sit_xl_2 --regularizers repa --vae stabilityai/sd-vae-ft-mse
  eqvae prefetch facebook/dinov2-base madebyollin/taesd

The words after COMMAND are those that it will be started with; what it requires besides may be left out.
"""
WEIGHTS = re.compile(
    r"(?:pytorch_|diffusion_pytorch_)?model(?P<variant>\.[^./]+?)?(-\d{5}-of-\d{5})?\.(?P<kind>safetensors|bin)"
)
TEXT_SUFFIXES = (".json", ".txt", ".model")
DATASETS = "dataset_name"


@dataclass(frozen=True)
class Needed:
    """One repository that is read, and what of it.

    Args:
        whose: the option that names it.
        whole: all components where it is a pipeline; else its autoencoder alone.
    """

    whose: str
    name: str
    whole: bool = False

    @property
    def is_dataset(self) -> bool:
        return self.whose == DATASETS


def needed_by(words: Sequence[str]) -> tuple[list[Needed], dict[str, Any]]:
    """What COMMAND [PRESET] [--flag value ...] reads on the Hub, and the values of all its options.

    Raises:
        ValueError: a command that reads no options of this kind; a preset or a flag that it does not have.

    Example:
        >>> needed_by(["encode-latents", "--vae", "madebyollin/taesd"])[0]
        [Needed(whose='vae', name='madebyollin/taesd', whole=False)]
    """
    name, *words = words
    words = words[words.index("--") + 1 :] if "--" in words else words
    command = eqvae_command.list_commands()[name]
    main = importlib.import_module(command.module).main
    if not command.is_script and main.__globals__.get("parse") is not command_line.parse:
        raise ValueError(f"eqvae {name} has no options that name models; give their names: eqvae prefetch NAME ...")
    kinds, values = command_line.look_at(main, words)
    needed = []
    for kind in kinds:
        for option, entry in options_of(kind).items():
            given = values[option] if entry.reads else None
            for each in given if isinstance(given, list) else filter(None, [given]):
                repository = each.rpartition("=")[2]
                if is_hub_id(repository) and repository not in backbones() and not Path(repository).exists():
                    needed.append(Needed(option, repository, entry.field.metadata["reads"] == "pipeline"))
    return needed, values


def files_of(sizes: Mapping[str, int], *, whole: bool) -> list[str]:
    """Of a repository's files those that loading a model takes: configs, and weights in one format and variant.

    Args:
        sizes: path of every file -> bytes.
        whole: see `Needed`.

    Example:
        >>> files_of({"config.json": 1, "model.safetensors": 2, "pytorch_model.bin": 2, "README.md": 1}, whole=True)
        ['config.json', 'model.safetensors']
    """
    pipeline = "model_index.json" in sizes
    folders: dict[str, list[re.Match[str]]] = {}
    kept = []
    for path in sizes:
        folder, _, file = path.rpartition("/")
        if pipeline and not whole and folder and folder.partition("/")[0] not in ("vae", "alignment_network"):
            continue
        match = WEIGHTS.fullmatch(file)
        if match:
            folders.setdefault(folder, []).append(match)
        elif file.endswith(TEXT_SUFFIXES):
            kept.append(path)
    for folder, matches in folders.items():
        kind = "safetensors" if any(match["kind"] == "safetensors" for match in matches) else "bin"
        matches = [match for match in matches if match["kind"] == kind]
        plain = [match for match in matches if not match["variant"]] or matches
        kept += [f"{folder}/{match[0]}".lstrip("/") for match in plain]
    return sorted(kept)


def fetch(needed: Needed, values: Mapping[str, Any], *, dry_run: bool) -> str:
    """Fetches it, unless `dry_run`, and says what and how large.

    Raises:
        OSError: there is no such repository, or it may not be read.
    """
    kind = "dataset" if needed.is_dataset else "model"
    entries = HfApi().list_repo_tree(needed.name, recursive=True, repo_type=kind)
    sizes = {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}
    files = list(sizes) if needed.is_dataset else files_of(sizes, whole=needed.whole)
    there = [file for file in files if isinstance(try_to_load_from_cache(needed.name, file, repo_type=kind), str)]
    if not dry_run and needed.is_dataset:
        from ..data.hf_datasets import load_table  # builds what `datasets` reads without a network

        options = {"config_name": "dataset_config_name", "split": "split", "cache_dir": "cache_dir"}
        load_table(needed.name, **{key: values[name] for key, name in options.items() if values.get(name)})
    elif not dry_run:
        snapshot_download(needed.name, allow_patterns=files)
    size = sum(sizes[file] for file in files)
    present = f", {len(there)} of them in the cache" if there else ""
    return f"{needed.whose}: {needed.name}, {len(files)} files, {megabytes(size)}{present}"


def megabytes(size: int) -> str:
    """Bytes in MB.

    Example:
        >>> megabytes(334643276)
        '334.6 MB'
    """
    return f"{size / 1e6:.1f} MB"


def main(argv: Sequence[str]) -> int:
    parser = command_parser("prefetch", __doc__, epilog=f"examples:\n{EPILOG}")
    parser.add_argument("--dry_run", action="store_true", help="say what would be fetched")
    parser.add_argument("command", metavar="COMMAND", help="a command of eqvae, or the name of a repository")
    parser.add_argument("words", metavar="WORD", nargs=argparse.REMAINDER, help="what follows it")
    options = parser.parse_args(argv)
    words: list[str] = [options.command, *options.words]
    values: dict[str, Any] = {}
    if options.command in eqvae_command.list_commands():
        needed, values = needed_by(words)
    else:
        if unknown := [word for word in words if not is_hub_id(word)]:
            raise ValueError(f"{unknown[0]} is neither a command of eqvae nor the name of a repository (OWNER/NAME).")
        needed = [Needed("model", word, whole=True) for word in words]
    if not needed:
        print("Nothing: all that this reads is here, or is no repository.")
        return 0
    if why := hub_silence():
        raise OSError(
            f"The Hub cannot be asked ({why}); run this where there is a network, and without HF_HUB_OFFLINE."
        )
    failed = 0
    for each in dict.fromkeys(needed):
        try:
            print(fetch(each, values, dry_run=options.dry_run))
        except HfHubHTTPError as error:
            failed += 1
            why = error.server_message or " ".join(str(error).split())
            print(f"{each.whose}: {each.name} is neither here nor on the Hub, or may not be read: {why}")
    if not options.dry_run and not failed:
        print(f"All of it is in {constants.HF_HUB_CACHE}; copy that, or set HF_HOME to it, and HF_HUB_OFFLINE=1.")
    return 1 if failed else 0
