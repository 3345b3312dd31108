"""Publishes a finished run on the Hub, also after a push that failed."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..hub import prepare_push, push_run
from . import command_parser


def main(argv: Sequence[str]) -> int:
    parser = command_parser("push", __doc__)
    parser.add_argument("run", help="directory of a finished run (the --output_dir of the training script)")
    parser.add_argument("--hub_model_id", required=True, help="repository to push to, made if missing: owner/name")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch to commit to, made if missing (default: main)")
    parser.add_argument("--commit_message", help="default: Upload NAME")
    parser.add_argument("--license", help="licence stated on the model card, e.g. apache-2.0 (default: none stated)")
    parser.add_argument("--dry_run", action="store_true", help="print the files and the model card, upload nothing")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")

    if arguments.dry_run:
        files, card = prepare_push(arguments.run, arguments.hub_model_id, license=arguments.license)
        print("\n".join(files), card, sep="\n\n")
        return 0
    pushed = push_run(
        arguments.run,
        arguments.hub_model_id,
        private=arguments.private,
        revision=arguments.revision,
        commit_message=arguments.commit_message,
        license=arguments.license,
    )
    return 0 if pushed else 1
