"""The `eqvae` command: which file answers to which word.

A command is a script of training/ or pipelines/, or a module of commands/: the name of its file with dashes, explained
by the first line of its docstring. Nothing heavy is imported before a command is known, so that help, version and a
mistyped word are answered at once.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

PACKAGE = "diffusers_eqvae"
HOME = Path(__file__).resolve().parent / PACKAGE
# Room of the package -> where its files lie in a checkout; beside the package's modules where it is installed.
SCRIPTS = {"training": HOME.parents[1] / "training", "sampling": HOME.parents[1] / "pipelines"}
ROOMS = SCRIPTS | {"commands": HOME / "commands"}
USAGE = "usage: eqvae COMMAND [arguments] (eqvae COMMAND --help explains one)"


class Command(NamedTuple):
    """A file with `main(argv)`, in which room of the package it is a module."""

    room: str
    path: Path

    @property
    def module(self) -> str:
        return f"{PACKAGE}.{self.room}.{self.path.stem}"

    @property
    def is_script(self) -> bool:
        return self.room in SCRIPTS

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        with self.path.open(encoding="utf-8") as file:
            return file.readline().lstrip("r").strip().strip('"')


def list_commands() -> dict[str, Command]:
    """Every command by name: scripts first."""
    found = {}
    for room, in_checkout in ROOMS.items():
        for folder in (HOME / room, in_checkout):
            for path in sorted(folder.glob("[!_]*.py")):
                found[path.stem.replace("_", "-")] = Command(room, path)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; what follows its name is its own. Returns the exit status."""
    name, *words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    commands = list_commands()
    if name in ("-h", "--help"):
        print(help_text(commands))
    elif name == "--version":
        print(f"eqvae {version()}")
    elif name in commands:
        return run(name, commands[name], words)
    else:
        nearest = difflib.get_close_matches(name, commands, n=1, cutoff=0.0)[0]
        sys.stderr.write(f"{USAGE}\neqvae: error: unknown command {name!r}; the nearest is {nearest}\n")
        return 2
    return 0


def help_text(commands: dict[str, Command]) -> str:
    """One line a command."""
    width = max(map(len, commands))

    def lines(scripts: bool) -> list[str]:
        listed = [(name, command) for name, command in commands.items() if command.is_script is scripts]
        return [f"  {name:{width}}  {command.summary}" for name, command in listed]

    head = [USAGE, "", "Autoencoders whose latents are easy to generate, and the generators trained on them.", ""]
    notes = [
        "A script runs in this process on one device, and on all of them where there are several. Options of",
        "accelerate launch stand before its own: eqvae train-transformer --num_processes 4 -- sit_b_2 --seed 1",
        "Every command takes --extension FILE_OR_MODULE (repeatable): a Python file or module that adds a method.",
    ]
    return "\n".join([*head, "scripts:", *lines(True), "", "other commands:", *lines(False), "", *notes])


def version() -> str:
    """What the package calls `__version__`, read without importing it."""
    text = (HOME / "__init__.py").read_text("utf-8")
    match = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    return match[1] if match else "unknown"


def run(name: str, command: Command, words: list[str]) -> int:
    """Loads the extensions among `words`, then calls the command's `main` with the others.

    A script whose words have a part before `--`, or which finds several devices, goes on in `accelerate launch`.
    An error that a user can fix ends in one sentence and status 2 (`errors.run_program`).
    """
    arguments = sys.argv
    sys.argv = [f"eqvae {name}", *words]  # what usage, errors and model cards call the program
    try:
        module = importlib.import_module(command.module)
        errors, extensions = (importlib.import_module(f"{PACKAGE}.{room}") for room in ("errors", "extensions"))

        def called() -> object:
            if command.is_script:
                launch_where_wanted(module, words)
            return module.main(extensions.load_extensions(words))

        return errors.run_program(f"eqvae {name}", called)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in (PACKAGE, Path(__file__).stem):
            raise
        sys.stderr.write(f"eqvae {name} needs {error.name}: pip install '{what_installs(error.name)}'\n")
        return 1
    except KeyboardInterrupt:  # while the module was imported
        sys.stderr.write(f"\neqvae {name}: stopped by Ctrl-C.\n")
        return 130
    finally:
        sys.argv = arguments


def launch_where_wanted(script: ModuleType, words: list[str]) -> None:
    """Becomes `accelerate launch OPTIONS -m SCRIPT WORDS` for `OPTIONS -- WORDS`, or where there are several devices.

    Raises:
        ValueError: there are options for a launcher, and the script is one that RUNS_ALONE.
    """
    alone = getattr(script, "RUNS_ALONE", False)
    if "--" in words:
        options, words = words[: words.index("--")], words[words.index("--") + 1 :]
        if alone:
            raise ValueError(f"This command runs in one process; leave out what stands before --: {options}.")
    else:
        processes = importlib.import_module(f"{PACKAGE}.training_utils.launch")
        if alone or {"-h", "--help"} & set(words) or not processes.is_alone_with_several_devices():
            return
        options = []
    sys.stdout.flush()
    launcher = ["-m", "accelerate.commands.launch", "--quiet"]  # what ended the script is said by the script
    os.execv(sys.executable, [sys.executable, *launcher, *options, "-m", script.__name__, *words])


def what_installs(module: str) -> str:
    """The requirement that brings a module: the package with an extra, where one has it."""
    name = module.partition(".")[0].replace("_", "-")
    try:
        requirements = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        requirements = []
    for requirement in requirements:
        match = re.match(r'([\w.-]+).*extra == "(\w+)"', requirement)
        if match and match[1].replace("_", "-") == name:
            return f"{PACKAGE}[{match[2]}]"
    return name


if __name__ == "__main__":
    sys.exit(main())
