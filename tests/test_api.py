"""The public names: each is there, explains itself, and stands in docs/api.md.

`python -m tests.test_api` writes that page anew, and docs/rows.md.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import diffusers_eqvae

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"
# What runs the commands, not what programs import.
NOT_PUBLIC = ("commands", "demo", "sampling", "training", "training_utils")
# A call, or what is computed written out.
EXAMPLE_OR_FORMULA = re.compile(r">>>|[\w)\]|] (?:[=*/+-]|\|\|) [\w(|-]|\^\d")
HEAD = """# Public names

What `import diffusers_eqvae` and its subpackages offer, one line each; `help(NAME)` says more. Everything else may
move. The file is written by `make api` and compared by a test.
"""


def rooms() -> list[ModuleType]:
    """The package and its public subpackages."""
    found = [entry.name for entry in pkgutil.iter_modules(diffusers_eqvae.__path__) if entry.ispkg]
    names = [name for name in sorted(found) if name not in NOT_PUBLIC]
    return [diffusers_eqvae, *(importlib.import_module(f"diffusers_eqvae.{name}") for name in names)]


def documentation(value: object) -> str:
    """The docstring that stands in this repository's or, for a re-exported class, in its own library."""
    return inspect.getdoc(value) or ""


def first_sentence(text: str) -> str:
    paragraph = " ".join(text.partition("\n\n")[0].split())
    return re.split(r"(?<=[.?])\s(?=[A-Z`])", paragraph, maxsplit=1)[0].rstrip(":.")


def page() -> str:
    sections = [HEAD]
    for room in rooms():
        lines = [f"- `{name}`: {first_sentence(documentation(getattr(room, name)))}" for name in room.__all__]
        sections.append(
            f"## `{room.__name__}`\n\n{first_sentence(documentation(room))}.\n\n" + "\n".join(lines) + "\n"
        )
    return "\n".join(sections)


def names() -> list[tuple[str, str]]:
    return [(room.__name__, name) for room in rooms() for name in room.__all__]


@pytest.mark.parametrize(("room", "name"), names())
def test_a_public_name_explains_itself(room, name):
    value = getattr(importlib.import_module(room), name)
    text = documentation(value)
    assert text and not text.startswith(f"{name}("), f"{room}.{name} has no docstring of its own"
    if inspect.isclass(value) or inspect.isfunction(value):
        ours = value.__module__.startswith("diffusers_eqvae")
        explained = bool(EXAMPLE_OR_FORMULA.search(text)) or not ours
        assert explained, f"{room}.{name}: an example or a formula in its docstring"


def test_the_page_lists_every_public_name():
    assert PAGE.read_text() == page(), "run `make api`"


def test_the_top_has_the_names_that_most_programs_need_and_no_more():
    assert 30 <= len(diffusers_eqvae.__all__) <= 45
    assert not hasattr(diffusers_eqvae, "register")


def test_names_of_subpackages_are_the_same_objects_at_the_top():
    for room in rooms()[1:]:
        for name in set(room.__all__) & set(diffusers_eqvae.__all__):
            assert getattr(room, name) is getattr(diffusers_eqvae, name)


def test_a_face_imports_a_module_when_its_name_is_asked_for():
    code = """
import sys
import diffusers_eqvae
before = set(sys.modules)
from diffusers_eqvae import metrics, data
assert "diffusers_eqvae.metrics.distances" not in sys.modules
assert {"psnr", "distances"} <= {*dir(metrics), "distances"} and "psnr" in dir(metrics)
from diffusers_eqvae.metrics import frechet_distance
assert "diffusers_eqvae.metrics.distances" in sys.modules
assert diffusers_eqvae.regularizers.EquivarianceRegularizer is diffusers_eqvae.EquivarianceRegularizer
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


if __name__ == "__main__":
    from . import test_docs

    PAGE.write_text(page())
    test_docs.ROWS.write_text(test_docs.rows())
