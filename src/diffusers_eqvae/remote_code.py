"""Saved models and pipelines that open where this package is not installed: their code beside their weights.

diffusers runs code of a repository for who passes trust_remote_code=True. What it runs is a generated file that holds
the sources of the classes a saved directory names and of all that they import, word for word, and imports them as a
package of its own; the directory's model_index.json and config.json name that file. Weights are not touched.

    pipeline = DiffusionPipeline.from_pretrained(DIRECTORY, trust_remote_code=True)
    transformer = AutoModel.from_pretrained(DIRECTORY, subfolder="transformer", trust_remote_code=True)
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .files import read_json, strict_json

LIBRARY = __name__.partition(".")[0]
HOME = Path(__file__).parent
CODE = "eqvae_code"
FILE = f"{CODE}.py"
HEAD = '''"""Code of {names}, generated from {library} {version}; read it there with its comments and tests.

It is imported as a package of its own, so that it neither needs nor disturbs an installed {library}.
"""

import importlib
import importlib.abc
import importlib.util
import sys

PACKAGE = "{package}"
'''
TAIL = '''

class _Sources(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Finds the modules of PACKAGE in SOURCES."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == PACKAGE or fullname.startswith(PACKAGE + "."):
            return importlib.util.spec_from_loader(fullname, self, is_package=self.is_package(fullname))
        return None

    def is_package(self, fullname):
        return self._name(fullname) not in SOURCES

    def get_source(self, fullname):
        return SOURCES.get(self._name(fullname), "")

    def _name(self, fullname):
        return fullname[len(PACKAGE) + 1 :]


if PACKAGE not in sys.modules:
    sys.meta_path.append(_Sources())
for _name, _module in CLASSES.items():
    globals()[_name] = getattr(importlib.import_module(PACKAGE + "." + _module), _name)
'''


def with_code(root: Path) -> dict[str, bytes]:
    """The files that a copy of a saved model or pipeline has to have, or to have in another form: path -> content.

    Raises:
        ValueError: none of its classes is this package's, so that it opens anywhere; or one is an extension's.
    """
    files: dict[str, bytes] = {}
    homes: dict[str, str] = {}
    index = read_json(root / "model_index.json") if (root / "model_index.json").exists() else {}
    folders = [name for name, entry in index.items() if isinstance(entry, list) and (root / name).is_dir()]
    for folder in folders or [""]:
        path = Path(folder) / "config.json"
        config = read_json(root / path) if (root / path).exists() else {}
        name = str(index[folder][1] if folder else config.get("_class_name"))
        if (folder and index[folder][0] != LIBRARY) or not _is_ours(name):
            continue
        homes[name] = _home(name)
        files[str(Path(folder) / FILE)] = b""
        if folder:
            index[folder] = [CODE, name]
        if config:
            config.pop("_name_or_path", None)  # a folder of whoever saved it
            files[str(path)] = _json(config | {"auto_map": {"AutoModel": f"{CODE}.{name}"}})
    if _is_ours(str(index.get("_class_name"))):
        name = index["_class_name"]
        homes[name] = _home(name)
        index["_class_name"] = [CODE, name]
        files[FILE] = b""
    if index:
        # For AutoModel, which reads this index alone; the transformer is the one that is opened by itself.
        trained = index.get("transformer", [None, None])
        index |= {"auto_map": {"AutoModel": ".".join(trained)}} if trained[0] == CODE else {}
        index.pop("_name_or_path", None)
        files["model_index.json"] = _json(index)
    if not homes:
        raise ValueError(
            f"{root} holds no class of {LIBRARY}: it opens with diffusers alone and needs no code beside it."
        )
    code = bundle(homes).encode()
    return {path: content or code for path, content in files.items()}


def copy_with_code(root: Path, destination: Path) -> None:
    """A copy of a saved model or pipeline with its code; weights are linked where the file system allows it.

    Raises:
        ValueError: as `with_code`; `destination` holds something.
    """
    if destination.exists() and any(destination.iterdir()):
        raise ValueError(f"{destination} exists already; choose another directory, or remove it.")
    files = with_code(root)
    shutil.copytree(root, destination, copy_function=_link, dirs_exist_ok=True)
    for path, content in files.items():
        (destination / path).unlink(missing_ok=True)  # it may be a link to the original
        (destination / path).write_bytes(content)


def bundle(classes: Mapping[str, str]) -> str:
    """The generated file: class name -> module of this package that has it.

    Example:
        >>> code = bundle({"SiTTransformer2DModel": "models.transformer_sit"})
    """
    sources = {name: (HOME / _path(name)).read_text("utf-8") for name in sorted(_needed(classes.values()))}
    digest = hashlib.sha256("\0".join(word for pair in sources.items() for word in pair).encode()).hexdigest()
    version = getattr(importlib.import_module(LIBRARY), "__version__", "")
    head = HEAD.format(
        names=", ".join(classes), library=LIBRARY, version=version, package=f"{LIBRARY}_code_{digest[:12]}"
    )
    lines = ["SOURCES = {"]
    for name, text in sources.items():
        # Line by line in quotes: diffusers looks for lines that begin with an import, and would look for the modules.
        lines += [f"    {name!r}: (", *(f"        {line!r}" for line in text.splitlines(keepends=True)), "    ),"]
    return head + f"CLASSES = {dict(classes)!r}\n" + "\n".join([*lines, "}"]) + TAIL


def _needed(modules: Iterable[str]) -> set[str]:
    """The modules, and all modules of the package that these import."""
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += _imports(name)
    return found


def _imports(name: str) -> Iterator[str]:
    """What a module imports of the package, which is always relative: `from ..flow import x`, `from . import flow`."""
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse((HOME / _path(name)).read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            source = [*base, *(node.module or "").split(".")] if node.module else base
            for entry in node.names:
                inside = ".".join([*source, entry.name])
                yield inside if (HOME / _path(inside)).is_file() else ".".join(source)


def _path(module: str) -> Path:
    return Path(*module.split(".")).with_suffix(".py")


def _is_ours(name: str) -> bool:
    found = getattr(importlib.import_module(LIBRARY), name, None)
    return found is not None and found.__module__.partition(".")[0] == LIBRARY


def _home(name: str) -> str:
    module = str(getattr(importlib.import_module(LIBRARY), name).__module__).partition(".")[2]
    if not (HOME / _path(module)).is_file():
        raise ValueError(
            f"The class {name} comes from an extension, {module}, which is not published for others to run."
        )
    return module


def _json(content: Mapping[str, Any]) -> bytes:
    return (strict_json(content) + "\n").encode()


def _link(source: str, destination: str) -> None:
    try:
        os.link(source, destination)
    except OSError:
        shutil.copy2(source, destination)
