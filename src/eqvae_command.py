"""The `eqvae` command: which module answers to which word.

Nothing heavy is imported before a command is known, so that help, version and a mistyped word are answered at once.
"""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Command(NamedTuple):
    """`main(argv)` of a module of the package, in one line, and the extra that installs what it needs."""

    module: str
    summary: str
    extra: str = "train"


COMMANDS = {
    "demo": Command("demo", "run the whole line on a few images in minutes and write a report", "demo"),
    "train-autoencoder": Command("training.train_autoencoder", "fine-tune an autoencoder, or train a new one"),
    "encode-latents": Command("training.encode_latents", "encode images into a latent store"),
    "train-transformer": Command("training.train_transformer", "train a generator on latents"),
    "sample": Command("sampling.sample", "sample many images of a saved pipeline"),
    "evaluate-autoencoder": Command("training.evaluate_autoencoder", "measure reconstructions of N images", "eval"),
    "evaluate-generation": Command("training.evaluate_generation", "measure samples against real images", "eval"),
    "evaluate-perception": Command("training.evaluate_perception", "measure what latents know of classes and depth"),
    "inspect": Command("inspection.run", "write a health card of an autoencoder, beside that of a second", "demo"),
    "compare": Command("commands.compare", "line up result cards and say whether their numbers may be compared"),
    "convert": Command("commands.convert", "turn published weights into a model, or a model into published weights"),
    "export": Command("commands.export", "turn a checkpoint of a run into a pipeline or an autoencoder"),
    "push": Command("commands.push", "publish a finished run on the Hub, also after a push that failed"),
}
USAGE = "usage: eqvae COMMAND [arguments] (eqvae COMMAND --help explains one)"
PACKAGE = "diffusers_eqvae"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; what follows its name is its own. Returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv:
        sys.stderr.write(f"{USAGE}\neqvae: error: name a command: {', '.join(COMMANDS)}\n")
        return 2
    name, *words = argv
    if name in ("-h", "--help"):
        print(help_text())
    elif name == "--version":
        print(f"eqvae {version()}")
    elif name in COMMANDS:
        return run(name, words)
    else:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)[0]
        sys.stderr.write(f"{USAGE}\neqvae: error: unknown command {name!r}; the nearest is {nearest}\n")
        return 2
    return 0


def help_text() -> str:
    """One line a command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    notes = [
        "Every command takes --extension FILE_OR_MODULE (repeatable): a Python file or module that adds a method.",
        "Commands that train, encode, sample or evaluate are the scripts of the same name, on one process; for more:",
        "accelerate launch -m eqvae_command COMMAND [arguments]",
    ]
    head = [USAGE, "", "Autoencoders whose latents are easy to generate.", "", "commands:"]
    return "\n".join([*head, *lines, "", *notes])


def version() -> str:
    """What the package calls `__version__`, read without importing it."""
    text = (Path(__file__).parent / PACKAGE / "__init__.py").read_text("utf-8")
    match = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    return match[1] if match else "unknown"


def run(name: str, words: Sequence[str]) -> int:
    """Loads the extensions among `words`, then calls the command's `main` with the others.

    An error that a user can fix ends in one sentence and status 2 (`errors.run_program`).
    """
    command, arguments = COMMANDS[name], sys.argv
    sys.argv = [f"eqvae {name}", *words]  # what usage, errors and model cards call the program
    try:
        module = importlib.import_module(f"{PACKAGE}.{command.module}")
        errors, extensions = (importlib.import_module(f"{PACKAGE}.{room}") for room in ("errors", "extensions"))

        def called() -> object:
            return module.main(with_own_preset(str(module.__file__), extensions.load_extensions(words)))

        return errors.run_program(f"eqvae {name}", called)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in (PACKAGE, Path(__file__).stem):
            raise
        sys.stderr.write(f"eqvae {name} needs {error.name}: pip install '{PACKAGE}[{command.extra}]'\n")
        return 1
    except KeyboardInterrupt:  # while the module was imported
        sys.stderr.write(f"\neqvae {name}: stopped by Ctrl-C.\n")
        return 130
    finally:
        sys.argv = arguments


def with_own_preset(script: str, words: list[str]) -> list[str]:
    """A first word like sit_b_2.yaml that is no file here is the preset of that name beside the script."""
    if words and words[0].endswith((".yaml", ".yml")) and not Path(words[0]).is_file():
        own = Path(script).parent / "configs" / words[0]
        if own.is_file():
            return [str(own), *words[1:]]
    return words


if __name__ == "__main__":
    sys.exit(main())
