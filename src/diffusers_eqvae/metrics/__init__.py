"""Measurements of autoencoders and of generated images: metrics, the passes they are computed in, result cards."""

from .equivariance import measure_equivariance
from .reconstruction import psnr

__all__ = ["measure_equivariance", "psnr"]
