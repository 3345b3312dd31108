"""A number that makes no sense is refused by name when a program starts, whoever gives it.

Every numeric field of every `Arguments` dataclass states its range; one function holds command line, preset and Python
to it. A new option is covered by its field alone; a new kind of nonsense is a line in `NONSENSE`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import pkgutil
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml

import diffusers_eqvae
from diffusers_eqvae.metrics.base import METRICS
from diffusers_eqvae.objectives.base import OBJECTIVES
from diffusers_eqvae.options import Checked, Range, check_ranges, options_of
from diffusers_eqvae.regularizers.base import REGULARIZERS
from diffusers_eqvae.training_utils.command_line import parse

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path for folder in ("training", "pipelines") for path in (ROOT / folder).glob("*.py"))


def load_script(path: Path):
    specification = importlib.util.spec_from_file_location(f"numbers_{path.stem}", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def argument_classes() -> dict[str, type]:
    """Every dataclass of options of the package and of its scripts, by the place where it stands."""
    rooms = (OBJECTIVES, REGULARIZERS, METRICS)
    found = {getattr(room[name], "Arguments", None) for room in rooms for name in room}
    modules = []
    for module in pkgutil.walk_packages(diffusers_eqvae.__path__, "diffusers_eqvae."):
        source = importlib.util.find_spec(module.name).origin
        if "Arguments" in Path(source).read_text() and not module.name.endswith("__main__"):
            modules.append(importlib.import_module(module.name))
    for module in modules:
        members = vars(module).values()
        found |= {kind for kind in members if inspect.isclass(kind) and kind.__name__.endswith("Arguments")}
    return {f"{kind.__module__}.{kind.__qualname__}": kind for kind in found if kind and is_dataclass(kind)}


CLASSES = argument_classes()
NUMBERS = {
    f"{place}.{name}": (kind, option)
    for place, kind in sorted(CLASSES.items())
    for name, option in options_of(kind).items()
    if option.is_number
}
FLOATS = {place: pair for place, pair in NUMBERS.items() if pair[1].type is float}


def made(kind: type, name: str, value):
    """An instance in which one option has this value; what is required is a word."""
    required = {each.field.name: "x" for each in options_of(kind).values() if each.is_required}
    return kind(**{**required, name: value})


def outside(option) -> list:
    """The nearest values on the wrong side of each end that the option's range has."""
    bounds, values = Range(option.range), []
    if math.isfinite(bounds.low):
        values.append(bounds.low if bounds.low_open else bounds.low - 1)
    if math.isfinite(bounds.high):
        values.append(bounds.high if bounds.high_open else bounds.high + 1)
    return [option.type(value) for value in values]


def test_the_search_finds_the_options_of_every_script_and_method():
    names = {place.rpartition(".")[2] for place in NUMBERS}
    assert {"learning_rate", "cpu_threads", "guidance_scale", "p_equivariance", "sigma_std", "max_depth"} <= names
    assert {"num_samples", "disc_channels", "finetuning_steps", "intrinsic_dimension_max_points"} <= names
    assert len(CLASSES) > 20 and len(NUMBERS) > 80


@pytest.mark.parametrize("place", NUMBERS)
def test_every_number_states_its_range(place):
    _, option = NUMBERS[place]
    assert option.range is not None, f"{place} needs a range in its metadata, or (-inf, inf) for any finite number"
    for default in option.default if option.is_list else [option.default]:
        assert default is None or Range(option.range).holds(default)


@pytest.mark.parametrize("place", NUMBERS)
def test_what_lies_outside_is_refused_by_name(place):
    kind, option = NUMBERS[place]
    for value in outside(option):
        with pytest.raises(ValueError, match=rf"\b{option.field.name} must .*; got "):
            made(kind, option.field.name, [value] if option.is_list else value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "minus_inf"])
@pytest.mark.parametrize("place", FLOATS)
def test_what_is_not_finite_is_refused_by_name(place, value):
    kind, option = FLOATS[place]
    with pytest.raises(ValueError, match=rf"\b{option.field.name} must be finite; got "):
        made(kind, option.field.name, [0.5, value] if option.is_list else value)


@dataclass
class Options(Checked):
    """Options of a test."""

    share: float = field(default=0.5, metadata={"range": "[0, 1)"})
    steps: int | None = field(default=None, metadata={"range": "(0, inf)"})
    bounds: list[float] = field(default_factory=lambda: [0.0, 1.0], metadata={"range": "[0, 1]"})
    offset: float = field(default=0.0, metadata={"range": "(-inf, inf)"})
    kind: Literal["a", "b"] = "a"


NONSENSE = [
    pytest.param("share", 1.0, "share must lie in [0, 1); got 1.0", id="end_of_an_open_interval"),
    pytest.param("share", "nan", "share must be finite; got nan", id="nan"),
    pytest.param("steps", 0, "steps must be positive; got 0", id="zero"),
    pytest.param("steps", -3, "steps must be positive; got -3", id="negative"),
    pytest.param("bounds", [0.5, 1.5], "bounds must lie in [0, 1]; got [0.5, 1.5]", id="element_of_a_list"),
    pytest.param("bounds", [0.5, "nan"], "bounds must be finite; got [0.5, nan]", id="nan_in_a_list"),
    pytest.param("offset", "inf", "offset must be finite; got inf", id="infinite_where_any_number_goes"),
    pytest.param("offset", "1e999", "offset must be finite; got inf", id="more_than_a_float_holds"),
]


@pytest.mark.parametrize(("name", "value", "said"), NONSENSE)
def test_command_line_preset_and_python_say_the_same(name, value, said, tmp_path):
    words = [str(each) for each in (value if isinstance(value, list) else [value])]
    numbers = [int(word) if name == "steps" else float(word) for word in words]
    (tmp_path / "preset.yaml").write_text(yaml.safe_dump({name: numbers if isinstance(value, list) else numbers[0]}))
    doors = {
        "flag": lambda: parse(Options, argv=[f"--{name}", *words]),
        "preset": lambda: parse(Options, argv=[str(tmp_path / "preset.yaml")]),
        "Python": lambda: Options(**{name: numbers if isinstance(value, list) else numbers[0]}),
    }
    for door, enter in doors.items():
        with pytest.raises(ValueError, match="must") as refused:
            enter()
        assert str(refused.value) == f"{'' if door == 'Python' else '--'}{said}."


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"steps": 2.5}, "steps must be a whole number; got 2.5"),
        ({"steps": True}, "steps must be a whole number; got True"),
        ({"share": "0.5"}, "share must be a number; got '0.5'"),
        ({"kind": "c"}, "kind must be one of a, b; got 'c'"),
    ],
    ids=["fraction", "truth_value", "word", "unknown_choice"],
)
def test_python_gives_values_of_the_stated_type(values, said):
    with pytest.raises(ValueError, match="must") as refused:
        Options(**values)
    assert str(refused.value) == f"{said}."


def test_numbers_of_an_option_without_a_range_are_finite():
    """An extension's dataclass need not derive from Checked: the command line checks it all the same."""

    @dataclass
    class Plain:
        """Options of an extension."""

        plain_weight: float = 1.0

    check_ranges(Plain, {"plain_weight": -3.0})
    with pytest.raises(ValueError, match="--plain_weight must be finite; got nan"):
        parse(Plain, argv=["--plain_weight", "nan"])


STARTS = [
    pytest.param(
        "train_transformer", ["--output_dir", "x", "--guidance_scale", "nan"], "guidance_scale", id="guidance"
    ),
    pytest.param("train_transformer", ["--output_dir", "x", "--max_grad_norm", "nan"], "max_grad_norm", id="clipping"),
    pytest.param("train_autoencoder", ["--output_dir", "x", "--disc_channels", "0"], "disc_channels", id="channels"),
    pytest.param("train_autoencoder", ["--output_dir", "x", "--p_equivariance", "2"], "p_equivariance", id="a_method"),
    pytest.param("encode_latents", ["--vae", "x", "--output_dir", "y", "--cpu_threads", "0"], "cpu_threads", id="cpu"),
    pytest.param(
        "sample", ["--model", "x", "--output_dir", "y", "--guidance_interval", "0", "nan"], "interval", id="list"
    ),
]


@pytest.mark.parametrize(("script", "words", "name"), STARTS)
def test_a_script_refuses_it_before_anything_is_read_or_written(script, words, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = load_script(next(path for path in SCRIPTS if path.stem == script))
    with pytest.raises(ValueError, match=rf"--\w*{name} must "):
        module.main(words)
    assert not list(tmp_path.iterdir())
