"""The shape of the tree: who imports whom, what an import costs, how long files are, what a checkout must not hold."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "diffusers_eqvae"

# A module imports from its own row and the rows above it. "" is the package's own __init__, which re-exports the
# public names; what stands below it may use it, what stands above may not.
LAYERS = (
    (
        "_registration",
        "autoencoders",
        "equivariance",
        "extensions",
        "files",
        "flow",
        "guidance",
        "images",
        "latents",
        "provenance",
        "randomness",
    ),
    ("losses", "models", "schedulers"),
    ("conversion", "data", "metrics", "perception", "regularizers"),
    ("objectives", "pipelines"),
    ("",),
    ("hub", "inspection", "model_card", "training_utils"),
    ("__main__", "cli", "demo"),
)
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}

SCRIPTS = sorted(path for folder in ("training", "pipelines") for path in (ROOT / folder).glob("*.py"))
TOP_LEVEL = ("src", "tests", "training", "pipelines", "benchmarks", "docs", "model_cards", ".ci")
TEXT_SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".cff", ".json", ".html", ".txt", ""}
# Not needed to use a pipeline, so not to be needed by `import diffusers_eqvae` either.
OPTIONAL = ("accelerate", "datasets", "torchvision", "gradio", "lpips", "torchdiffeq", "peft", "tensorboard", "wandb")
OPTIONAL += ("matplotlib", "skimage", "scipy", "evaluate")


@cache
def text_files() -> tuple[Path, ...]:
    files = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in TOP_LEVEL:
        files += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    generated = ("__pycache__", ".egg-info")
    return tuple(
        path for path in files if path.suffix in TEXT_SUFFIXES and not any(mark in str(path) for mark in generated)
    )


def module_name(path: Path) -> str:
    """src/diffusers_eqvae/models/x.py -> "models.x"; an __init__ is its package, the root's is ""."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    return {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def internal_imports(name: str) -> set[str]:
    """The package's modules that `name` imports anywhere in its file, inside functions and TYPE_CHECKING included."""
    path = modules()[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if is_ours(alias.name)}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = [part for part in package if part][: len(package) - node.level + 1]
            elif is_ours(node.module or ""):
                base = []
            else:
                continue
            tail = (node.module or "").split(".")
            source = ".".join([*base, *(part for part in (tail if node.level else tail[1:]) if part)])
            for alias in node.names:
                submodule = f"{source}.{alias.name}".strip(".")
                found.add(submodule if submodule in modules() else source)
    return found - {name}


def is_ours(module: str) -> bool:
    return module.split(".")[0] == "diffusers_eqvae"


def layer(name: str) -> int:
    top = name.split(".")[0]
    assert top in LEVELS, f"{top!r} stands in no layer of the architecture: add it to LAYERS in {Path(__file__).name}"
    return LEVELS[top]


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_only_from_its_own_layer_and_the_ones_before(name):
    level = layer(name)
    wrong = sorted(target for target in internal_imports(name) if layer(target) > level)
    assert not wrong, f"diffusers_eqvae.{name} (layer {LAYERS[level]}) must not import {wrong}"


def test_there_are_no_import_cycles():
    graph = {name: internal_imports(name) for name in modules()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, "import cycle: " + " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for target in sorted(graph.get(name, ())):
                visit(target, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_nothing_imports_a_script():
    forbidden = {path.stem for path in SCRIPTS} | {"training", "pipelines", "benchmarks"}
    for path in [*modules().values(), *SCRIPTS]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not forbidden & {name.split(".")[0] for name in names}, f"{path} imports a script: {names}"


def test_only_the_registration_touches_diffusers_loading_tables():
    users = {name for name, path in modules().items() if "LOADABLE_CLASSES" in path.read_text()}
    assert users <= {"_registration"}


def test_the_library_does_not_print():
    for name, path in modules().items():
        if name.split(".")[0] not in ("cli", "demo"):
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            prints = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
            assert not prints, f"{path} prints on line {prints}; the library uses logging"


def test_import_needs_no_optional_dependency_and_no_training_code():
    code = f"""
import sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None
import diffusers_eqvae
loaded = sorted(name for name in sys.modules if name.startswith("diffusers_eqvae."))
wrong = [name for name in loaded if name.split(".")[1] in ("training_utils", "hub", "cli", "demo")]
assert not wrong, wrong
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_public_names_exist_and_say_what_they_are():
    import diffusers_eqvae

    assert diffusers_eqvae.__all__
    for name in diffusers_eqvae.__all__:
        doc = getattr(diffusers_eqvae, name).__doc__ if not name.startswith("__") else "dunder"
        assert doc and not doc.startswith(f"{name}("), f"diffusers_eqvae.{name} has no docstring of its own"


def test_papers_name_things_that_exist():
    names = re.findall(r"`([a-z_]+(?:\.\w+)+)`", (ROOT / "PAPERS.md").read_text())
    assert len(names) > 20
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(f"diffusers_eqvae.{module}"), attribute), f"PAPERS.md names {name}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_scripts_are_short_and_explain_themselves(script):
    functions = [node for node in ast.parse(script.read_text()).body if isinstance(node, ast.FunctionDef)]
    (lines,) = (node.end_lineno - node.lineno for node in functions if node.name == "main")
    assert lines <= 75, f"main() of {script.name} has {lines} lines; the loop reads top to bottom on one page"
    result = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout and ast.get_docstring(ast.parse(script.read_text()))


@pytest.mark.parametrize(
    "path", [p for p in text_files() if p.suffix == ".py"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_no_file_is_longer_than_one_idea(path):
    lines = path.read_text().count("\n")
    assert lines <= 450, f"{path.relative_to(ROOT)} has {lines} lines: split it"


def test_no_machine_paths_and_nothing_unfinished():
    machine_path = re.compile(r"(?<![\w./])/(?:work|root)\b|(?<![\w.])/(?:tmp)/")
    unfinished = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME)\b|NotImplemented" + r"Error\(\)")
    for path in text_files():
        for number, line in enumerate(path.read_text(errors="ignore").splitlines(), start=1):
            place = f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
            assert not machine_path.search(line), f"a path of one machine: {place}"
            assert not unfinished.search(line), f"unfinished: {place}"
