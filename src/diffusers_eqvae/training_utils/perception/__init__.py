"""Perception of latents: its command-line arguments, and what it is built from."""
