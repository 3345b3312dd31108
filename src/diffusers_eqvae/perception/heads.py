"""The linear heads published with DINOv2, applied to features that an alignment network predicts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files import read_weights
from .features import to_size

PREFIX = "decode_head."


class _FrozenHead(nn.Module):
    """A head without gradients, always in eval mode: its batch norm applies the statistics it was saved with."""

    feature_size: int

    def _freeze(self) -> None:
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    def _check(self, patch: Tensor) -> None:
        if patch.ndim != 4 or patch.shape[1] != self.feature_size:
            raise ValueError(
                f"The head reads features (B, {self.feature_size}, h, w); got {tuple(patch.shape)}. Head and "
                "alignment network must belong to one teacher (DINOv2 S 384, B 768, L 1024, g 1536), and the head to "
                "its last layer alone: files named *_ms_* and *_linear4_* read four layers."
            )


class LinearSegmentationHead(_FrozenHead):
    """Class scores of every cell: a 1x1 convolution of batch-normalised features (DINOv2, arXiv 2304.07193, 7.4).

        logits = W ((f - mean) / sqrt(var + 1e-5) * gamma + beta) + b

    `f` are the teacher's patch features of the last layer after its final LayerNorm, which is what `FeatureTeacher`
    gives and an alignment network learns.

    Args:
        feature_size: D of the teacher.
        num_classes: 150 for ADE20K, 21 for VOC2012.
    """

    def __init__(self, feature_size: int, num_classes: int) -> None:
        super().__init__()
        self.feature_size = feature_size
        self.bn = nn.BatchNorm2d(feature_size)
        self.conv_seg = nn.Conv2d(feature_size, num_classes, 1)
        self._freeze()

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> LinearSegmentationHead:
        """From dinov2_vit{s,b,l,g}14_{ade20k,voc2012}_linear_head.pth, or the same tensors as .safetensors.

        Expected, under "state_dict" or at the top, each with or without the prefix "decode_head.":
        conv_seg.weight (K, D, 1, 1), conv_seg.bias (K,), bn.weight, bn.bias, bn.running_mean and bn.running_var (D,);
        bn.num_batches_tracked may be there. Sizes are read from the shapes.

        Raises:
            FileNotFoundError: no such file.
            ValueError: other keys or shapes, or a file that holds more than tensors.
        """
        tensors = _read_tensors(path)
        num_classes, channels = _convolution_size(tensors, "conv_seg.weight", path)
        return _fill(cls(channels, num_classes), tensors, path)

    def forward(self, patch: Tensor) -> Tensor:
        """Logits (B, K, h, w) of patch features (B, D, h, w); `to_size(logits, size).argmax(1)` are the classes.

        Raises:
            ValueError: features of another size.
        """
        self._check(patch)
        return self.conv_seg(self.bn(patch))


class LinearDepthHead(_FrozenHead):
    """Depth in metres as the mean over bins (DINOv2, arXiv 2304.07193, 7.4; AdaBins, arXiv 2011.14141).

        logits = W [f, cls] + b,  p_k = (relu(logit_k) + 0.1) / sum_j (relu(logit_j) + 0.1),  depth = sum_k p_k c_k

    with centres c_k spaced evenly from `min_depth` to `max_depth`, both included. `f` and `cls` are the teacher's
    tokens of the last layer *before* its final LayerNorm. An alignment network that was trained on normalised tokens,
    as `FeatureTeacher` gives them by default (`final_norm`), predicts features that this head was not fitted to: its
    depths are then wrong.

    Differs from the reference: logits instead of features are enlarged by 4; the same function, because bilinear
    weights sum to 1, at a sixteenth of the cost. There is no batch norm in the published depth head.

    Args:
        feature_size: D of the teacher; the convolution has 2D input channels.
        num_bins: 256 in the published heads.
        min_depth, max_depth: in metres; .001 and 10 for NYU, .001 and 80 for KITTI.
    """

    UPSAMPLE = 4
    EPSILON = 0.1

    def __init__(
        self, feature_size: int, num_bins: int = 256, *, min_depth: float = 0.001, max_depth: float = 10.0
    ) -> None:
        super().__init__()
        if not 0 < min_depth < max_depth:
            raise ValueError(f"Depths must satisfy 0 < min_depth < max_depth; got {min_depth} and {max_depth}.")
        self.feature_size = feature_size
        self.conv_depth = nn.Conv2d(2 * feature_size, num_bins, 1)
        self.centres: Tensor
        self.register_buffer("centres", torch.linspace(min_depth, max_depth, num_bins), persistent=False)
        self._freeze()

    @classmethod
    def from_file(
        cls, path: str | os.PathLike[str], *, min_depth: float = 0.001, max_depth: float = 10.0
    ) -> LinearDepthHead:
        """From dinov2_vit{s,b,l,g}14_{nyu,kitti}_linear_head.pth, or the same tensors as .safetensors.

        Expected, under "state_dict" or at the top, with or without the prefix "decode_head.": conv_depth.weight
        (bins, 2D, 1, 1) and conv_depth.bias (bins,). The file does not say which depths its bins stand for: give
        max_depth=80 for KITTI.

        Raises:
            FileNotFoundError: no such file.
            ValueError: other keys or shapes, or a file that holds more than tensors.
        """
        tensors = _read_tensors(path)
        num_bins, channels = _convolution_size(tensors, "conv_depth.weight", path)
        if channels % 2:
            raise ValueError(f"A depth head reads cell and CLS, an even number of channels; {path} has {channels}.")
        return _fill(cls(channels // 2, num_bins, min_depth=min_depth, max_depth=max_depth), tensors, path)

    def forward(self, patch: Tensor, cls: Tensor | None) -> Tensor:
        """Depth (B, 1, 4h, 4w) in metres of patch features (B, D, h, w) and the global feature (B, D).

        Raises:
            ValueError: features of another size, or no global feature.
        """
        self._check(patch)
        if cls is None or cls.shape != patch.shape[:2]:
            raise ValueError(
                f"The depth head needs the global (CLS) feature {tuple(patch.shape[:2])} beside every cell; got "
                f"{None if cls is None else tuple(cls.shape)}. Train the alignment network with global_feature=True."
            )
        logits = self.conv_depth(torch.cat([patch, cls[:, :, None, None].expand_as(patch)], 1))
        height, width = patch.shape[-2:]
        share = F.relu(to_size(logits, (height * self.UPSAMPLE, width * self.UPSAMPLE))) + self.EPSILON
        return torch.einsum("bkhw,k->bhw", share / share.sum(1, keepdim=True), self.centres).unsqueeze(1)


_Head = TypeVar("_Head", bound=_FrozenHead)


def _read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a head's file by name, without "decode_head."; nothing in it is executed."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no head {path}; DINOv2's are linked in the README of its repository.")
    try:
        content = read_weights(path)
    except Exception as error:  # a damaged pickle or header fails in many ways
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} is cut short, damaged or holds more than tensors, which is not loaded because it could run code: "
            f"{reason} If you trust its source, save torch.load(path, weights_only=False)['state_dict'] as "
            ".safetensors and give that."
        ) from error
    tensors: Any = content.get("state_dict", content) if isinstance(content, dict) else None
    items = tensors.items() if isinstance(tensors, dict) else ()
    return {str(name).removeprefix(PREFIX): value for name, value in items if isinstance(value, Tensor)}


def _convolution_size(tensors: dict[str, Tensor], name: str, path: str | os.PathLike[str]) -> tuple[int, int]:
    """Output and input channels of the 1x1 convolution `name`."""
    weight = tensors.get(name)
    if weight is None or weight.ndim != 4 or weight.shape[2:] != (1, 1):
        found = {key: tuple(value.shape) for key, value in list(tensors.items())[:8]}
        raise ValueError(f"{path} must hold {PREFIX}{name} of shape (out, in, 1, 1), a linear head; it holds {found}.")
    return int(weight.shape[0]), int(weight.shape[1])


def _fill(head: _Head, tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> _Head:
    expected = {name: tuple(value.shape) for name, value in head.state_dict().items()}
    optional = {name for name in expected if name.endswith("num_batches_tracked")}
    found = {name: tuple(value.shape) for name, value in tensors.items() if name not in optional}
    wanted = {name: shape for name, shape in expected.items() if name not in optional}
    if found != wanted:
        raise ValueError(f"A linear head of {path} must hold {wanted} (each may have {PREFIX!r} before); got {found}.")
    head.load_state_dict({name: tensors[name].float() for name in wanted}, strict=False)
    return head
