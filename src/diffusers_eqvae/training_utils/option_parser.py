"""A command line from dataclasses: a group of options for each, and a help page that shows every option once."""

from __future__ import annotations

import argparse
import difflib
import shutil
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from ..options import Option, check_ranges, options_of

HOW_TO_READ = (
    "Behind a flag stands its default (of several choices the first), or in capitals or braces what it takes; a "
    "flag with neither is a switch. A YAML preset may come first; its keys are the flags' names, and flags given "
    "after it win."
)
IN_A_FILE = (119, 24)  # columns and lines, as the descriptions are set
LIKE = 0.55  # least likeness of a name that is worth suggesting
TAKES = {int: "N", float: "X", str: "TEXT"}


class OptionParser(argparse.ArgumentParser):
    """Reads the options of dataclasses; --X_Y is --X-Y too, and --no_X_Y turns off what is on.

    Args:
        types: the dataclasses; the first line of a docstring is the title of its options.
        description: what --help says first.
        notes: gives what it says last, when it is asked for.

    Raises:
        ValueError: two dataclasses have an option of one name.
    """

    def __init__(
        self, types: Sequence[type], description: str | None = None, *, notes: Callable[[], Sequence[str]] = tuple
    ) -> None:
        super().__init__(description=description, allow_abbrev=False)
        self.types, self.notes = types, notes
        for kind in types:
            try:
                for option in options_of(kind).values():
                    self._add(option)
            except argparse.ArgumentError as error:
                raise ValueError(
                    f"An option of {kind.__module__}.{kind.__qualname__} is taken by the script: {error}. Rename it."
                ) from error
        self.usage = " ".join(["%(prog)s [PRESET]", *map(_invocation, self._required()), "[--flag value ...]"])

    def _add(self, option: Option) -> None:
        name = option.field.name
        settings: dict[str, Any] = {"dest": name, "required": option.is_required, "default": option.default}
        if option.type is bool:
            settings |= {"type": _switch, "nargs": "?", "const": True}
        else:
            nargs = "+" if option.is_list else None
            settings |= {"type": option.type, "choices": option.choices or None, "nargs": nargs}
        self.add_argument(f"--{name}", *option.field.metadata.get("aliases", ()), **settings)
        if option.type is bool:
            self.add_argument(f"--no_{name}", dest=name, action="store_false", default=argparse.SUPPRESS)

    def read(self, words: Sequence[str]) -> tuple[list[Any], list[str]]:
        """One instance per dataclass, and the words that no option takes.

        Raises:
            ValueError: a number outside its option's range, or a value that a dataclass refuses.
        """
        given, unknown = self.parse_known_args(list(map(_underscored, words)))
        made = []
        for kind in self.types:
            values = {name: getattr(given, name) for name in options_of(kind)}
            check_ranges(kind, values, spelling="--{}")
            made.append(kind(**values))
        return made, unknown

    def read_some(self, words: Sequence[str]) -> dict[str, Any]:
        """The values of these options by name, before it is known which others there are."""
        for action in self._actions:
            action.required = False
        given, _ = self.parse_known_args([_underscored(word) for word in words if word not in ("-h", "--help")])
        return vars(given)

    def format_help(self) -> str:
        width = max(shutil.get_terminal_size(IN_A_FILE).columns, 40)
        usage = textwrap.wrap(self.format_usage(), width, subsequent_indent=" " * 4, break_on_hyphens=False)
        lines = [*usage, "", *wrapped(self.description or "", width), "", *textwrap.wrap(HOW_TO_READ, width)]
        groups = [("required", self._required())]
        for kind in self.types:
            title = str(kind.__doc__).splitlines()[0].rstrip(".")
            groups.append((title, [each for each in options_of(kind).values() if not each.is_required]))
        for title, options in groups:
            lines += ["", f"{title}:"] if options else []
            for option in options:
                text = f"{_invocation(option)}  {_sentence(option)}"
                lines += textwrap.wrap(text, width, initial_indent="  ", subsequent_indent=" " * 4)
        extension = "--extension FILE_OR_MODULE  Python file or module that adds a method or a model; repeatable."
        extension = textwrap.fill(extension, width, initial_indent="  ", subsequent_indent=" " * 4)
        lines += ["", "every script:", extension, "  --help  This page.", ""]
        lines += [line for note in self.notes() for line in textwrap.wrap(note, width, subsequent_indent=" " * 4)]
        return "\n".join(lines) + "\n"

    def _required(self) -> list[Option]:
        return [option for kind in self.types for option in options_of(kind).values() if option.is_required]


def wrapped(text: str, width: int) -> list[str]:
    """The paragraphs of a text, set anew; commands to copy, which are indented or begin with the program, are kept.

    Example:
        >>> wrapped("Fetches\\nweights.\\n\\n  eqvae prefetch NAME", 80)
        ['Fetches weights.', '', '  eqvae prefetch NAME']
    """
    lines: list[str] = []
    for block in text.strip().split("\n\n"):
        kept = any(line.startswith((" ", "eqvae ")) for line in block.splitlines())
        lines += ["", *(block.splitlines() if kept else textwrap.wrap(" ".join(block.split()), width))]
    return lines[1:]


def _underscored(word: str) -> str:
    """--X-Y=value as --X_Y=value: either spelling of a flag is taken, and one is shown."""
    flag, equals, value = word.partition("=")
    return flag[:2] + flag[2:].replace("-", "_") + equals + value if flag.startswith("--") else word


def _switch(word: str) -> bool:
    known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if word.lower() not in known:
        raise argparse.ArgumentTypeError(f"takes true or false; got {word!r}")
    return known[word.lower()]


def _invocation(option: Option) -> str:
    """How --help writes an option: with its default, or what it takes."""
    name, default = option.field.name, option.default
    if option.type is bool and default is not None:
        return f"--no_{name}" if default else f"--{name}"
    if option.choices and default is None:
        return f"--{name} {{{','.join(map(str, option.choices))}}}"
    if option.choices:
        return f"--{name} {'|'.join([str(default), *(str(each) for each in option.choices if each != default)])}"
    if default is None or default == []:
        return f"--{name} {option.field.metadata.get('metavar') or TAKES.get(option.type, 'BOOL')}" + (
            " ..." if option.is_list else ""
        )
    return f"--{name} {' '.join(map(str, default)) if option.is_list else default}"


def _sentence(option: Option) -> str:
    text = str(option.field.metadata.get("help", ""))
    return f"Turns off: {text}" if option.type is bool and option.default else text


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The name that was meant: its initials or some of its words were given, or it is spelled alike; None for none.

    Of several with these initials it is the first in the alphabet, of others that are as like the shortest.

    Example:
        >>> nearest("lr", ["lr_scheduler", "learning_rate"])
        'learning_rate'
    """
    name = name.removeprefix("no_")
    likeness = {other: _likeness(name, other) for other in known}
    likest = min(known, key=lambda other: (-likeness[other], 0 if likeness[other] == 1.0 else len(other), other))
    return likest if likeness[likest] >= LIKE else None


def _likeness(name: str, other: str) -> float:
    words = other.split("_")
    initials = "".join(word[:1] for word in words)
    some = set(name.split("_")) <= set(words) or (len(name) > 1 and name in initials)
    spelled = difflib.SequenceMatcher(None, name, other).ratio()
    return 1.0 if name == initials else max(spelled, 0.8 if some else 0.0)
