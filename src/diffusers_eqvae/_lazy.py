"""Public faces: a package names what its users import, and imports a module when one of its names is asked for."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def face(
    package: str, members: Mapping[str, Sequence[str]], *, hint: str = ""
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package; its submodules are attributes too.

    Args:
        package: its `__name__`.
        members: submodule -> the names that users import from it; ".name" is a module beside the package.
        hint: what the error says about a class that is not there.
    """
    home = {name: module for module, names in members.items() for name in names}

    def load(name: str) -> Any:
        if name in home:
            value = getattr(importlib.import_module(f".{home[name]}", package), name)
            setattr(sys.modules[package], name, value)
            return value
        may_be_module = name.isidentifier() and not name.startswith("_")
        if may_be_module and importlib.util.find_spec(f"{package}.{name}") is not None:
            return importlib.import_module(f"{package}.{name}")
        sentence = f" {hint}" if name[:1].isupper() else ""
        raise AttributeError(f"module {package!r} has no attribute {name!r}.{sentence}", name=name)

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home})

    return load, listed, sorted(home)


def registered(folder: str) -> dict[str, list[str]]:
    """Module -> the classes that its file registers as members of a room; read, and not imported."""
    pattern = re.compile(r"^@register_\w+\(\"\w+\"\)\nclass (\w+)", re.MULTILINE)
    return {path.stem: pattern.findall(path.read_text("utf-8")) for path in sorted(Path(folder).glob("[a-z]*.py"))}
