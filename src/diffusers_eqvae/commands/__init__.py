"""The `eqvae` commands that are not scripts: each module's `main(argv)` answers to its name."""

from __future__ import annotations

import argparse
from typing import Any

from ..training_utils.option_parser import wrapped


class _HelpFormatter(argparse.HelpFormatter):
    """Sets descriptions at the terminal's width as the scripts' do."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(wrapped(text, width))


def command_parser(name: str, description: str | None, **options: Any) -> argparse.ArgumentParser:
    """The parser of `eqvae NAME`, with the option that all commands have."""
    parser = argparse.ArgumentParser(
        prog=f"eqvae {name}",
        description=description,
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
        **options,
    )
    parser.add_argument(
        "--extension",
        metavar="FILE_OR_MODULE",
        default=argparse.SUPPRESS,  # loaded before this parser is asked
        help="Python file or module that adds a method or a model; repeatable",
    )
    return parser
