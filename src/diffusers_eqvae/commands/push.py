"""Publishes a finished run or a latent store on the Hub, also after a push that failed."""

from __future__ import annotations

from collections.abc import Sequence

from ..hub import prepare_push, push_run
from ..training_utils.console import start_logging
from . import command_parser


def main(argv: Sequence[str]) -> int:
    parser = command_parser("push", __doc__)
    parser.add_argument("output_dir", metavar="RUN", help="directory of a finished run or of a latent store")
    parser.add_argument("--hub_model_id", required=True, help="repository to push to, created if missing: owner/name")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch to commit to, created if missing (default: main)")
    parser.add_argument("--commit_message", help="default: Upload NAME")
    parser.add_argument("--license", help="licence stated on the card, e.g. apache-2.0 (default: none stated)")
    parser.add_argument(
        "--hub_images",
        choices=("none", "validation"),
        help="images on the card (default: those that show nothing of a local folder)",
    )
    parser.add_argument(
        "--with_code",
        action="store_true",
        help="also commit it to the branch code with the sources of its classes, which opens without this package",
    )
    parser.add_argument("--dry_run", action="store_true", help="print the files and the model card, upload nothing")
    options = vars(parser.parse_args(argv))
    start_logging(format="%(levelname)s: %(message)s")
    repo_id, dry_run = options.pop("hub_model_id"), options.pop("dry_run")
    if not dry_run:
        return 0 if push_run(repo_id=repo_id, **options) else 1
    files, card = prepare_push(
        options["output_dir"], repo_id, license=options["license"], hub_images=options["hub_images"]
    )
    print("\n".join(files), card, sep="\n\n")
    return 0
