"""The training scripts and their presets: beside this file where installed, in training/ of a checkout."""

from pathlib import Path

__path__.append(str(Path(__file__).resolve().parents[3] / "training"))
