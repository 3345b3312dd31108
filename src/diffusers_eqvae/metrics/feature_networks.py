"""Networks whose features images are compared by; one interface, and a name that says which network it was.

Only Inception with the weights that were converted from TensorFlow gives numbers called FID, sFID and so on. Whatever
else is used leaves its name in the name of every number (`fd_dinov2_large`, `fd_squeezenet`), because distances by
different networks cannot be compared.
"""

from __future__ import annotations

import itertools
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..downloads import published_file
from ..extensions import Registry
from ..images import UINT8_RULE
from ..provenance import weights_hash

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

FEATURE_NETWORKS: Registry[type[FeatureNetwork]] = Registry("feature network", "diffusers_eqvae.metrics.networks")
register_feature_network = FEATURE_NETWORKS.register


class FeatureNetwork(nn.Module, ABC):
    """uint8 images (B, 3, H, W) -> {"features": (B, D)} and, of Inception, "spatial" and "logits"; float32.

    Attributes:
        name: as a result states it.
        suffix: what its numbers' names end with; None for the one network that FID is defined by.
        weights_hash: identity of the weights (`provenance.weights_hash`), whatever file they came from.
        input_rule: how an image is brought to the network's size and range.

    Example:
        >>> network = load_feature_network("inception", "weights-inception-2015-12-05-6726825d.pth")
        >>> network(images_uint8)["features"].shape
        torch.Size([2, 2048])
    """

    name: str
    suffix: str | None
    weights_hash: str
    input_rule: str

    @classmethod
    def from_file(cls, weights: str | os.PathLike[str] | None) -> Self:
        """With these weights, None: those published; what a network defines that is registered by name."""
        raise NotImplementedError

    @abstractmethod
    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """The outputs for uint8 images that `forward` has checked and moved."""

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"Features are taken of uint8 images (B, 3, H, W); got {images.dtype} {tuple(images.shape)}. "
                f"Samples become uint8 by {UINT8_RULE}."
            )
        device = next(itertools.chain(self.parameters(), self.buffers())).device
        return {name: value.float() for name, value in self.extract(images.to(device)).items()}

    def train(self, mode: bool = True) -> FeatureNetwork:
        """Stays in eval mode whatever its parent does."""
        return super().train(False)

    def metric_name(self, metric: str) -> str:
        """`fid` for Inception itself; `fd_NAME` for another network, and likewise for the other metrics."""
        if self.suffix is None:
            return metric
        plain = {"fid": "fd", "sfid": "sfd", "kid": "kd", "kid_std": "kd_std"}.get(metric, metric)
        return f"{plain}_{self.suffix}"


class ModuleFeatures(FeatureNetwork):
    """Features of any network, always under its own name.

    Args:
        module: takes (B, 3, H, W) floats and gives (B, D), or (B, D, h, w) that is averaged over space.
        name: of the network; becomes part of the name of every number.
        image_size: side in pixels that images are resized to (bicubic with antialiasing); None leaves them.
        mean, std: of the normalisation of [0, 1].
        select: takes the features out of what the module returns.
        classifier: gives logits (B, K) of the features.
        stride: pixels of what the module sees from one position of its (B, D, h, w) to the next, where it gives such a
            map: then latents can be aligned with it (`data.teachers`).

    Example:
        >>> @register_feature_network("my_net")
        ... class MyNet(ModuleFeatures):
        ...     @classmethod
        ...     def from_file(cls, weights):
        ...         module = build()
        ...         module.load_state_dict(load_file(weights))
        ...         return cls(module, name="my_net", image_size=224, stride=16)
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str,
        image_size: int | None = None,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        select: Callable[[Any], Tensor] | None = None,
        classifier: nn.Module | None = None,
        stride: int | None = None,
    ) -> None:
        super().__init__()
        self.suffix = re.sub(r"\W+", "_", name).strip("_").lower()
        if not self.suffix or self.suffix.startswith("inception"):
            raise ValueError(f"A feature network needs a name of its own, and not Inception's; got {name!r}.")
        self.name = name
        self.module = module
        self.image_size = image_size
        self.select = select
        self.classifier = classifier
        self.stride = stride
        self.weights_hash = weights_hash(module)
        resize = "as they are" if image_size is None else f"antialiased bicubic to {image_size} px"
        self.input_rule = f"{resize}, mean {mean}, std {std}"
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    def output(self, images: Tensor) -> Tensor:
        """What the module gives, before it is averaged, of normalised images of any size."""
        output = self.module(images)
        return output if self.select is None else self.select(output)

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        images = images.float() / 255
        size = images.shape[-2:] if self.image_size is None else (self.image_size, self.image_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        features = self.output((images - self.mean) / self.std)
        if features.ndim == 4:
            features = features.float().mean((2, 3))
        if features.ndim != 2 or len(features) != len(images):
            raise ValueError(
                f"{self.name} must give (B, D) or (B, D, h, w) for B = {len(images)} images; got "
                f"{tuple(features.shape)}."
            )
        return {"features": features} | ({} if self.classifier is None else {"logits": self.classifier(features)})


def load_feature_network(name: str, weights: str | os.PathLike[str] | None = None) -> FeatureNetwork:
    """One of `FEATURE_NETWORKS` with the weights of a file, else those published; for dinov2 a directory or Hub name.

    Args:
        name: "inception", or with its weights "inception=FILE", as the scripts take it.

    Example:
        >>> load_feature_network("cifar_resnet=resnet56-4bfd9763.th").name
        'cifar10_resnet56'
    """
    name, _, given = name.partition("=")
    return FEATURE_NETWORKS[name].from_file(given or weights)


def weights_file(given: str | os.PathLike[str] | None, what: str, url: str, *, name: str) -> Path:
    """A file that was given, else the published one, whose name ends with what its SHA-256 begins with."""
    if given is None:
        digest = url.rpartition("-")[2].partition(".")[0]
        return published_file(url, sha256=digest, what=what, instead=f"name a local copy ({name}=FILE)")
    if not Path(given).is_file():
        raise FileNotFoundError(
            f"{what} needs the file {url.rpartition('/')[2]}, and {given} does not exist. Name a "
            f"copy ({name}=FILE), or none ({name}), and it is fetched."
        )
    return Path(given)


@contextmanager
def weights_of(network: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Says in one sentence what torch says in a list of keys."""
    try:
        yield
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} must hold the weights of {network}, and its tensors are others. Was the file of another network "
            "given?"
        ) from error
