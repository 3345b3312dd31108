"""Latent-space regularisers by name; `--regularizers NAME ...` composes them on one autoencoder."""

from .base import Regularizer
from .equivariance import EquivarianceDraw, EquivarianceRegularizer

__all__ = ["EquivarianceDraw", "EquivarianceRegularizer", "Regularizer"]
