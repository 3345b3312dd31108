"""FID's Inception: the one network whose distances are called FID."""

from __future__ import annotations

import io
import os
from typing import Any

import torch
from torch import Tensor, nn

from ...files import read_weights
from ...provenance import hash_file, weights_hash
from ..feature_networks import FeatureNetwork, register_feature_network, weights_file, weights_of

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
# sha256 of Inception's file begins with what its name ends with.
INCEPTION_SHA256 = "6726825d"
SPATIAL_CHANNELS = 7


@register_feature_network("inception")
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
        file = weights_file(path, "FID's Inception", INCEPTION_URL, name="inception")
        with weights_of("FID's Inception", file):
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
