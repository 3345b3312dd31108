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
    parser = argparse.ArgumentParser(
        prog="eqvae inspect",
        description="Are this autoencoder's latents easy to generate? Writes card.html, card.png, card.json and a "
        "card for `eqvae compare` of each model.",
    )
    parser.add_argument("model", help="diffusers autoencoder, or pipeline with one in vae/: directory or Hub name")
    parser.add_argument("--compare", metavar="MODEL", help="a second one, drawn beside the first")
    parser.add_argument("--data", required=True, help="folder of images")
    parser.add_argument("--output_dir", required=True, help="where the card is written")
    parser.add_argument("--subfolder", help="folder of the autoencoder inside MODEL, e.g. vae")
    parser.add_argument("--compare_subfolder", help="the same for --compare")
    parser.add_argument(
        "--resolution", type=int, default=256, help="side of the centre crops in pixels (default: 256)"
    )
    parser.add_argument("--num_images", type=int, default=24, help="images, evenly spaced in --data (default: 24)")
    parser.add_argument("--device", default="cpu", help="where the networks run, e.g. cuda (default: cpu)")
    parser.add_argument("--lpips_net", choices=["vgg", "alex", "squeeze"], default="squeeze", help="LPIPS network")
    parser.add_argument("--lpips_backbone_weights", help="its ImageNet weights; LPIPS is measured if these are given")
    parser.add_argument("--lpips_linear_weights", help="its linear heads, v0.1")
    arguments = parser.parse_args(argv)

    from diffusers_eqvae.inspection.run import run_inspection

    try:
        inspections = run_inspection(**vars(arguments))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except RuntimeError as error:  # of torch, for a device that is not there
        if arguments.device == "cpu":
            raise
        parser.error(f"--device {arguments.device} cannot be used: {error}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("diffusers_eqvae"):
            raise
        print(f"eqvae inspect needs {error.name}: pip install 'diffusers_eqvae[demo]'", file=sys.stderr)
        return 1
    for inspection in inspections:
        print(f"{inspection.name}: {inspection.verdict.level}. {inspection.verdict.headline}")
        print(*(f"  - {reason}" for reason in inspection.verdict.reasons), sep="\n")
    print(f"The card: {arguments.output_dir}/card.html")
    return 0


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
    return COMMANDS[command](argv[1:])


if __name__ == "__main__":
    sys.exit(main())
