"""Runs the whole line on a few images in minutes, on a CPU, and writes a report."""

from ..demo.stages import main

__all__ = ["main"]
