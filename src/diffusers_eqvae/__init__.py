"""Autoencoders whose latents are easy to generate, and class-conditional generators trained on them."""

__version__ = "0.1.0"
