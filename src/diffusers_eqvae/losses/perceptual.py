"""LPIPS, the learned perceptual distance (Zhang et al., arXiv 1801.03924, eq. 1), version 0.1.

d(a, b) = sum_l 1/(H_l W_l) sum_hw sum_c w_lc (a_lhwc / |a_lhw| - b_lhwc / |b_lhw|)^2

where a_l are the activations of layer l of an image classifier and w_l >= 0 a learned weight per channel (a "head").
Only torchvision's definition of the three classifiers is used, and only when one is built.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..downloads import published_file
from ..files import read_weights
from ._checks import full_precision, require_equal_shapes


@dataclass(frozen=True)
class _Backbone:
    """One classifier of torchvision: `taps` index the layers of `features` that are compared, all behind a ReLU."""

    architecture: str
    taps: tuple[int, ...]
    channels: tuple[int, ...]
    min_size_px: int
    weights_file: str
    heads_sha256: str


BACKBONES: dict[str, _Backbone] = {
    # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
    "vgg": _Backbone(
        architecture="vgg16",
        taps=(3, 8, 15, 22, 29),
        channels=(64, 128, 256, 512, 512),
        min_size_px=16,
        weights_file="vgg16-397923af.pth",
        heads_sha256="a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    ),
    # relu1 .. relu5
    "alex": _Backbone(
        architecture="alexnet",
        taps=(1, 4, 7, 9, 11),
        channels=(64, 192, 384, 256, 256),
        min_size_px=31,
        weights_file="alexnet-owt-7be5be79.pth",
        heads_sha256="df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
    ),
    # relu1, then the fire modules fire3, fire5, fire6, fire7, fire8, fire9
    "squeeze": _Backbone(
        architecture="squeezenet1_1",
        taps=(1, 4, 7, 9, 10, 11, 12),
        channels=(64, 128, 256, 384, 384, 512, 512),
        min_size_px=17,
        weights_file="squeezenet1_1-b8a52dc0.pth",
        heads_sha256="4a5350f23600cb79923ce65bb07cbf57dca461329894153e05a1346bd531cf76",
    ),
}
_TORCHVISION_URL = "https://download.pytorch.org/models/{file}"
_HEADS_URL = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/{net}.pth"
# Brings inputs in [-1, 1] to ImageNet's mean and standard deviation.
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_EPS = 1e-10
LPIPS_CHANNELS = (1, 3)  # of the images that it compares; a single one is seen three times


def require_seen_by_lpips(channels: int, *, remedy: str) -> None:
    """Refuses images that are neither RGB nor grey, of which a network of photographs sees nothing.

    Example:
        >>> require_seen_by_lpips(image_channels(vae), remedy="measure without it")
    """
    if channels not in LPIPS_CHANNELS:
        raise ValueError(f"LPIPS compares RGB or grey images, and these have {channels} channels; {remedy}.")


class LPIPS(nn.Module):
    """Perceptual distance (B,) of two batches of images in [-1, 1]; frozen, differentiable in its inputs.

    Convolutions follow autocast; normalisation, differences and the sums are float32. The parameters never require a
    gradient and the module never leaves eval mode. Build it with `from_pretrained`, or with `random` for tests.
    Images that require no gradient (the target) keep no graph.

    Example:
        >>> distance = LPIPS.random("squeeze", seed=0)
        >>> distance(torch.zeros(2, 3, 32, 32), torch.ones(2, 3, 32, 32)).shape
        torch.Size([2])

    Args:
        net: "vgg" (training, as LDM and EQ-VAE), "alex" (the authors' choice for reporting) or "squeeze" (smallest).

    Raises:
        ValueError: on an unknown net, or on inputs of unequal shapes, other than 3 channels or too small.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, net: str = "vgg"):
        super().__init__()
        if net not in BACKBONES:
            raise ValueError(f"LPIPS exists for {', '.join(BACKBONES)}; got {net!r}.")
        self.net = net
        backbone = BACKBONES[net]
        self.features = _features(backbone)
        self.heads = nn.ParameterList(torch.zeros(channels) for channels in backbone.channels)
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        net: str = "vgg",
        *,
        backbone_weights: str | os.PathLike[str] | None = None,
        linear_weights: str | os.PathLike[str] | None = None,
    ) -> LPIPS:
        """The published distance.

        Args:
            net: "vgg", "alex" or "squeeze".
            backbone_weights: torchvision's ImageNet weights of the classifier, .pth or .safetensors; without it the
                file is looked for in torch's cache and downloaded from pytorch.org.
            linear_weights: the authors' v0.1 heads, .pth or .safetensors; without it looked for in torch's cache and
                downloaded from the authors' repository.

        Raises:
            FileNotFoundError: where a file is neither given, nor cached, nor to be had from the network.
            ValueError: where a file does not hold the weights of this net.
        """
        module = cls(net)
        backbone_path = _locate(net, "backbone", backbone_weights)
        module.load_backbone(read_weights(backbone_path), source=str(backbone_path))
        heads_path = _locate(net, "linear", linear_weights)
        module.load_heads(read_weights(heads_path), source=str(heads_path))
        return module

    @classmethod
    def random(cls, net: str = "vgg", *, seed: int = 0) -> LPIPS:
        """The same network, its convolutions He-initialised and its heads positive, drawn from `seed`: for tests."""
        module = cls(net)
        generator = torch.Generator().manual_seed(seed)
        for parameter in module.features.parameters():
            fan_in = parameter[0].numel()
            std = (2.0 / fan_in) ** 0.5 if parameter.ndim == 4 else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        for head in module.heads:
            head.copy_(torch.rand(head.shape, generator=generator))
        return module

    def load_backbone(self, state: Mapping[str, Tensor], *, source: str = "state dict") -> None:
        """Loads torchvision's state dict; layers behind the last tap and the classifier are left out."""
        prefix = "features."
        own = self.features.state_dict()
        _check_keys(f"{BACKBONES[self.net].architecture} weights", source, own, state, prefix)
        self.features.load_state_dict({key: state[prefix + key].float() for key in own})

    def load_heads(self, state: Mapping[str, Tensor], *, source: str = "state dict") -> None:
        """Loads the authors' heads, `lin<l>.model.1.weight` of shape (1, C_l, 1, 1)."""
        own = {f"lin{index}.model.1.weight": head.view(1, -1, 1, 1) for index, head in enumerate(self.heads)}
        _check_keys(f"LPIPS heads of {self.net!r}", source, own, state)
        for key, head in own.items():
            head.copy_(state[key])

    @property
    def min_size_px(self) -> int:
        """Smallest height and width the layers can take."""
        return BACKBONES[self.net].min_size_px

    def train(self, mode: bool = True) -> LPIPS:
        """Stays in eval mode whatever its parent does: the distance is a fixed function."""
        return super().train(False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Distances (B,), float32, of pixels (B, 3, H, W) in [-1, 1]; >= 0, symmetric, 0 for equal images.

        A single channel is taken three times.
        """
        require_equal_shapes(first, second, ("The two batches of images", "each other"))
        if first.ndim != 4 or first.shape[1] not in LPIPS_CHANNELS or min(first.shape[-2:]) < self.min_size_px:
            raise ValueError(
                f"LPIPS ({self.net}) compares images (B, 3, H, W) of at least {self.min_size_px} px; got "
                f"{tuple(first.shape)}. Use a higher resolution, a larger smallest scale or another net."
            )
        first, second = (pixels.expand(-1, 3, -1, -1) for pixels in (first, second))
        activations = zip(self._activations(first), self._activations(second), self.heads, strict=True)
        return torch.stack([_layer_distance(a, b, head) for a, b, head in activations]).sum(0)

    def _activations(self, pixels: Tensor) -> Iterable[Tensor]:
        hidden = (full_precision(pixels) - self.shift) / self.scale
        taps = BACKBONES[self.net].taps
        hidden = hidden.to(self.heads[0].dtype)
        for index, layer in enumerate(self.features):
            hidden = layer(hidden)
            if index in taps:
                yield hidden


def _layer_distance(first: Tensor, second: Tensor, head: Tensor) -> Tensor:
    """One summand of eq. 1, (B,): the spatial mean is taken before the head, which is linear in it."""
    difference = (_unit_channels(first) - _unit_channels(second)).square()
    return (difference.mean((2, 3)) * full_precision(head)).sum(1)


def _unit_channels(activations: Tensor) -> Tensor:
    activations = full_precision(activations)
    # At 0 vector_norm has subgradient 0, where sqrt(sum of squares) gives NaN that only the ReLU before it hides.
    return activations / (torch.linalg.vector_norm(activations, dim=1, keepdim=True) + _EPS)


def _features(backbone: _Backbone) -> nn.Sequential:
    """torchvision's convolutional layers up to the last tap, with uninitialised weights."""
    try:
        from torchvision import models
    except ImportError as error:
        raise ImportError("LPIPS needs torchvision for its networks: pip install torchvision.") from error
    # On the meta device the classifier's 120 million weights are neither allocated nor drawn.
    with torch.device("meta"):
        network = getattr(models, backbone.architecture)(weights=None)
    return network.features[: backbone.taps[-1] + 1].to_empty(device="cpu")


def _locate(net: str, part: str, given: str | os.PathLike[str] | None) -> Path:
    """The weights file of one part ("backbone" or "linear"): the given one, the cached one, or a fresh download."""
    backbone = BACKBONES[net]
    if given is not None:
        path = Path(given)
        if not path.is_file():
            raise FileNotFoundError(f"{part}_weights must name a file; {path} does not exist.")
        return path
    if part == "backbone":
        name, url = backbone.weights_file, _TORCHVISION_URL.format(file=backbone.weights_file)
        digest = backbone.weights_file.rsplit("-", 1)[1].removesuffix(".pth")
    else:
        name, url, digest = f"lpips-v0.1-{net}.pth", _HEADS_URL.format(net=net), backbone.heads_sha256
    instead = f"name a local copy ({part}_weights; of options, lpips_{part}_weights)"
    return published_file(url, sha256=digest, what="LPIPS", instead=instead, name=name)


def _check_keys(
    what: str, source: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor], prefix: str = ""
) -> None:
    wrong = [key for key, value in own.items() if getattr(given.get(prefix + key), "shape", None) != value.shape]
    if wrong:
        raise ValueError(
            f"{source} must hold {what}, but {len(wrong)} of {len(own)} tensors are missing or have another shape "
            f"(first: {prefix + wrong[0]}). Was the file of another net given?"
        )
