"""The `eqvae` command. Each sub-command owns its arguments and imports what it needs when it is called."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

from diffusers_eqvae import __version__


def push(argv: Sequence[str]) -> int:
    """publish a finished run on the Hub, also after a push that failed"""
    from diffusers_eqvae.hub import main as run_push

    return run_push(argv)


def demo(argv: Sequence[str]) -> int:
    """run the whole line on a few images in minutes and write a report"""
    try:
        from diffusers_eqvae.demo import main as run_demo
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("diffusers_eqvae"):
            raise
        print(f"eqvae demo needs {error.name}: pip install 'diffusers_eqvae[demo]'", file=sys.stderr)
        return 1
    return run_demo(list(argv)) or 0


def compare(argv: Sequence[str]) -> int:
    """line up result cards and say whether their numbers may be compared"""
    parser = argparse.ArgumentParser(
        prog="eqvae compare", description=compare.__doc__, epilog="Exit status 1: they may not be compared."
    )
    parser.add_argument("cards", nargs="+", help="two or more of those that the evaluate_ scripts or inspect wrote")
    arguments = parser.parse_args(argv)

    from diffusers_eqvae.metrics.result_card import ResultCard, compare_cards

    try:
        result = compare_cards(arguments.cards, [ResultCard.load(path) for path in arguments.cards])
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print("\n".join(result.table))
    if not result.incomparable:
        print("\nThe numbers may be compared.")
        return 0
    print("\nThe numbers cannot be compared:", *result.incomparable, sep="\n- ")
    return 1


def inspect(argv: Sequence[str]) -> int:
    """write a health card of an autoencoder, beside that of a second one"""
    try:
        from diffusers_eqvae.inspection.run import main as run_inspect

        return run_inspect(argv)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"eqvae inspect: error: {error}\n")
        sys.exit(2)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("diffusers_eqvae"):
            raise
        print(f"eqvae inspect needs {error.name}: pip install 'diffusers_eqvae[demo]'", file=sys.stderr)
        return 1


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "push": push,
    "demo": demo,
    "inspect": inspect,
    "compare": compare,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; what follows its name is its own. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    summaries = "\n".join(f"  {name:8}{command.__doc__}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="eqvae",
        usage="eqvae COMMAND [arguments] (eqvae COMMAND --help explains one)",
        description=f"Autoencoders whose latents are easy to generate.\n\ncommands:\n{summaries}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"eqvae {__version__}")
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    command = parser.parse_args(argv[:1]).command
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    program, sys.argv[0] = sys.argv[0], f"eqvae {command}"
    try:
        return COMMANDS[command](argv[1:])
    finally:
        sys.argv[0] = program


if __name__ == "__main__":
    sys.exit(main())
