"""ResNets for CIFAR-10 (He et al., arXiv 1512.03385, section 4.2): a small network to judge 32 px images by."""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (16, 32, 64)
NUM_CLASSES = 10


class CifarBlock(nn.Module):
    """Two 3x3 convolutions around an identity; where the size changes it is every other pixel, padded by zeros.

    The padding is on both sides of the channels (the paper's option A without parameters).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.pad_channels = (out_channels - in_channels) // 2

    def forward(self, hidden_states: Tensor) -> Tensor:
        shortcut = hidden_states[:, :, :: self.stride, :: self.stride]
        shortcut = F.pad(shortcut, (0, 0, 0, 0, self.pad_channels, self.pad_channels))
        hidden_states = self.bn1(self.conv1(hidden_states)).relu()
        return (self.bn2(self.conv2(hidden_states)) + shortcut).relu()


class CifarResNet(nn.Module):
    """ResNet of 6n + 2 layers: `features` gives (B, 64, H / 4, W / 4), `linear` classes of their average.

    Args:
        blocks: n per stage: 3 is ResNet-20, 9 is ResNet-56.
    """

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False), bn1=nn.BatchNorm2d(WIDTHS[0]), relu=nn.ReLU()
        )
        channels = WIDTHS[0]
        for stage, width in enumerate(WIDTHS, start=1):
            inputs = [channels] + [width] * (blocks - 1)
            strides = [1 if stage == 1 else 2] + [1] * (blocks - 1)
            stack = [CifarBlock(each, width, stride) for each, stride in zip(inputs, strides, strict=True)]
            layers[f"layer{stage}"], channels = nn.Sequential(*stack), width
        self.features = nn.Sequential(layers)
        self.linear = nn.Linear(channels, NUM_CLASSES)
        self.blocks = blocks

    @property
    def depth(self) -> int:
        return 6 * self.blocks + 2

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 10) of images (B, 3, H, W), normalised by ImageNet's mean and standard deviation."""
        return self.linear(self.features(images).mean((2, 3)))


def cifar_resnet_from_state(state: Mapping[str, Tensor], *, source: str | os.PathLike[str]) -> CifarResNet:
    """The network of a state dict with keys `[module.]conv1.weight ... linear.bias`; its depth is read from them.

    Raises:
        ValueError: tensors of another network.
    """
    bare = {key.removeprefix("module."): value for key, value in state.items()}
    numbers = [int(found[1]) for key in bare if (found := re.match(r"layer3\.(\d+)\.", key))]
    network = CifarResNet(max(numbers, default=0) + 1)
    named = {key if key.startswith("linear.") else f"features.{key}": value for key, value in bare.items()}
    own = network.state_dict()
    # Weights older than the counter of batches do not have it.
    named = {**{key: value for key, value in own.items() if key.endswith("num_batches_tracked")}, **named}
    wrong = [
        key for key in {**own, **named} if key not in own or getattr(named.get(key), "shape", None) != own[key].shape
    ]
    if wrong:
        raise ValueError(
            f"{source} must hold a ResNet for CIFAR-10 (conv1, layer1 .. layer3, linear), but {len(wrong)} tensors "
            f"are missing, unknown or have another shape (first: {wrong[0]}). Was the file of another network given?"
        )
    network.load_state_dict({key: torch.as_tensor(value) for key, value in named.items()})
    return network.eval()
