"""Are this autoencoder's latents easy to generate?

Writes card.html, card.png, card.json and a card for `eqvae compare` of each model.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..inspection.run import run_inspection
from . import command_parser


def main(argv: Sequence[str]) -> int:
    parser = command_parser("inspect", __doc__)
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
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")

    try:
        inspections = run_inspection(**vars(arguments))
    except RuntimeError as error:  # of torch, for a device that is not there
        if arguments.device == "cpu":
            raise
        raise ValueError(f"--device {arguments.device} cannot be used: {error}") from error
    for inspection in inspections:
        print(f"{inspection.name}: {inspection.verdict.level}. {inspection.verdict.headline}")
        print(*(f"  - {reason}" for reason in inspection.verdict.reasons), sep="\n")
    print(f"The card: {arguments.output_dir}/card.html")
    return 0
