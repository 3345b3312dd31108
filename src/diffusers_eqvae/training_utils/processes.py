"""The processes of a script: which ones a launcher started, and how one ends after an error that a user can mend."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def runs_on_cpu() -> bool:
    """Whether there is no accelerator, or ACCELERATE_USE_CPU says not to use it.

    accelerate must be told: else it takes the ranks that torchrun starts on a CPU for programs on their own.
    """
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def build_state() -> PartialState:
    """The processes of a script that does not train; they wait at its end for the slowest, however long."""
    return PartialState(cpu=runs_on_cpu(), timeout=timedelta(days=7))


def run_script(main: Callable[[], object]) -> NoReturn:
    """Ends the program with what `main` has to say: status 0, or one sentence and status 2 for what a user can mend.

    EQVAE_TRACEBACK=1 shows where that was said; other errors show it always.
    """
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("EQVAE_TRACEBACK"):
            raise
        sys.stderr.write(
            f"{Path(sys.argv[0]).name}: error: {error}\n(EQVAE_TRACEBACK=1 shows the place in the code.)\n"
        )
        sys.exit(2)
    sys.exit(0)
