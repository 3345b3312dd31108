"""Writes a health card of an autoencoder, beside that of a second one."""

from ..inspection.run import main

__all__ = ["main"]
