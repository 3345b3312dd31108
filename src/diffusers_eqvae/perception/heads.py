"""The linear heads published with DINOv2, applied to features that an alignment network predicts."""

from __future__ import annotations

import os
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files import read_weights
from ..models.alignment_network import AlignmentNetwork
from .features import LatentFeatures, to_size

PREFIX = "decode_head."


class LinearHead(nn.Module):
    """A 1x1 convolution of a teacher's features, without gradients and always in eval mode.

    Attributes:
        feature_size: D of the teacher.
        teacher_type: the transformers type of the backbone that it was fitted to; DINOv2's own are "dinov2".
    """

    feature_size: int
    teacher_type: str

    def _freeze(self) -> None:
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode: its batch norm applies the statistics that it was saved with."""
        return super().train(False)

    def read(self, features: LatentFeatures) -> Tensor:
        """The maps that it makes of what `latent_features` gives with a network."""
        raise NotImplementedError

    def check_network(self, network: AlignmentNetwork | None) -> None:
        """Raises ValueError unless the network predicts features of the backbone that this head was fitted to."""
        if network is None:
            raise ValueError(
                "A segmentation or depth head reads the features of a teacher; give the alignment_network that "
                "predicts them, or leave the head out."
            )
        if network.config.spatial_norm is not None:
            raise ValueError(
                "A head reads a teacher's features, and the alignment network predicts them normalised over the "
                "positions of an image (spatial_norm), which it was not fitted to; align without it, or leave the "
                "head out."
            )
        own = (self.teacher_type, self.feature_size)
        given = (network.config.teacher_type or self.teacher_type, network.config.feature_size)
        if own != given:
            raise ValueError(
                f"The head was fitted to a teacher of type {own[0]} with features of size {own[1]}, but the alignment "
                f"network predicts those of {network.config.teacher} (type {given[0]}, size {given[1]}); align with "
                "the head's teacher, or take the head of this one (a head of your own may name its teacher_type)."
            )


class LinearSegmentationHead(LinearHead):
    """Class scores of every position: a 1x1 convolution of batch-normalised features (DINOv2, arXiv 2304.07193, 7.4).

        logits = W ((f - mean) / sqrt(var + 1e-5) * gamma + beta) + b

    `f` are the teacher's patch features of the last layer *after* its final LayerNorm.

    Args:
        feature_size: D of the teacher.
        num_classes: 150 for ADE20K, 21 for VOC2012.
        teacher_type: see `LinearHead`.

    Example:
        >>> head = LinearSegmentationHead.from_file("dinov2_vitl14_ade20k_linear_head.pth")
        >>> classes = to_size(head(features.patch), (256, 256)).argmax(1)
    """

    def __init__(self, feature_size: int, num_classes: int, *, teacher_type: str = "dinov2") -> None:
        super().__init__()
        self.feature_size, self.teacher_type = feature_size, teacher_type
        self.bn = nn.BatchNorm2d(feature_size)
        self.conv_seg = nn.Conv2d(feature_size, num_classes, 1)
        self._freeze()

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], *, teacher_type: str = "dinov2") -> LinearSegmentationHead:
        """From dinov2_vit{s,b,l,g}14_{ade20k,voc2012}_linear_head.pth, or the same tensors as .safetensors.

        Expected, under "state_dict" or at the top, each with or without the prefix "decode_head.":
        conv_seg.weight (K, D, 1, 1), conv_seg.bias (K,), bn.weight, bn.bias, bn.running_mean and bn.running_var (D,);
        bn.num_batches_tracked may be there. Sizes are read from the shapes.
        """
        tensors = _read_tensors(path)
        num_classes, channels = _convolution_size(tensors, "conv_seg.weight", path)
        head = cls(channels, num_classes, teacher_type=teacher_type)
        _fill(head, tensors, path)
        return head

    def forward(self, patch: Tensor) -> Tensor:
        """Logits (B, K, h, w) of patch features (B, D, h, w)."""
        return self.conv_seg(self.bn(patch))

    def read(self, features: LatentFeatures) -> Tensor:
        return self(features.patch)


class LinearDepthHead(LinearHead):
    """Depth in metres as the mean over bins (DINOv2, arXiv 2304.07193, 7.4; AdaBins, arXiv 2011.14141).

        logits = W [f, cls] + b,  p_k = (relu(logit_k) + 0.1) / sum_j (relu(logit_j) + 0.1),  depth = sum_k p_k c_k

    with centres c_k spaced evenly from `min_depth` to `max_depth`, both included. `f` and `cls` are the teacher's
    tokens of the last layer *before* its final LayerNorm.

    Differs from the reference: logits instead of features are enlarged by 4; the same function, because bilinear
    weights sum to 1, at a sixteenth of the cost. There is no batch norm in the published depth head.

    Args:
        feature_size: D of the teacher; the convolution has 2D input channels.
        num_bins: 256 in the published heads.
        min_depth, max_depth: in metres; .001 and 10 for NYU, .001 and 80 for KITTI.
        teacher_type: see `LinearHead`.

    Example:
        >>> head = LinearDepthHead.from_file("dinov2_vitl14_nyu_linear_head.pth")
        >>> metres = head(features.before_norm.patch, features.before_norm.cls)
    """

    UPSAMPLE = 4
    EPSILON = 0.1

    def __init__(
        self,
        feature_size: int,
        num_bins: int = 256,
        *,
        min_depth: float = 0.001,
        max_depth: float = 10.0,
        teacher_type: str = "dinov2",
    ) -> None:
        super().__init__()
        if not 0 < min_depth < max_depth:
            raise ValueError(f"Depths must satisfy 0 < min_depth < max_depth; got {min_depth} and {max_depth}.")
        self.feature_size, self.teacher_type = feature_size, teacher_type
        self.conv_depth = nn.Conv2d(2 * feature_size, num_bins, 1)
        self.centres: Tensor
        self.register_buffer("centres", torch.linspace(min_depth, max_depth, num_bins), persistent=False)
        self._freeze()

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], **options: Any) -> LinearDepthHead:
        """From dinov2_vit{s,b,l,g}14_{nyu,kitti}_linear_head.pth, or the same tensors as .safetensors.

        Expected, under "state_dict" or at the top, with or without the prefix "decode_head.": conv_depth.weight
        (bins, 2D, 1, 1) and conv_depth.bias (bins,). The file does not say which depths its bins stand for: give
        max_depth=80 for KITTI, one of the constructor's `options`.
        """
        tensors = _read_tensors(path)
        num_bins, channels = _convolution_size(tensors, "conv_depth.weight", path)
        if channels % 2:
            raise ValueError(f"A depth head reads patch and CLS, an even number of channels; {path} has {channels}.")
        head = cls(channels // 2, num_bins, **options)
        _fill(head, tensors, path)
        return head

    def forward(self, patch: Tensor, cls: Tensor) -> Tensor:
        """Depth (B, 1, 4h, 4w) in metres of patch features (B, D, h, w) and the global feature (B, D)."""
        logits = self.conv_depth(torch.cat([patch, cls[:, :, None, None].expand_as(patch)], 1))
        height, width = patch.shape[-2:]
        share = F.relu(to_size(logits, (height * self.UPSAMPLE, width * self.UPSAMPLE))) + self.EPSILON
        return torch.einsum("bkhw,k->bhw", share / share.sum(1, keepdim=True), self.centres).unsqueeze(1)

    def read(self, features: LatentFeatures) -> Tensor:
        assert features.before_norm is not None and features.before_norm.cls is not None  # see check_network
        return self(features.before_norm.patch, features.before_norm.cls)

    def check_network(self, network: AlignmentNetwork | None) -> None:
        super().check_network(network)
        if network is not None and not network.config.global_feature:
            raise ValueError(
                "A depth head reads the global (CLS) feature too, and this alignment network was trained with "
                "global_feature=False; train one with it, or leave the depth head out."
            )


def _read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a head's file by name, without "decode_head."; nothing in it is executed."""
    content = read_weights(path)
    tensors = content.get("state_dict", content)
    items = tensors.items() if isinstance(tensors, dict) else ()
    return {str(name).removeprefix(PREFIX): value for name, value in items if isinstance(value, Tensor)}


def _convolution_size(tensors: dict[str, Tensor], name: str, path: str | os.PathLike[str]) -> tuple[int, int]:
    """Output and input channels of the 1x1 convolution `name`."""
    weight = tensors.get(name)
    if weight is None or weight.ndim != 4 or weight.shape[2:] != (1, 1):
        found = {key: tuple(value.shape) for key, value in list(tensors.items())[:8]}
        raise ValueError(f"{path} must hold {PREFIX}{name} of shape (out, in, 1, 1), a linear head; it holds {found}.")
    return int(weight.shape[0]), int(weight.shape[1])


def _fill(head: LinearHead, tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    def counted(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.float() for name, value in state.items() if not name.endswith("num_batches_tracked")}

    given = counted(tensors)
    wanted, found = (
        {name: tuple(value.shape) for name, value in counted(s).items()} for s in (head.state_dict(), given)
    )
    if found != wanted:
        raise ValueError(f"A linear head of {path} must hold {wanted} (each may have {PREFIX!r} before); got {found}.")
    head.load_state_dict(given, strict=False)
