"""Methods that make a latent space easier to generate; `--regularizers NAME ...` composes them."""

from .alignment import AlignmentRegularizer
from .base import (
    REGULARIZERS,
    AutoencoderRegularizer,
    AutoencoderState,
    GeneratorRegularizer,
    GeneratorState,
    Regularizer,
    register_regularizer,
)
from .equivariance import EquivarianceDraw, EquivarianceRegularizer

__all__ = [
    "REGULARIZERS",
    "AlignmentRegularizer",
    "AutoencoderRegularizer",
    "AutoencoderState",
    "EquivarianceDraw",
    "EquivarianceRegularizer",
    "GeneratorRegularizer",
    "GeneratorState",
    "Regularizer",
    "register_regularizer",
]
