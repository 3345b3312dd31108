"""A regularizer of the latent space: what it draws once per step, and what it does to latents, pixels and the loss.

A method is one file in this folder whose class is decorated with `@register("its_name")`, one import line in
`regularizers/__init__.py`, and its test.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

REGULARIZERS: dict[str, type[Regularizer]] = {}


def register(name: str) -> Callable[[type[Regularizer]], type[Regularizer]]:
    """Makes a regularizer available as `--regularizers NAME`; a name that is taken is refused."""

    def add(cls: type[Regularizer]) -> type[Regularizer]:
        if name in REGULARIZERS:
            raise ValueError(
                f"The regularizer {name!r} is already {REGULARIZERS[name].__name__}; choose another name."
            )
        REGULARIZERS[name] = cls
        return cls

    return add


class Regularizer(nn.Module):
    """Two hooks that compose, `transform` and `penalty`, and the draw that both share.

    One optimizer step calls, in this order and with the same `draw`:

    1. `draw(latent_size, generator)`: every random choice of the step, the same on all ranks and micro-batches;
    2. `augment(pixels, draw)`: the images that are encoded;
    3. `transform(latents, pixels, draw)`: what is decoded, and the images it must become;
    4. `penalty(latents, pixels, draw)`: a term added to the loss, of the untransformed latents.

    Attributes:
        weight: factor of the penalty.
        adaptive: whether the penalty is first scaled so that its gradient at the encoder's last layer is as large as
            that of the reconstruction (`|grad reconstruction| / |grad penalty|`).
    """

    weight: float = 1.0
    adaptive: bool = False

    @classmethod
    def from_arguments(cls, arguments: Any, vae: nn.Module) -> Regularizer:
        """The regularizer that `training_utils.autoencoder.arguments.RegularizerArguments` describe, for `vae`."""
        return cls()

    def draw(self, latent_size: tuple[int, int], generator: torch.Generator) -> Any:
        """The step's random choices for latents of (h, w) cells."""
        return None

    def augment(self, pixels: Tensor, draw: Any) -> Tensor:
        """Pixels (B, 3, H, W) to encode, of any size the autoencoder accepts."""
        return pixels

    def transform(self, latents: Tensor, pixels: Tensor, draw: Any) -> tuple[Tensor, Tensor]:
        """The raw latents to decode and the pixels that their decoding is compared with."""
        return latents, pixels

    def penalty(self, latents: Tensor, pixels: Tensor, draw: Any) -> Tensor | None:
        """A scalar to add to the loss, of raw latents (B, C, h, w) and the pixels they encode; None for nothing."""
        return None

    def frozen_modules(self) -> list[nn.Module]:
        """Networks that help without learning and are no submodules; a run counts them in its memory."""
        return []

    def save_components(self, directory: Path) -> None:
        """Writes networks worth keeping beside the finished autoencoder."""
