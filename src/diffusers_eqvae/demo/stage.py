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

ROOT = Path(__file__).resolve().parents[3]
DONE = "stage.json"


_RUNNING: set[subprocess.Popen[bytes]] = set()


def end_with_stages(number: int, frame: object) -> None:
    """A signal handler: whoever ends the demo ends the stages that run, and then the demo by that signal."""
    for process in _RUNNING:
        process.send_signal(number)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


@dataclass(frozen=True)
class Stage:
    """One command, and the directory that it fills."""

    name: str
    command: list[str]
    directory: Path

    @property
    def record(self) -> dict[str, Any]:
        """What the directory says about the run that filled it: commands and seconds; empty where there was none."""
        path = self.directory / DONE
        return json.loads(path.read_text()) if path.is_file() else {}

    def run(self, before: Sequence[Stage] = (), *, threads: int = 2, bar: int = 1) -> None:
        """Runs the command, unless it and those of the stages `before` it have run with the same words.

        Args:
            threads: of its process.
            bar: line of the terminal that its progress bar goes to.
        """
        commands = [stage.command for stage in (*before, self)]
        if self.record.get("commands") == commands:
            tqdm.write(f"[{self.name}] has run before")
            return
        tqdm.write(f"\n[{self.name}]\n$ {shlex.join(self.command)}")
        delete(self.directory)  # the demo's own: see its `OutputDirectory`
        start = time.perf_counter()
        # The stages see the package that runs the demo, also when it is not installed.
        path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
        environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "TQDM_POSITION": str(bar)}
        with subprocess.Popen([sys.executable, *self.command], env=os.environ | environment) as process:
            _RUNNING.add(process)
            status = process.wait()
            _RUNNING.discard(process)
        if status:
            raise SystemExit(f"The stage {self.name} failed (exit status {status}); its output is above.")
        write_json(self.directory / DONE, {"commands": commands, "seconds": time.perf_counter() - start})
