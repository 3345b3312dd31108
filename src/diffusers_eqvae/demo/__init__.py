"""`eqvae demo`: the whole line on a few pictures, by the real command lines of the scripts, in minutes on a CPU."""

from .line import main

__all__ = ["main"]
