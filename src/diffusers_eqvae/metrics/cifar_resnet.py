"""ResNets for CIFAR-10 (He et al., arXiv 1512.03385, section 4.2): a small network to judge 32 px images by."""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (16, 32, 64)
NUM_CLASSES = 10


class CifarBlock(nn.Module):
    """Two 3x3 convolutions around an identity: where the size changes every other pixel, padded by zero channels.

    The padding is on both sides of the channels (the paper's option A without parameters).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, hidden_states: Tensor) -> Tensor:
        stride, padding = self.conv1.stride[0], (self.conv1.out_channels - self.conv1.in_channels) // 2
        shortcut = F.pad(hidden_states[:, :, ::stride, ::stride], (0, 0, 0, 0, padding, padding))
        hidden_states = self.bn1(self.conv1(hidden_states)).relu()
        return (self.bn2(self.conv2(hidden_states)) + shortcut).relu()


class CifarResNet(nn.Module):
    """ResNet of 6n + 2 layers: `features` gives (B, 64, H / 4, W / 4), `linear` classes of their average.

    Args:
        blocks: n per stage: 3 is ResNet-20, 9 is ResNet-56.

    Example:
        >>> CifarResNet(9).features(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 64, 8, 8])
    """

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False), bn1=nn.BatchNorm2d(WIDTHS[0]), relu=nn.ReLU()
        )
        for stage, (before, width) in enumerate(zip((WIDTHS[0], *WIDTHS), WIDTHS, strict=False), start=1):
            rest = [CifarBlock(width, width, 1) for _ in range(blocks - 1)]
            layers[f"layer{stage}"] = nn.Sequential(CifarBlock(before, width, 1 if stage == 1 else 2), *rest)
        self.features = nn.Sequential(layers)
        self.linear = nn.Linear(WIDTHS[-1], NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 10) of images (B, 3, H, W), normalised by ImageNet's mean and standard deviation."""
        return self.linear(self.features(images).mean((2, 3)))
