"""Presets: YAML files of flags, a user's own and those that are installed beside a script."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..options import options_of
from .option_parser import nearest

FOLDER = "configs"
BASE = "base"  # the one key that is not a flag


def installed_presets(script: str, keys: Collection[str]) -> dict[str, Path]:
    """Name -> file of the presets in configs/ beside a script that say nothing which the script does not know.

    Args:
        script: its file.
        keys: the options that it may have.

    Example:
        >>> list(installed_presets("training/train_autoencoder.py", AUTOENCODER_OPTIONS))
        ['autoencoder_taesd_cpu', 'vqgan_f16']
    """
    files = sorted((Path(script).parent / FOLDER).glob("*.yaml"))
    return {path.stem: path for path in files if set(read_preset(path)) <= set(keys)}


def find_preset(word: str, list_installed: Callable[[], Mapping[str, Path]]) -> Path:
    """The preset that a command line begins with: the file `word`, `word`.yaml, or the installed one of that name.

    Raises:
        ValueError: there is none; says which are installed, and the nearest.
    """
    for path in (Path(word), Path(f"{word}.yaml")):
        if path.is_file():
            return path
    name, installed = word.removesuffix(".yaml"), list_installed()
    if name in installed:
        return installed[name]
    likest = nearest(name, list(installed)) if installed else None
    known = f"those of this script are {', '.join(installed)}" if installed else "this script has none of its own"
    hint = f"; did you mean {likest}?" if likest else "."
    raise ValueError(
        f"The preset {word} does not exist: no file here is called {word} or {word}.yaml, and {known}{hint}"
    )


def read_preset(path: Path) -> dict[str, Any]:
    """The flags of a preset: its own, over those of the preset beside it that it names as its `base`.

    Raises:
        ValueError: it is not YAML, not a flat mapping, or names an extension; its base is absent or has one itself.
    """
    content = _content(path)
    base = content.pop(BASE, None)
    if base is None:
        return content
    beside = {other.stem: other for other in path.parent.glob("*.yaml")}
    if base not in list(beside):  # a list of words cannot be looked up
        raise ValueError(f"The preset {path} has the base {base}, and no {base}.yaml lies beside it.")
    below = _content(beside[base])
    if BASE in below:
        raise ValueError(f"The preset {path} has the base {base}, which has one itself: {below[BASE]}. Name that one.")
    return below | content


def _content(path: Path) -> dict[str, Any]:
    """What one file says."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(
            f"The preset {path} is not YAML: {' '.join(str(error).split())}. Write one `flag: value` a line."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"A preset must map flag names to values; {path} holds a {type(content).__name__}.")
    for key, value in content.items():
        if key == "extension":
            raise ValueError(f"The preset {path} names an extension; code is loaded from the command line only.")
        nested = any(isinstance(each, list | dict) for each in value) if isinstance(value, list) else False
        if isinstance(value, dict) or nested:
            raise ValueError(f"The value of {key!r} in the preset {path} must be a scalar or a list of scalars.")
    return content


def located(preset: Mapping[str, Any], folder: Path, kinds: Iterable[type]) -> dict[str, Any]:
    """The flags, with the paths in them taken from the preset's folder.

    A file that lies there is meant wherever it is named; a folder by the options of `kinds` that say what is read, in
    NAME=PATH words too. All else is left as it is: the name of a model may look like a path.
    """
    reading = {name for kind in kinds for name, option in options_of(kind).items() if option.reads}
    return {key: _beside(folder, value, key in reading) for key, value in preset.items()}


def _beside(folder: Path, value: Any, reading: bool) -> Any:
    if isinstance(value, list):
        return [_beside(folder, item, reading) for item in value]
    if not isinstance(value, str) or "\0" in value:
        return value
    name, equals, path = value.rpartition("=") if reading else ("", "", value)
    there = folder / path
    found = path and (there.exists() if reading else there.is_file())
    return f"{name}{equals}{there}" if found else value
