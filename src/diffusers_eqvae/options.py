"""Where an option says which values it takes, and the one function that holds it to that.

A number of an `Arguments` dataclass states its range in the metadata of its field, beside its help; a word states its
choices by the type `Literal`:

    p_shift: float = field(default=0.5, metadata={"help": "Share of shifted steps.", "range": "[0, 1]"})

Ranges are intervals as in mathematics; "(-inf, inf)", which is also what holds where none is stated, is any finite
number. NaN and infinity lie in no range. The elements of a list have the range of their field. An option that names
what is read (a file, a directory, a repository) says `"reads": True`, or "pipeline" where all of a pipeline is read
and not its autoencoder alone: no output is ever written there, and a resumed run compares what it holds, not what it
is called.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

ANY_FINITE = "(-inf, inf)"


class Checked:
    """Base of an `Arguments` dataclass whose values are held to its fields' ranges when it is made.

    A `__post_init__` of its own, for what concerns several fields at once, begins with `super().__post_init__()`.

    Example:
        >>> @dataclass
        ... class ShiftArguments(Checked):
        ...     p_shift: float = field(default=0.5, metadata={"range": "[0, 1]"})
        >>> ShiftArguments(p_shift=2.0)
        Traceback (most recent call last):
        ValueError: p_shift must lie in [0, 1]; got 2.0.
    """

    def __post_init__(self) -> None:
        check_ranges(type(self), vars(self))


def check_ranges(kind: type, values: Mapping[str, Any], *, spelling: str = "{}") -> None:
    """Refuses what an option of a dataclass does not take, by the option's name.

    Args:
        kind: the dataclass.
        values: of its options, by name; None passes where the type allows it.
        spelling: of a name in messages, "--{}" on a command line.

    Example:
        >>> check_ranges(FlowMatchingArguments, {"sigma_std": float("nan")})
        Traceback (most recent call last):
        ValueError: sigma_std must be finite; got nan.
    """
    for name, option in options_of(kind).items():
        value = values.get(name)
        if value is None:
            continue
        each = value if option.is_list and isinstance(value, list | tuple) else [value]
        for reason in filter(None, map(option.complaint, each)):
            raise ValueError(f"{spelling.format(name)} must {reason}; got {value!r}.")


def reading_options(*groups: Any) -> list[str]:
    """The options of these dataclasses that name what is read, given or not."""
    kinds: list[type] = [type(group) for group in groups]
    return [name for kind in kinds for name, option in options_of(kind).items() if option.reads]


def inputs_of(*groups: Any) -> dict[str, str]:
    """What the options of these dataclasses name to be read, by option; of NAME=PATH words the path.

    Example:
        >>> inputs_of(DataArguments(train_data_dir="photographs"))
        {'train_data_dir': 'photographs'}
    """
    found = {}
    for group in groups:
        kind: type = type(group)
        for name, option in options_of(kind).items():
            value = getattr(group, name) if option.reads else None
            for number, each in enumerate(value if isinstance(value, list) else filter(None, [value])):
                found[f"{name} {number + 1}" if number else name] = each.partition("=")[2] or each
    return found


@dataclass(frozen=True)
class Option:
    """What a field's type and metadata say: `type` of a value, or of the elements of a list, and what it may be.

    Example:
        >>> options_of(EquivarianceArguments)["p_equivariance"].range
        '[0, 1]'
    """

    field: Field[Any]
    type: Any
    is_list: bool
    choices: tuple[Any, ...]

    @property
    def is_number(self) -> bool:
        return self.type in (int, float)

    @property
    def is_required(self) -> bool:
        return self.field.default is MISSING and self.field.default_factory is MISSING

    @property
    def default(self) -> Any:
        """A new one each time; None where the option is required."""
        if self.field.default_factory is not MISSING:
            return self.field.default_factory()
        return None if self.field.default is MISSING else self.field.default

    @property
    def range(self) -> str | None:
        """As its field states it; None where it states none."""
        return self.field.metadata.get("range")

    @property
    def reads(self) -> bool:
        """Whether it names a file, a directory or a repository that is read."""
        return bool(self.field.metadata.get("reads"))

    def complaint(self, value: Any) -> str | None:
        """What a single value must do and does not: "be positive"; None where all is well."""
        if self.choices:
            return None if value in self.choices else f"be one of {', '.join(map(str, self.choices))}"
        if not self.is_number:
            return "be UTF-8 text without a null byte" if isinstance(value, str) and not _is_text(value) else None
        whole = self.type is int
        if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
            return "be a whole number" if whole else "be a number"
        allowed = Range(self.range or ANY_FINITE)
        return None if allowed.holds(value) else allowed.words(value)


@cache
def options_of(kind: type) -> dict[str, Option]:
    """The options of a dataclass by name: its fields, but for those that it sets itself.

    Raises:
        TypeError: a field whose type the command line does not know.
    """
    hints = get_type_hints(kind)
    return {entry.name: _option(kind, entry, hints[entry.name]) for entry in fields(kind) if entry.init}


def _option(kind: type, entry: Field[Any], hint: Any) -> Option:
    if get_origin(hint) in (Union, types.UnionType):
        given = [each for each in get_args(hint) if each is not type(None)]
        hint = given[0] if len(given) == 1 else hint
    is_list = get_origin(hint) is list
    if is_list:
        (hint,) = get_args(hint)
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    if not choices and hint not in (str, int, float, bool):
        raise TypeError(
            f"The option {entry.name} of {kind.__module__}.{kind.__qualname__} must be a str, int, float, bool or "
            f"Literal, a list of them, or None besides; its type is {hint}."
        )
    return Option(entry, type(choices[0]) if choices else hint, is_list, choices)


class Range:
    """An interval in its usual notation, of numbers or powers: "[0, 1)", "(0, inf)", "[0, 2**64)".

    Example:
        >>> Range("[0, 1)").holds(1.0)
        False
    """

    def __init__(self, notation: str) -> None:
        self.notation = notation
        low, high = notation[1:-1].split(",")
        self.low, self.high = _bound(low), _bound(high)
        self.low_open, self.high_open = notation[0] == "(", notation[-1] == ")"

    def holds(self, value: Any) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below  # NaN and infinity are neither

    def words(self, value: Any) -> str:
        """What a value outside must do."""
        if math.isinf(self.low) or not math.isfinite(value):
            return "be finite"
        if not math.isinf(self.high):
            return f"lie in {self.notation}"
        if self.low == 0:
            return "be positive" if self.low_open else "not be negative"
        return f"be {'above' if self.low_open else 'at least'} {self.low:g}"


def _is_text(value: str) -> bool:
    """Whether files that are JSON or YAML can hold it: a name in another encoding comes with lone surrogates."""
    return "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _bound(text: str) -> float:
    base, _, power = text.partition("**")
    return float(base) ** float(power or 1)
