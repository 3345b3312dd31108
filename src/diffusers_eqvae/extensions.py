"""How a room finds its members, and how a file outside the package adds one.

A room is a package whose modules each hold one member of a kind: an objective, a regularizer, a converter, a metric.
Its `Registry` lists the folder for the names (module `equivariance` is the regularizer "equivariance") and imports a
module when its member is asked for. A file of yours adds another with the same decorator,

    from diffusers_eqvae.regularizers import AutoencoderRegularizer, register_regularizer

    @register_regularizer("my_method")
    class MyMethod(AutoencoderRegularizer): ...

and is loaded with `--extension my_method.py` in every script and command, or with `load_extension("my_method.py")`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Generic, TypeVar

from .provenance import hash_file

T = TypeVar("T", bound=type)

PARENT = __name__
NOT_MEMBERS = ("base",)
_REGISTRIES: list[Registry] = []
_LOADED: dict[str, Extension] = {}


class Registry(Generic[T]):
    """The members of one kind by name: those of the package's folder, and those that extensions added.

    A member may carry `Arguments`, a dataclass of its command-line flags, and `prefixes`, what their names begin with;
    without `prefixes` every field begins with the member's name.

    Args:
        kind: what a member is called in messages, e.g. "regularizer".
        package: dotted name of the folder, e.g. "diffusers_eqvae.regularizers".

    Example:
        >>> REGULARIZERS = Registry("regularizer", "diffusers_eqvae.regularizers")
        >>> REGULARIZERS.names()
        ('alignment', 'equivariance')
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind, self.package = kind, package
        self._members: dict[str, T] = {}
        _REGISTRIES.append(self)

    def register(self, name: str) -> Callable[[T], T]:
        """Class decorator that makes a class the member `name`.

        Raises:
            ValueError: the name or one of its flags belongs to another member; both owners are named.

        Example:
            >>> @REGULARIZERS.register("my_method")
            ... class MyMethod(AutoencoderRegularizer): ...
        """

        def add(cls: T) -> T:
            owner = self._members.get(name)
            if owner is None and name in self._own_names() and not cls.__module__.startswith(f"{self.package}."):
                owner = self[name]
            if owner is not None and _identity(owner) != _identity(cls):
                raise ValueError(
                    f"The {self.kind} {name!r} of {cls.__module__} cannot be registered: {owner.__module__} has "
                    "taken that name. Choose another name."
                )
            self._check_flags(name, cls)
            self._members[name] = cls
            return cls

        return add

    def names(self) -> tuple[str, ...]:
        """Every member's name, sorted; imports none of them."""
        return tuple(sorted({*self._own_names(), *self._members}))

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __getitem__(self, name: str) -> T:
        """The member of that name.

        Raises:
            ValueError: there is none; says which there are.
        """
        if name not in self._members and name in self._own_names():
            importlib.import_module(f"{self.package}.{name}")
        if name not in self._members:
            raise ValueError(
                f"There is no {self.kind} {name!r}; there are {', '.join(self.names()) or 'none'}. One of your own is "
                "loaded from its file (--extension FILE, or diffusers_eqvae.load_extension)."
            )
        return self._members[name]

    def name_of(self, member: type) -> str:
        """The name that a class was registered under."""
        return next(name for name, cls in self._members.items() if cls is member)

    def _own_names(self) -> tuple[str, ...]:
        path = importlib.import_module(self.package).__path__
        found = (module.name for module in pkgutil.iter_modules(path))
        return tuple(name for name in found if name not in NOT_MEMBERS and not name.startswith("_"))

    def _check_flags(self, name: str, cls: type) -> None:
        arguments = getattr(cls, "Arguments", None)
        if arguments is None:
            return
        if not cls.__module__.startswith(f"{self.package}."):  # an extension's: every member has a say
            for registry in _REGISTRIES:
                for own in registry._own_names():
                    registry[own]
        prefixes = getattr(cls, "prefixes", ()) or (f"{name}_",)
        for entry in fields(arguments):
            if not entry.name.startswith(tuple(prefixes)):
                raise ValueError(
                    f"The option {entry.name!r} of the {self.kind} {name!r} must begin with {' or '.join(prefixes)}; "
                    "rename it, or declare its prefix in the class's `prefixes`."
                )
        for registry in _REGISTRIES:
            for other, member in registry._members.items():
                if _identity(member) == _identity(cls):
                    continue
                theirs = {entry.name for entry in fields(getattr(member, "Arguments", None) or _NoArguments)}
                taken = sorted(theirs & {entry.name for entry in fields(arguments)})
                if taken:
                    raise ValueError(
                        f"The option {taken[0]!r} of the {self.kind} {name!r} ({cls.__module__}) belongs to the "
                        f"{registry.kind} {other!r} ({member.__module__}); choose another name."
                    )


@dataclass
class _NoArguments:
    pass


def _identity(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


@dataclass(frozen=True)
class Extension:
    """A loaded extension: the name of its module, its file, and the first 16 hex digits of the file's sha256."""

    module: str
    path: str
    sha256: str


def load_extension(file_or_module: str | Path) -> Extension:
    """Runs a local Python file, or imports a module, so that what it registers is there.

    A file becomes the module `diffusers_eqvae.extensions.STEM`. Loading the same file again changes nothing.

    Raises:
        ValueError: neither a file here nor an importable module; another file of the same name is loaded already.

    Example:
        >>> load_extension("my_method.py").module
        'diffusers_eqvae.extensions.my_method'
    """
    name = str(file_or_module)
    path = Path(name)
    if path.suffix == ".py" or path.is_file():
        return _load_file(path)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ValueError(f"The extension {name} needs {error.name}, which is not installed.") from error
        raise ValueError(
            f"The extension {name} is neither a Python file here nor a module that can be imported."
        ) from error
    if module.__file__ is None:
        raise ValueError(f"The extension {name} is a folder without an __init__.py; name one of its modules.")
    return _remember(name, Path(module.__file__))


def _load_file(path: Path) -> Extension:
    if not path.is_file():
        raise ValueError(f"The extension {path} does not exist; name a Python file on this machine.")
    module_name = f"{PARENT}.{path.stem}"
    if path.suffix != ".py":
        raise ValueError(f"The extension {path} is not a Python file: its name must end in .py.")
    if not path.stem.isidentifier():
        raise ValueError(
            f"The extension {path.name} needs a name that Python can import: letters, digits, underscores."
        )
    known = _LOADED.get(module_name)
    if known is not None:
        if known.sha256 == hash_file(path):
            return known
        raise ValueError(f"An extension called {path.stem} is loaded already, from {known.path}; rename {path}.")
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None  # a path that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[module_name]
        if isinstance(error, ModuleNotFoundError):
            raise ValueError(f"The extension {path} needs {error.name}, which is not installed.") from error
        raise
    return _remember(module_name, path)


def _remember(module_name: str, path: Path) -> Extension:
    return _LOADED.setdefault(module_name, Extension(module_name, str(path.resolve()), hash_file(path)))


def loaded_extensions() -> dict[str, str]:
    """Module name -> sha256 of every extension loaded so far: part of a checkpoint's and a card's provenance."""
    return {extension.module: extension.sha256 for extension in _LOADED.values()}


def load_extensions(argv: Sequence[str]) -> list[str]:
    """Loads what `--extension FILE_OR_MODULE` names on a command line, in order, and gives back the other words.

    Example:
        >>> load_extensions(["--extension", "my_method.py", "--seed", "3"])
        ['--seed', '3']
    """
    parser = argparse.ArgumentParser(prog=Path(sys.argv[0]).name, add_help=False, allow_abbrev=False)
    parser.add_argument("--extension", action="append", default=[])
    given, rest = parser.parse_known_args(list(argv))
    for extension in given.extension:
        load_extension(extension)
    return rest
