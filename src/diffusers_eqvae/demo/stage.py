"""One command of the demo, run as a program of its own and not again."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..files import delete, write_json

# Where the package and its command are imported from, for stages of a demo that is not installed.
IMPORTED_FROM = Path(__file__).resolve().parents[2]
DONE = "stage.json"
PROGRAM = [sys.executable, "-m", "eqvae_command"]

_RUNNING: set[subprocess.Popen[bytes]] = set()


def end_with_stages(number: int, frame: object) -> None:
    """A signal handler: whoever ends the demo ends the stages that run, and then the demo by that signal."""
    for process in _RUNNING:
        process.send_signal(number)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


@dataclass(frozen=True)
class Stage:
    """Words after `eqvae`, and the directory that they fill.

    Attributes:
        expected_seconds: on one CPU core; only their proportions matter, to foretell the end.
    """

    name: str
    command: list[str]
    directory: Path
    expected_seconds: float = 1.0

    @property
    def record(self) -> dict[str, Any]:
        """What the directory says about the run that filled it: commands and seconds; empty where there was none."""
        path = self.directory / DONE
        return json.loads(path.read_text()) if path.is_file() else {}

    def run(self, before: Sequence[Stage] = (), *, bar: int = 1) -> None:
        """Runs the command on one thread, unless it and those of the stages `before` it have run with the same words.

        Args:
            bar: line of the terminal that its progress bar goes to.
        """
        commands = [stage.command for stage in (*before, self)]
        if self.record.get("commands") == commands:
            tqdm.write(f"[{self.name}] has run before")
            return
        tqdm.write(f"\n[{self.name}]\n$ eqvae {shlex.join(self.command)}")
        delete(self.directory)  # the demo's own: see its `OutputDirectory`
        start = time.perf_counter()
        path = os.pathsep.join(filter(None, [str(IMPORTED_FROM), os.environ.get("PYTHONPATH")]))
        environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TQDM_POSITION": str(bar)}
        with subprocess.Popen([*PROGRAM, *self.command], env=os.environ | environment) as process:
            _RUNNING.add(process)
            status = process.wait()
            _RUNNING.discard(process)
        if status:
            raise SystemExit(f"The stage {self.name} failed (exit status {status}); its output is above.")
        write_json(self.directory / DONE, {"commands": commands, "seconds": time.perf_counter() - start})
