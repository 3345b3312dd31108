"""The discriminator inside a training checkpoint of taming-transformers or latent-diffusion."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from ..models.discriminator import PatchDiscriminator
from ._files import read_published

PREFIX = "loss.discriminator.main."
IDLE = re.compile(r"\d+\.(running_mean|running_var|num_batches_tracked)")


def read_taming_discriminator(path: str | Path) -> PatchDiscriminator:
    """The PatchGAN of a .ckpt (`loss.discriminator.main.*`), its sizes inferred; nothing in the file is executed.

    The running statistics of its batch norms are left out: this project's has none, as it never uses them (both
    trainers keep the discriminator in training mode).

    Raises:
        ValueError: a file without such tensors, or with one that a PatchGAN with batch norm has not, or has in
            another shape.

    Example:
        >>> discriminator = read_taming_discriminator("vqgan_imagenet_f16.ckpt")
    """
    tensors = read_published(path)
    found = {name.removeprefix(PREFIX): each for name, each in tensors.items() if name.startswith(PREFIX)}
    kernels = [name for name, each in found.items() if each.ndim == 4 and name.endswith(".weight")]
    if len(kernels) < 3 or "0.weight" not in kernels:
        raise ValueError(f"{path} holds no discriminator: there are no tensors {PREFIX}*, of 3 convolutions or more.")
    base_channels, in_channels = found["0.weight"].shape[:2]
    with torch.device("meta"):
        sizes = {"in_channels": in_channels, "base_channels": base_channels, "num_layers": len(kernels) - 2}
        expected = {
            name.removeprefix("layers."): each for name, each in PatchDiscriminator(**sizes).state_dict().items()
        }
    given = {name: each.float() for name, each in found.items() if not IDLE.fullmatch(name)}
    for name in sorted({*expected, *given}):
        _require_same(path, name, expected.get(name), given.get(name))
    discriminator = PatchDiscriminator(**sizes)
    discriminator.load_state_dict({f"layers.{name}": each for name, each in given.items()})
    return discriminator


def _require_same(path: str | Path, name: str, expected: Tensor | None, given: Tensor | None) -> None:
    shapes = ["nothing" if each is None else str(tuple(each.shape)) for each in (expected, given)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"The discriminator in {path} is not a PatchGAN with batch norm: {PREFIX}{name} should be "
            f"{shapes[0]} and is {shapes[1]}. Train a new one."
        )
