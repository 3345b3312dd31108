"""What the faults are tried on: the tiny runs of tests/training_utils."""

from ..training_utils.conftest import fresh_accelerate, make_model, make_run, numbers

__all__ = ["fresh_accelerate", "make_model", "make_run", "numbers"]
