"""Latent-space regularizers by name; `--regularizers NAME ...` composes them on one autoencoder."""

from .alignment import AlignmentRegularizer
from .base import REGULARIZERS, Regularizer, register
from .equivariance import EquivarianceDraw, EquivarianceRegularizer

__all__ = [
    "REGULARIZERS",
    "AlignmentRegularizer",
    "EquivarianceDraw",
    "EquivarianceRegularizer",
    "Regularizer",
    "register",
]
