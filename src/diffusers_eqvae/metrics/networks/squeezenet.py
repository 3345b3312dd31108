"""SqueezeNet 1.1, a small network for work without a network connection."""

from __future__ import annotations

import os
from typing import Self

from ...files import read_weights
from ..feature_networks import ModuleFeatures, register_feature_network, weights_file, weights_of

SQUEEZENET_URL = "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth"


@register_feature_network("squeezenet")
class SqueezeNetFeatures(ModuleFeatures):
    """SqueezeNet 1.1's last feature map, averaged (512): a small network (5 MB)."""

    @classmethod
    def from_file(cls, weights: str | os.PathLike[str] | None) -> Self:
        """Of torchvision's weights file (squeezenet1_1-*.pth), which None fetches, or its tensors as .safetensors."""
        path = weights_file(weights, "SqueezeNet", SQUEEZENET_URL, name="squeezenet")
        from torchvision.models import squeezenet1_1

        network = squeezenet1_1(weights=None)
        with weights_of("SqueezeNet 1.1", path):
            network.load_state_dict(read_weights(path))
        return cls(network.features, name="squeezenet1_1", image_size=224, stride=16)
