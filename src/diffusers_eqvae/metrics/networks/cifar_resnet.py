"""A ResNet for CIFAR-10, for images of 32 px."""

from __future__ import annotations

import os
import re
from typing import Any, Self

from ...files import read_weights
from ..cifar_resnet import CifarResNet
from ..feature_networks import ModuleFeatures, register_feature_network, weights_file, weights_of

CIFAR_RESNET_URL = (
    "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models/resnet56-4bfd9763.th"
)


@register_feature_network("cifar_resnet")
class CifarResNetFeatures(ModuleFeatures):
    """The averaged last feature map (64) of a ResNet for CIFAR-10, and its logits: for images of 32 px.

    Larger images are resized to 32 px. The depth is read from the file and stands in every number's name
    (`fd_cifar10_resnet56`), and so does that of its Inception score over ten classes.
    """

    @classmethod
    def from_file(cls, weights: str | os.PathLike[str] | None) -> Self:
        """Of weights as in akamaster/pytorch_resnet_cifar10 (BSD-2), their keys with or without `module.`; a file that
        holds them under `state_dict`, or .safetensors; None fetches those of ResNet-56."""
        path = weights_file(weights, "A ResNet for CIFAR-10", CIFAR_RESNET_URL, name="cifar_resnet")
        state: Any = read_weights(path)
        with weights_of("a ResNet for CIFAR-10", path):
            bare = {key.removeprefix("module."): value for key, value in state.get("state_dict", state).items()}
            blocks = 1 + max(
                (int(found[1]) for key in bare if (found := re.match(r"layer3\.(\d+)\.", key))), default=0
            )
            network = CifarResNet(blocks).eval()
            network.load_state_dict({k if k.startswith("linear.") else f"features.{k}": v for k, v in bare.items()})
        return cls(
            network.features,
            name=f"cifar10_resnet{6 * blocks + 2}",
            image_size=32,
            classifier=network.linear,
            stride=4,
        )
