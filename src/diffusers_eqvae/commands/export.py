"""Turns a checkpoint of a run into what the finished run would have left: a pipeline, or an autoencoder.

eqvae export runs/sit runs/sit-so-far
eqvae export runs/eq-vae/checkpoints/step-00005000 exports/epoch-1 --weights model
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from ..directories import require_apart
from ..remote_code import copy_with_code
from ..training_utils.checkpoints import MARKER, complete_checkpoints, read_marker
from ..training_utils.command_line import RESOLVED_ARGUMENTS
from ..training_utils.presets import read_preset
from . import command_parser

# What the script shall not do again beside writing the result.
QUIET = {"validation_steps": 0, "checkpointing_steps": 0, "report_to": "none", "push_to_hub": "false"}


def main(argv: Sequence[str]) -> int:
    parser = command_parser("export", __doc__)
    parser.add_argument(
        "source", metavar="RUN_OR_CHECKPOINT", help="directory of a run (its newest checkpoint), or of one"
    )
    parser.add_argument("destination", help="new directory")
    parser.add_argument(
        "--weights", choices=("ema", "model"), default="ema", help="the moving average (default), or not"
    )
    parser.add_argument(
        "--with_code",
        action="store_true",
        help="also write DESTINATION-code, with the sources of its classes, which opens without this package",
    )
    options = parser.parse_args(argv)
    checkpoint = _checkpoint(Path(options.source))
    run = checkpoint.parent.parent
    if not (run / RESOLVED_ARGUMENTS).is_file():
        raise ValueError(f"{run} holds no {RESOLVED_ARGUMENTS}, which says how to build what {checkpoint.name} holds.")
    trained = read_preset(run / RESOLVED_ARGUMENTS)
    if "use_ema" not in trained:
        raise ValueError(
            f"{run / RESOLVED_ARGUMENTS} does not say use_ema, so it is not what the run wrote; restore it from "
            "resolved_arguments.json beside it."
        )
    require_apart(options.destination, {"RUN_OR_CHECKPOINT": run})
    transformer = "model" in trained
    words = QUIET | {"output_dir": options.destination, "resume_from_checkpoint": checkpoint}
    words["max_train_steps"] = read_marker(checkpoint)["step"]  # all of them are done
    if transformer:
        words["evaluation_steps"] = 0
    allowed = ["max_train_steps"]
    if options.weights == "model" and trained["use_ema"]:
        words["use_ema"] = "false"
        allowed.append("use_ema")
    script = importlib.import_module(
        f"..training.train_{'transformer' if transformer else 'autoencoder'}", __package__
    )
    flags = [str(word) for name, value in words.items() for word in (f"--{name}", value)]
    script.main([str(run / RESOLVED_ARGUMENTS), *flags, "--allow_changes", *allowed])
    if options.with_code:
        code = Path(f"{options.destination}-code")
        copy_with_code(Path(options.destination), code)
        print(f"{code} holds the same with its classes: it opens where this package is not, by trust_remote_code.")
    return 0


def _checkpoint(source: Path) -> Path:
    """The directory of a checkpoint that `source` is, or the newest one of the run that it is."""
    if (source / MARKER).is_file():
        return source.resolve()
    complete = complete_checkpoints(source)
    if not complete:
        raise ValueError(
            f"{source} is neither a complete checkpoint nor the directory of a run that has one. A finished run is "
            "what it would be exported to; published weights are read by eqvae convert."
        )
    return complete[-1].resolve()
