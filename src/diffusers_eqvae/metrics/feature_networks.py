"""Networks whose features images are compared by; one interface, and a name that says which network it was.

Only Inception with the weights that were converted from TensorFlow gives numbers called FID, sFID and so on. Whatever
else is used leaves its name in the name of every number (`fd_dinov2_large`, `fd_squeezenet`), because distances by
different networks cannot be compared.
"""

from __future__ import annotations

import io
import itertools
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..downloads import published_file
from ..files import read_weights
from ..images import UINT8_RULE
from ..models.feature_teacher import load_vision_model
from ..provenance import hash_file, weights_hash
from .cifar_resnet import CifarResNet

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
SQUEEZENET_URL = "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth"
CIFAR_RESNET_URL = (
    "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models/resnet56-4bfd9763.th"
)
# sha256 of Inception's file begins with what its name ends with.
INCEPTION_SHA256 = "6726825d"
SPATIAL_CHANNELS = 7


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


class InceptionFID(FeatureNetwork):
    """FID's Inception as torch-fidelity transcribed it from TensorFlow, with everything the ADM protocol reads.

    "features" is pool_3 (2048); "spatial" the first 7 channels of mixed_6/conv (`Mixed_6d.branch1x1`), flattened
    channels-last as TensorFlow lays them out (17 * 17 * 7 = 2023); "logits" 1008 values without the bias. One forward
    gives all three. The resize (TensorFlow 1 bilinear to 299 px) is part of the network.

    Args:
        state: weights; None draws them at random from `seed`, for tests without the file.
        genuine: whether they are those that FID is defined by, which their file's SHA-256 says.
    """

    input_rule = "TensorFlow 1 bilinear to 299 px, (x - 128) / 128"

    def __init__(self, state: dict[str, Tensor] | None = None, *, genuine: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.network = _inception_network()
        if state is None:
            _randomize(self.network, seed)
        else:
            self.network.load_state_dict(state)
        self.weights_hash = weights_hash(self.network)
        self.suffix = None if genuine else f"inception_{self.weights_hash[:8]}"
        self.name = "inception-v3-compat" + ("" if genuine else f" with other weights ({self.weights_hash[:8]})")
        self._spatial: Tensor | None = None
        self.network.get_submodule("Mixed_6d.branch1x1").register_forward_hook(self._keep_spatial)
        self.network.to(memory_format=torch.channels_last)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str] | None) -> InceptionFID:
        """With the weights of a file, None: the published one; it is read without executing what it may hold.

        Raises:
            FileNotFoundError: no such file, or it cannot be fetched; says where it is and where it belongs.
            ValueError: weights of another network, or no file of weights.
        """
        file = _weights_file(path, "FID's Inception", INCEPTION_URL, name="inception")
        with _weights_of("FID's Inception", file):
            return cls(read_weights(file), genuine=hash_file(file).startswith(INCEPTION_SHA256))

    def _keep_spatial(self, module: nn.Module, arguments: Any, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS]

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        features, logits = self.network(images)
        assert self._spatial is not None  # the hook ran
        spatial, self._spatial = self._spatial.permute(0, 2, 3, 1).flatten(1), None
        return {"features": features, "spatial": spatial, "logits": logits}


def _inception_network() -> nn.Module:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ModuleNotFoundError as error:
        if error.name is not None and not error.name.startswith("torch_fidelity"):
            raise
        raise ModuleNotFoundError(
            "FID needs torch-fidelity's Inception: pip install 'diffusers_eqvae[eval]'.", name="torch_fidelity"
        ) from error

    class Network(FeatureExtractorInceptionV3):
        # Its constructor unpickles a file without restriction. It is given an empty one, and the weights come later.
        def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
            return super().load_state_dict(state_dict, *args, **kwargs) if state_dict else None

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    return Network("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=empty)


def _randomize(network: nn.Module, seed: int) -> None:
    """Weights that keep the scale of activations through the depth, so that features of images differ."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            std = (2 / module.weight[0].numel()) ** 0.5
            module.weight.data.normal_(0, std, generator=generator)


class ModuleFeatures(FeatureNetwork):
    """Features of any network, always under its own name.

    Args:
        module: takes (B, 3, H, W) floats and gives (B, D), or (B, D, h, w) that is averaged over space.
        name: of the network; becomes part of the name of every number.
        image_size: side in pixels that images are resized to (bicubic with antialiasing); None leaves them.
        mean, std: of the normalisation of [0, 1].
        select: takes the features out of what the module returns.
        classifier: gives logits (B, K) of the features.
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
        self.weights_hash = weights_hash(module)
        resize = "as they are" if image_size is None else f"antialiased bicubic to {image_size} px"
        self.input_rule = f"{resize}, mean {mean}, std {std}"
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        images = images.float() / 255
        size = images.shape[-2:] if self.image_size is None else (self.image_size, self.image_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        output = self.module((images - self.mean) / self.std)
        features = output if self.select is None else self.select(output)
        if features.ndim == 4:
            features = features.float().mean((2, 3))
        if features.ndim != 2 or len(features) != len(images):
            raise ValueError(
                f"{self.name} must give (B, D) or (B, D, h, w) for B = {len(images)} images; got "
                f"{tuple(features.shape)}."
            )
        return {"features": features} | ({} if self.classifier is None else {"logits": self.classifier(features)})


def dinov2_features(name_or_path: str = "facebook/dinov2-large", *, image_size: int = 224) -> ModuleFeatures:
    """DINOv2's global feature through transformers: FD-DINOv2 (Stein et al., arXiv 2306.04675) with the large model.

    Differs from the reference: images are resized as floats, without rounding to 8 bits in between.

    Example:
        >>> dinov2_features("facebook/dinov2-large").name
        'dinov2-large'
    """
    model = load_vision_model(name_or_path)
    config: Any = model.config
    if config.model_type not in ("dinov2", "dinov2_with_registers"):
        raise ValueError(f"FD-DINOv2 needs a DINOv2 model; {name_or_path} is of type {config.model_type!r}.")
    if image_size % config.patch_size:
        raise ValueError(f"image_size must be a multiple of the patch size {config.patch_size}; got {image_size}.")
    return ModuleFeatures(
        model,
        name=Path(name_or_path).name,
        image_size=image_size,
        select=lambda output: output.last_hidden_state[:, 0],
    )


def squeezenet_features(path: str | os.PathLike[str] | None) -> ModuleFeatures:
    """SqueezeNet 1.1's last feature map, averaged (512): a small network (5 MB) for work without a network connection.

    Args:
        path: torchvision's weights file (squeezenet1_1-*.pth), which None fetches, or its tensors as .safetensors.
    """
    path = _weights_file(path, "SqueezeNet", SQUEEZENET_URL, name="squeezenet")
    from torchvision.models import squeezenet1_1

    network = squeezenet1_1(weights=None)
    with _weights_of("SqueezeNet 1.1", path):
        network.load_state_dict(read_weights(path))
    return ModuleFeatures(network.features, name="squeezenet1_1", image_size=224)


def cifar_resnet_features(path: str | os.PathLike[str] | None) -> ModuleFeatures:
    """The averaged last feature map (64) of a ResNet for CIFAR-10, and its logits: for images of 32 px.

    Larger images are resized to 32 px. The depth is read from the file and stands in every number's name
    (`fd_cifar10_resnet56`), and so does that of its Inception score over ten classes.

    Args:
        path: weights as in akamaster/pytorch_resnet_cifar10 (BSD-2), their keys with or without `module.`; a file
            that holds them under `state_dict`, or .safetensors; None fetches those of ResNet-56.
    """
    path = _weights_file(path, "A ResNet for CIFAR-10", CIFAR_RESNET_URL, name="cifar_resnet")
    state: Any = read_weights(path)
    with _weights_of("a ResNet for CIFAR-10", path):
        bare = {key.removeprefix("module."): value for key, value in state.get("state_dict", state).items()}
        blocks = 1 + max((int(found[1]) for key in bare if (found := re.match(r"layer3\.(\d+)\.", key))), default=0)
        network = CifarResNet(blocks).eval()
        network.load_state_dict({k if k.startswith("linear.") else f"features.{k}": v for k, v in bare.items()})
    return ModuleFeatures(
        network.features,
        name=f"cifar10_resnet{6 * blocks + 2}",
        image_size=32,
        classifier=network.linear,
    )


FEATURE_NETWORKS: dict[str, Callable[..., FeatureNetwork]] = {
    "inception": InceptionFID.from_file,
    "dinov2": dinov2_features,
    "squeezenet": squeezenet_features,
    "cifar_resnet": cifar_resnet_features,
}


def load_feature_network(name: str, weights: str | os.PathLike[str] | None = None) -> FeatureNetwork:
    """One of `FEATURE_NETWORKS` with the weights of a file, else those published; for dinov2 a directory or Hub name.

    Args:
        name: "inception", or with its weights "inception=FILE", as the scripts take it.

    Example:
        >>> load_feature_network("cifar_resnet=resnet56-4bfd9763.th").name
        'cifar10_resnet56'
    """
    name, _, given = name.partition("=")
    weights = given or weights
    if name not in FEATURE_NETWORKS:
        raise ValueError(f"The feature networks are {', '.join(FEATURE_NETWORKS)}; got {name!r}.")
    default = name == "dinov2" and weights is None
    return FEATURE_NETWORKS[name](*([] if default else [weights]))


def _weights_file(given: str | os.PathLike[str] | None, what: str, url: str, *, name: str) -> Path:
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
def _weights_of(network: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Says in one sentence what torch says in a list of keys."""
    try:
        yield
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} must hold the weights of {network}, and its tensors are others. Was the file of another network "
            "given?"
        ) from error
