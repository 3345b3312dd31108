"""Measurements of autoencoders; each is one function of tensors."""

from .equivariance import measure_equivariance
from .reconstruction import psnr

__all__ = ["measure_equivariance", "psnr"]
