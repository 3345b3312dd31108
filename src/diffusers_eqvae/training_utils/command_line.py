"""The command line of every script: dataclasses, a YAML preset, extensions, and what is saved beside the weights."""

from __future__ import annotations

import inspect
import json
import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from ..extensions import Registry, load_extensions
from ..files import read_json, write_text
from ..options import options_of, reading_options
from ..regularizers.base import REGULARIZERS, Regularizer
from .option_parser import OptionParser, nearest
from .presets import find_preset, installed_presets, located, read_preset

logger = logging.getLogger(__name__)

YAML_SUFFIXES = (".yaml", ".yml")
RESOLVED_ARGUMENTS = "resolved_arguments.yaml"  # in a run's directory: a preset that repeats it


@dataclass(frozen=True)
class Choice:
    """Members of one room that an option chose: their own options join the script's.

    Args:
        registry: the room.
        names: those chosen.
        flag: the option that chose them.
        fits: which of the room's members may be chosen here.

    Raises:
        ValueError: a name that the room does not hold, or whose member does not fit.
    """

    registry: Registry[Any]
    names: tuple[str, ...]
    flag: str
    fits: Callable[[Any], bool] = bool

    def __post_init__(self) -> None:
        for name in self.names:
            if not self.fits(self.registry[name]):
                raise ValueError(
                    f"The {self.registry.kind} {name} does not fit here; --{self.flag} takes "
                    f"{', '.join(self.members())}."
                )

    def arguments(self) -> dict[str, type]:
        """Name -> `Arguments` of those that have any."""
        found = {name: getattr(self.registry[name], "Arguments", None) for name in self.names}
        return {name: kind for name, kind in found.items() if kind is not None}

    def others(self) -> tuple[str, ...]:
        return tuple(name for name in self.members() if name not in self.names)

    def members(self) -> dict[str, type]:
        """All that may be chosen, by name."""
        members = {name: self.registry[name] for name in self.registry.names()}
        return {name: member for name, member in members.items() if self.fits(member)}


Choices = Callable[[Mapping[str, Any]], Sequence[Choice]]


def parse(
    *dataclass_types: type,
    argv: Sequence[str] | None = None,
    description: str | None = None,
    choices: Choices | None = None,
    script: str | None = None,
) -> tuple[Any, ...]:
    """Reads `[PRESET] [--flag value ...]` into one instance per dataclass; flags win over the preset.

    PRESET is a file, or one without its .yaml, or the name of one that is installed beside the script. What lies in
    its folder is meant by the paths in it; paths on the command line start at the working directory.

    `--extension FILE_OR_MODULE`, repeatable and from the command line only, is loaded before everything else.

    Args:
        dataclass_types: dataclasses whose fields carry their help in `metadata`; names must differ between them.
        argv: arguments without the program name; None reads `sys.argv`.
        description: what --help says first.
        choices: from the values read so far (name -> value), whose further options there are; their instances are
            the last value returned, by member name.
        script: its file, where presets are installed beside it.

    Raises:
        ValueError: a preset that is absent, not a flat mapping, or holds an unknown key (the nearest is named), or a
            value that a dataclass refuses. Unknown flags end the program, also with the nearest name, and options of
            a method that was not chosen with the method's.

    Example:
        >>> (run,) = parse(RunArguments, argv=["--output_dir", "runs/x", "--seed", "3"])
        >>> run.seed
        3
    """
    argv = load_extensions(list(sys.argv[1:] if argv is None else argv))
    preset: dict[str, Any] = {}
    folder = Path()
    if argv and not argv[0].startswith("-"):
        path = find_preset(argv[0], lambda: _installed(script, dataclass_types, _chosen(choices, dataclass_types, [])))
        preset, folder, argv = read_preset(path), path.parent, argv[1:]
    preset = located(preset, folder, dataclass_types)
    chosen = _chosen(choices, dataclass_types, _as_flags(preset, _field_names(dataclass_types)) + argv)
    methods: dict[str, type] = {}
    for choice in chosen:
        for name, kind in choice.arguments().items():
            if name in methods:
                raise ValueError(f"Two methods are called {name}, one of them a {choice.registry.kind}; rename one.")
            methods[name] = kind

    types = [*dataclass_types, *methods.values()]
    parser = OptionParser(
        types, description, notes=lambda: _notes(chosen, _installed(script, dataclass_types, chosen))
    )
    known = _field_names(types)
    preset = located(preset, folder, methods.values())
    _check_preset(preset, known, chosen)
    parser.set_defaults(**{key: [] for key, value in preset.items() if value == []})  # no flag says an empty list
    words = _as_flags(preset, known) + argv
    if _LOOKED_AT.get():
        values = parser.read_some(words)
        unknown = parser.parse_known_args(words)[1]
        if not unknown:
            raise _Values(types, values)
    else:
        parsed, unknown = parser.read(words)
    if unknown:
        parser.error(_explain(unknown, known, chosen))
    if choices is None:
        return tuple(parsed)
    count = len(dataclass_types)
    return (*parsed[:count], dict(zip(methods, parsed[count:], strict=True)))


class _Values(BaseException):
    """Ends a command at its options: the dataclasses, and their values by name."""


_LOOKED_AT: ContextVar[bool] = ContextVar("looked_at", default=False)


def look_at(main: Callable[[list[str]], object], words: Sequence[str]) -> tuple[list[type], dict[str, Any]]:
    """The dataclasses of a command's options and the values that these words give them; the command does not run.

    Required options may be missing, and are None. Anything else is refused as `parse` refuses it.

    Args:
        main: of a command that calls `parse` before all else.

    Example:
        >>> kinds, values = look_at(sample.main, ["sit_ode", "--model", "me/sit"])
        >>> values["model"], values["scheduler"]
        ('me/sit', 'dopri5')
    """
    token = _LOOKED_AT.set(True)
    try:
        main(list(words))
    except _Values as found:
        kinds, values = found.args
        return kinds, values
    finally:
        _LOOKED_AT.reset(token)
    raise AssertionError(f"{main.__module__} has run, and reads no options by parse")


def regularizer_choice(given: Sequence[str], product: type[Regularizer]) -> Choice:
    """The regularizers of `--regularizers` ("none" for no one).

    Args:
        product: `AutoencoderRegularizer` or `GeneratorRegularizer`: which of the two products is trained.

    Raises:
        ValueError: an unknown or repeated name, or a regularizer of the other product.
    """
    names = tuple(name for name in given if name != "none")
    if len(set(names)) != len(names) or (names and "none" in given):
        raise ValueError(f"--regularizers takes each name at most once, or none alone; got {' '.join(given)}.")
    return Choice(REGULARIZERS, names, "regularizers", lambda member: issubclass(member, product))


def _chosen(choices: Choices | None, types: Sequence[type], words: Sequence[str]) -> Sequence[Choice]:
    return () if choices is None else choices(OptionParser(types).read_some(words))


def _installed(script: str | None, types: Sequence[type], chosen: Sequence[Choice]) -> dict[str, Path]:
    """The presets beside a script that have no key which neither it nor a method it might choose takes."""
    members = [member for choice in chosen for member in choice.members().values()]
    methods = [kind for kind in (getattr(member, "Arguments", None) for member in members) if kind is not None]
    return {} if script is None else installed_presets(script, _field_names([*types, *methods]))


def _notes(chosen: Sequence[Choice], installed: Mapping[str, Path]) -> list[str]:
    """The last lines of --help."""
    others = {choice.flag: ", ".join(choice.others()) for choice in chosen if choice.others()}
    notes = [f"Other choices of --{flag}: {names}." for flag, names in others.items()]
    return [*notes, f"Presets that are installed: {', '.join(installed)}."] if installed else notes


def _field_names(types: Iterable[type]) -> list[str]:
    return [name for kind in types for name in options_of(kind)]


def _explain(unknown: Sequence[str], known: Sequence[str], chosen: Sequence[Choice]) -> str:
    misplaced = [word for word in unknown if Path(word).suffix in YAML_SUFFIXES]
    if misplaced:
        return f"the preset must come first, before every flag; {misplaced[0]} does not"
    name = unknown[0].lstrip("-").partition("=")[0].replace("-", "_")
    owner = _owner(name, chosen)
    if owner is not None:
        choice, member = owner
        return f"--{name} belongs to the {choice.registry.kind} {member}, which --{choice.flag} does not choose"
    likest = nearest(name, known)
    return f"unknown argument {unknown[0]}; " + (f"the nearest flag is --{likest}" if likest else "see --help")


def _owner(name: str, chosen: Sequence[Choice]) -> tuple[Choice, str] | None:
    """The member that was not chosen and has the option `name`."""
    for choice in chosen:
        for member in choice.others():
            arguments = getattr(choice.registry[member], "Arguments", None)
            if arguments is not None and name.removeprefix("no_") in _field_names([arguments]):
                return choice, member
    return None


def _check_preset(preset: Mapping[str, Any], known: Sequence[str], chosen: Sequence[Choice]) -> None:
    """Refuses unknown keys; those of methods that the command line did not choose have no effect, which is logged."""
    unused = []
    for key in preset:
        if key in known:
            continue
        if _owner(str(key), chosen) is None:
            likest = nearest(str(key), known)
            hint = f"the nearest flag is {likest!r}" if likest else "its keys are the names of flags, see --help"
            raise ValueError(f"Unknown key {key!r} in the preset; {hint}.")
        unused.append(str(key))
    if unused:
        logger.warning("Without effect, since their methods are not chosen: %s.", ", ".join(unused))


def _as_flags(preset: Mapping[str, Any], known: Sequence[str]) -> list[str]:
    """A preset as command-line words, so that one parser checks types for both; null means 'not given'."""
    flags: list[str] = []
    for key, value in preset.items():
        if key in known and isinstance(value, list):
            flags += [f"--{key}", *map(str, value)] if value else []
        elif key in known and value is not None:
            flags.append(f"--{key}={value}")  # one word, since a value may begin with a minus
    return flags


def read_model_config(path: str | Path, model_class: type) -> dict[str, Any]:
    """The init arguments of `model_class` in a JSON file; what diffusers notes beside them (_class_name) is left out.

    Raises:
        ValueError: a file that is absent or holds no mapping; a key that the class does not have (the nearest is
            named).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"The model config {path} does not exist; it is a JSON file with init arguments.")
    content = read_json(path)
    config = {key: value for key, value in content.items() if not key.startswith("_")}
    _require_known(config, model_class, str(path))
    return config


def parse_overrides(overrides: Sequence[str], model_class: type) -> dict[str, Any]:
    """Constructor arguments from KEY=VALUE words, whose values are read as YAML.

    Raises:
        ValueError: a word without "=", or a key that the class does not have (the nearest is named).
    """
    config: dict[str, Any] = {}
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"--config_overrides takes KEY=VALUE words; got {word!r}.")
        try:
            config[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--config_overrides {word}: the value is not YAML, e.g. qk_norm=true.") from error
    _require_known(config, model_class, "--config_overrides")
    return config


def _require_known(config: Mapping[str, Any], model_class: type, where: str) -> None:
    known = [name for name in inspect.signature(model_class).parameters if name not in ("args", "kwargs")]
    for key in config:
        if key not in known:
            likest = nearest(key, known)
            hint = f"the nearest of {model_class.__name__} is {likest!r}" if likest else f"it takes {', '.join(known)}"
            raise ValueError(f"Unknown key {key!r} in {where}; {hint}.")


def resolved(*arguments: Any) -> dict[str, Any]:
    """All fields of several argument dataclasses as one flat mapping, in their order.

    Local paths that are read are absolute ones in it, so that what it repeats does not hang on the working directory.
    """
    merged: dict[str, Any] = {}
    for group in arguments:
        values = asdict(group)
        reads = {name: values[name] for name in reading_options(group)}
        merged |= values | located(reads, Path.cwd(), [type(group)])
    return merged


def save_resolved(values: dict[str, Any], directory: Path) -> None:
    """Writes `resolved_arguments.json` and `.yaml`, which is a preset that repeats the run."""
    write_text(directory / "resolved_arguments.json", json.dumps(values, indent=2) + "\n")
    write_text(directory / RESOLVED_ARGUMENTS, yaml.safe_dump(values, sort_keys=False))
