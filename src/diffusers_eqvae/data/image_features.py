"""Frozen networks whose features of images are stored beside latents, so that training need not run them again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from ..autoencoders import downsampling_factor, last_encoder_layer
from ..provenance import autoencoder_identity
from .latent_format import FeatureSettings, feature_tensor
from .teachers import identity_of, load_teacher, network_name

ENCODER = "vae_encoder"


class FeatureNetwork(nn.Module):
    """Gives features of images, each under a name.

    Called with pixels (B, 3, H, W), and what the last convolution of the autoencoder's encoder read of them, it gives
    "features.NAME" -> (B, F, h, w) or (B, F).

    Attributes:
        features: what it gives, by name, as it is stored.
        reads_encoder: whether it needs the images to be encoded at the same time.
    """

    features: dict[str, FeatureSettings]
    reads_encoder = False


class EncoderFeatures(FeatureNetwork):
    """What the last convolution of the autoencoder's encoder reads, averaged over the cells of a grid (`vae_repa`).

    Example:
        >>> EncoderFeatures(vae, (16, 16), dtype="float16").features["vae_encoder"].shape
        (512, 16, 16)
    """

    reads_encoder = True

    def __init__(self, vae: nn.Module, grid: tuple[int, int], *, dtype: str) -> None:
        super().__init__()
        identity = {"encoder": autoencoder_identity(vae)["encoder"]["float32"]}
        self.grid = grid
        self.features = {ENCODER: FeatureSettings((last_encoder_layer(vae).in_channels, *grid), dtype, identity)}

    def forward(self, pixels: Tensor, seen: Sequence[Tensor]) -> dict[str, Tensor]:
        return {feature_tensor(ENCODER): F.adaptive_avg_pool2d(seen[-1].float(), self.grid)}


class TeacherFeatures(FeatureNetwork):
    """Patch features of a teacher (`data.teachers.load_teacher`), whose patches are the cells of a grid.

    They are those after its last LayerNorm, as `repa` reads them, or those before it and with them the global feature
    ("NAME.global"), as `alignment` does. A network that ends in no LayerNorm serves both.

    Example:
        >>> TeacherFeatures("facebook/dinov2-base", (16, 16), dtype="float16").features
        {'dinov2-base': FeatureSettings(shape=(768, 16, 16), dtype='float16', ...)}
    """

    def __init__(
        self, name_or_path: str | os.PathLike[str], grid: tuple[int, int], *, dtype: str, before_norm: bool = False
    ) -> None:
        super().__init__()
        self.teacher = load_teacher(name_or_path, grid=grid, final_norm=not before_norm)
        identity = {**self.teacher.metadata, **identity_of(name_or_path), "final_norm": self.teacher.final_norm}
        name, channels = feature_name(name_or_path), self.teacher.feature_size
        self.name, self.features = name, {name: FeatureSettings((channels, *grid), dtype, identity)}
        if not self.teacher.final_norm and self.teacher.has_global:
            self.features[global_name(name)] = FeatureSettings((channels,), dtype, identity)

    def forward(self, pixels: Tensor, seen: Sequence[Tensor]) -> dict[str, Tensor]:
        patch, cls = self.teacher(pixels)
        given = {self.name: patch} | ({} if cls is None else {global_name(self.name): cls})
        return {feature_tensor(name): values for name, values in given.items() if name in self.features}


def feature_name(teacher: str | os.PathLike[str]) -> str:
    """What the features of a teacher are called: the last part of its name or path, or the NAME of NAME=WEIGHTS.

    Example:
        >>> feature_name("facebook/dinov2-base"), feature_name("squeezenet=squeezenet1_1.pth")
        ('dinov2-base', 'squeezenet')
    """
    return network_name(teacher) or Path(teacher).name or Path(teacher).resolve().name


def global_name(name: str) -> str:
    """What the global features beside patch features are called."""
    return f"{name}.global"


def feature_networks(
    names: Sequence[str],
    vae: nn.Module,
    *,
    resolution: int,
    grid: int | None = None,
    dtype: str = "float16",
    before_norm: bool = False,
) -> list[FeatureNetwork]:
    """The networks of these names: `vae_encoder`, or teachers by name (`data.teachers.load_teacher`).

    Args:
        resolution: side of the images in pixels.
        grid: cells along a side; None takes one for every 2 x 2 latent positions, a transformer's patches of 2.
        before_norm: of teachers, see `TeacherFeatures`.

    Raises:
        ValueError: two of one name, or a grid that the latent positions are no multiple of.

    Example:
        >>> feature_networks(["vae_encoder", "facebook/dinov2-base"], vae, resolution=256)
    """
    called = [name if name == ENCODER else feature_name(name) for name in names]
    if repeated := [name for name in called if called.count(name) > 1]:
        raise ValueError(f"Features have names of their own, and {repeated[0]} is given twice; rename a directory.")
    side = resolution // downsampling_factor(vae)
    cells = max(side // 2, 1) if grid is None else grid
    if ENCODER in names and side % cells:
        raise ValueError(
            f"The features {ENCODER} are averages over equal cells, so the grid must divide the {side} latent "
            f"positions of a side; got {cells}."
        )
    options = {"dtype": dtype}
    return [
        EncoderFeatures(vae, (cells, cells), **options)
        if name == ENCODER
        else TeacherFeatures(name, (cells, cells), before_norm=before_norm, **options)
        for name in names
    ]
