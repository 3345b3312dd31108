"""The sampling scripts: beside this file where installed, in pipelines/ of a checkout."""

from pathlib import Path

__path__.append(str(Path(__file__).resolve().parents[3] / "pipelines"))
