"""PatchGAN: a discriminator that judges overlapping patches (Isola et al., arXiv 1611.07004, appendix 6.1.2)."""

from __future__ import annotations

import math
from typing import Literal

from diffusers import ConfigMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from .component import ComponentMixin

NORMS = ("batch", "group")


class PatchDiscriminator(ComponentMixin, ConfigMixin):
    """Logits of overlapping patches: 4x4 convolutions, `num_layers` of stride 2, then two of stride 1.

    With 3 layers and 64 channels a logit sees 70 px, and the model has 2 765 633 parameters. Weights start at
    N(0, 0.02), scales of the norms at N(1, 0.02), biases at 0.

    Args:
        in_channels: of the images.
        base_channels: width of the first layer; doubles per layer up to 8 times.
        num_layers: number of stride-2 convolutions, at least 1.
        norm: "batch" (PatchGAN, LDM: statistics are shared by the samples of a batch on one rank; always the batch's
            own, in eval mode too, so none are kept) or "group" (32 groups, no statistics shared: results do not
            depend on how samples are spread over batches and ranks).

    Raises:
        ValueError: on an unknown norm or fewer than one layer.

    Example:
        >>> PatchDiscriminator()(torch.zeros(1, 3, 256, 256)).shape
        torch.Size([1, 1, 30, 30])
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        base_channels: int = 64,
        num_layers: int = 3,
        norm: Literal["batch", "group"] = "batch",
    ):
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"The discriminator's norm must be one of {', '.join(NORMS)}; got {norm!r}.")
        if num_layers < 1:
            raise ValueError(f"The discriminator needs at least one layer; got num_layers={num_layers}.")
        layers: list[nn.Module] = [nn.Conv2d(in_channels, base_channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = base_channels
        for depth in range(1, num_layers + 1):
            previous, channels = channels, base_channels * min(2**depth, 8)
            stride = 2 if depth < num_layers else 1
            layers += [
                nn.Conv2d(previous, channels, 4, stride=stride, padding=1, bias=False),
                _norm_layer(norm, channels),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(channels, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        self.layers.apply(_initialise)

    @property
    def min_size_px(self) -> int:
        """Smallest height and width that still give one logit: 24 px for 3 layers."""
        return 3 * 2**self.config.num_layers

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, 1, h, w) of pixels (B, C, H, W) in [-1, 1]; h = floor(H / 2^num_layers) - 2, positive = real.

        Raises:
            ValueError: where a side is below `min_size_px`.
        """
        height, width = pixels.shape[-2:]
        if min(height, width) < self.min_size_px:
            raise ValueError(
                f"A discriminator of {self.config.num_layers} layers needs at least {self.min_size_px} px a side; got "
                f"{height}x{width}. Use fewer layers, a higher resolution or a larger smallest scale."
            )
        return self.layers(pixels)


def _norm_layer(norm: str, channels: int) -> nn.Module:
    if norm == "batch":
        # Running statistics would outlive a skipped step: one batch with NaN would spoil them for good.
        return nn.BatchNorm2d(channels, track_running_stats=False)
    return nn.GroupNorm(math.gcd(32, channels), channels)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
        nn.init.normal_(module.weight, 1.0, 0.02)
    bias = getattr(module, "bias", None)
    if isinstance(bias, nn.Parameter):
        nn.init.zeros_(bias)
