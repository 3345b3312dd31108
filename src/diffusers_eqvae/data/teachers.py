"""Teachers by name: vision models of transformers, and the feature networks that images are measured with."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..metrics.feature_networks import FEATURE_NETWORKS, FeatureNetwork, ModuleFeatures, load_feature_network
from ..models.feature_teacher import FeatureTeacher, load_vision_model, teacher_identity


class NetworkTeacher(FeatureTeacher):
    """The feature map of a network that images are measured with, as a teacher's patch features.

    It stands in for a vision foundation model where none is at hand; what is learnt of it is the network's name and
    not DINOv2's. Images are resized as by `FeatureTeacher`, to the network's mean and deviation. Its map is
    resampled (bilinear, with antialiasing) to one position for every `stride` pixels: convolutions without padding
    leave one or two less. The global feature is the average of the map, which the network itself gives. It ends in no
    LayerNorm, so that there is no before and after (`final_norm` is None).

    Own choice: the map, its average, and the resampling.

    Args:
        network: with a `stride`.
        image_size: side in pixels of the squares that it sees; a multiple of the stride.

    Example:
        >>> teacher = NetworkTeacher(load_feature_network("squeezenet"), image_size=256)
        >>> patch, mean = teacher(torch.zeros(1, 3, 128, 128))
        >>> patch.shape, mean.shape
        (torch.Size([1, 512, 16, 16]), torch.Size([1, 512]))
    """

    def __init__(self, network: FeatureNetwork, *, image_size: int = 448) -> None:
        nn.Module.__init__(self)
        stride = getattr(network, "stride", None)
        if not isinstance(network, ModuleFeatures) or stride is None:
            raise ValueError(
                f"The feature network {network.name} gives one feature of an image, and a teacher gives one of every "
                "region; name one that has a feature map (its `stride`), such as squeezenet, or a vision model of "
                "transformers by its Hub name or directory."
            )
        if image_size <= 0 or image_size % stride:
            raise ValueError(
                f"The teacher's image size must be a positive multiple of the stride {stride} of {network.name}; got "
                f"{image_size}."
            )
        self._set(network.module, image_size, stride, network.mean.flatten().tolist(), network.std.flatten().tolist())
        self.network_name, self.network_hash, self._output = network.name, network.weights_hash, network.output
        self.final_norm, self.has_global = None, True
        self.feature_size = self._channels()

    def _channels(self) -> int:
        """D of its map of a black image; refuses another stride than the one it states, and an image too small."""
        side, stride = self.image_size, self.patch_size
        try:
            with torch.no_grad():
                shape = tuple(self._output(self.mean.new_zeros(1, 3, side, side)).shape)
        except RuntimeError as error:
            raise ValueError(
                f"{self.network_name} cannot see images of {side} px; show it larger ones: {error}"
            ) from error
        if len(shape) != 4 or max(abs(side - length * stride) for length in shape[2:]) > 2 * stride:
            raise ValueError(
                f"{self.network_name} states a stride of {stride}, and must give about {side // stride} positions a "
                f"side of {side} px; got a map {shape}."
            )
        return shape[1]

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """As a vision model's; its hash is the one that result cards state of the network."""
        return {
            "feature_size": self.feature_size,
            "norm_eps": None,
            "teacher": self.network_name,
            "teacher_type": self.network_name,
            "teacher_hash": self.network_hash,
            "teacher_layers": None,
            "teacher_image_size": self.image_size,
        }

    @property
    def last_norm(self) -> None:
        """It has none."""

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self._output(images).float()
        average, grid = features.mean((2, 3)), self.grid(images)
        if features.shape[-2:] != grid:
            features = F.interpolate(features, size=grid, mode="bilinear", align_corners=False, antialias=True)
        return features.contiguous(), average


def network_name(teacher: str | os.PathLike[str]) -> str | None:
    """NAME, where a teacher is given as "NAME" or "NAME=WEIGHTS" of a feature network; None of a vision model.

    Example:
        >>> network_name("squeezenet=squeezenet1_1.pth"), network_name("facebook/dinov2-base")
        ('squeezenet', None)
    """
    name, given, _ = str(teacher).partition("=")
    return name if (given or name in FEATURE_NETWORKS) and not Path(teacher).is_dir() else None


def load_teacher(
    name_or_path: str | os.PathLike[str],
    *,
    image_size: int = 448,
    grid: tuple[int, int] | None = None,
    final_norm: bool = True,
) -> FeatureTeacher:
    """A teacher in float32, frozen.

    Args:
        name_or_path: a Hub name or directory of a vision model of transformers; or NAME=WEIGHTS of a feature network
            (`metrics.FEATURE_NETWORKS`), or its NAME alone, which fetches the published weights.
        image_size: side in pixels of the squares that it sees.
        grid: (h, w) features of an image, from which that side follows in place of `image_size`.
        final_norm: of a vision model, see `FeatureTeacher`; a network has no LayerNorm at its end.

    Raises:
        FileNotFoundError: no such weights.
        ValueError: no network of that name, or one that gives no features of regions.

    Example:
        >>> load_teacher("squeezenet=squeezenet1_1.pth", image_size=256).feature_size
        512
    """
    if network_name(name_or_path):
        network = load_feature_network(str(name_or_path))
        side = image_size if grid is None else min(grid) * (getattr(network, "stride", None) or 1)
        return NetworkTeacher(network, image_size=side)
    model = load_vision_model(name_or_path)
    side = image_size if grid is None else min(grid) * int(model.config.patch_size)
    return FeatureTeacher(model, image_size=side, final_norm=final_norm)


def identity_of(name_or_path: str | os.PathLike[str]) -> dict[str, Any]:
    """`teacher_identity`; of a feature network its name and the hash of its weights, which are loaded for that."""
    if not network_name(name_or_path):
        return teacher_identity(name_or_path)
    network = load_feature_network(str(name_or_path))
    return {"teacher": network.name, "files": network.weights_hash}
