"""One pass of a feature network over uint8 images, by one or several processes: what every metric is computed from.

Images are cut into blocks of one batch each, and a process takes a stretch of whole blocks: each forward is the same
whoever runs it, so the number of processes changes no bit. Another batch size changes the order of sums inside the
networks, and with it figures in their last digits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..images import to_uint8
from .feature_networks import FeatureExtractor
from .inputs import ImageSet, check_array

# Floats beyond it are no pixels in [-1, 1], which decoders overshoot a little, but levels.
LARGEST_PIXEL = 3.0


@dataclass
class Collected:
    """What one pass over images leaves, in the order of the images.

    Attributes:
        features: (N, D) float32.
        logits: (N, K), or None where the network has none.
        spatial: (N, S), or None.
        digests: one hash per image.
    """

    features: Tensor
    logits: Tensor | None
    spatial: Tensor | None
    digests: list[bytes]

    @property
    def hash(self) -> str:
        """Of all images, pixel by pixel, in order; no batch size or process count enters."""
        return hash_digests(self.digests)

    @property
    def unique(self) -> int:
        """Images that differ from all others."""
        return len(set(self.digests))

    @staticmethod
    def join(parts: Sequence[Collected]) -> Collected:
        """The parts of several processes, in the order of their ranks."""
        logits = [part.logits for part in parts if part.logits is not None]
        spatial = [part.spatial for part in parts if part.spatial is not None]
        return Collected(
            torch.cat([part.features for part in parts]),
            torch.cat(logits) if logits else None,
            torch.cat(spatial) if spatial else None,
            [digest for part in parts for digest in part.digests],
        )


class Collector:
    """Runs images through a network batch by batch, one forward each, and keeps everything that the metrics need."""

    def __init__(self, extractor: FeatureExtractor) -> None:
        self.extractor = extractor
        self._parts: list[Collected] = []
        self._size: tuple[int, ...] | None = None

    def add(self, levels: np.ndarray) -> None:
        """Adds images uint8 (B, H, W, 3); raises ValueError for another dtype, shape or size than those before."""
        check_array(levels, "a batch")
        self._size = one_size(levels, self._size)
        images = torch.from_numpy(np.array(levels, order="C")).permute(0, 3, 1, 2)
        outputs = {name: value.cpu() for name, value in self.extractor(images).items()}
        self._parts.append(
            Collected(outputs["features"], outputs.get("logits"), outputs.get("spatial"), image_digests(levels))
        )

    def collected(self) -> Collected:
        """Everything so far; raises ValueError where there was nothing."""
        if not self._parts:
            raise ValueError("At least one image is needed; got none.")
        self._parts = [Collected.join(self._parts)]
        return self._parts[0]


def collect(extractor: FeatureExtractor, batches: Iterable[np.ndarray]) -> Collected:
    """`Collector` over all batches of uint8 images (B, H, W, 3).

    Raises:
        ValueError: no images, or batches of another shape or dtype.
    """
    collector = Collector(extractor)
    for batch in batches:
        collector.add(batch)
    return collector.collected()


@dataclass(frozen=True)
class Processes:
    """Who shares the work: this rank measures its stretch, `gather` joins everybody's lists in the order of ranks."""

    rank: int = 0
    world_size: int = 1
    gather: Callable[[list[Any]], list[Any]] = list

    def measure(self, extractor: FeatureExtractor, images: ImageSet, *, batch_size: int) -> Collected:
        """One pass over all images, by all processes; the same result on each of them."""
        collector = Collector(extractor)
        mine = images.blocks(batch_size, rank=self.rank, world_size=self.world_size)
        for block in mine:
            collector.add(images.read(block))
        return Collected.join(self.gather([collector.collected()] if mine else []))


ALONE = Processes()


def to_levels(pixels: Tensor) -> np.ndarray:
    """uint8 (B, H, W, 3) of pixels (B, 3, H, W), nominally in [-1, 1]: clamp(127.5 x + 128), truncated.

    Raises:
        ValueError: NaN or infinity.
    """
    require_finite(pixels)
    return to_uint8(pixels.detach()).permute(0, 2, 3, 1).cpu().numpy()


def as_levels(images: Any, name: str) -> np.ndarray:
    """uint8 (B, H, W, 3) of a batch that may also be floats (B, 3, H, W), nominally in [-1, 1]; arrays or tensors.

    Raises:
        ValueError: another shape or dtype, NaN or infinity, or floats that are levels (0 .. 255).
    """
    batch = images.detach() if isinstance(images, Tensor) else torch.from_numpy(np.asarray(images))
    if batch.is_floating_point() and batch.ndim == 4 and batch.shape[1] == 3:
        if len(batch) and batch.abs().max() > LARGEST_PIXEL:
            raise ValueError(
                f"Float {name} are in [-1, 1] and levels are uint8; got floats up to {batch.abs().max().item():.4g}."
            )
        return to_levels(batch)
    if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[-1] != 3:
        raise ValueError(
            f"{name} must be uint8 (B, H, W, 3) or floats (B, 3, H, W) in [-1, 1]; got {batch.dtype} "
            f"{tuple(batch.shape)}."
        )
    return batch.cpu().numpy()


def one_size(levels: np.ndarray, size: tuple[int, ...] | None) -> tuple[int, ...]:
    """Height and width of (B, H, W, 3); raises ValueError where they are not the `size` of those before."""
    if size is not None and levels.shape[1:3] != size:
        (height, width), (other_height, other_width) = size, levels.shape[1:3]
        raise ValueError(
            f"All images of a set must have one size; got {width}x{height} and {other_width}x{other_height} px."
        )
    return levels.shape[1:3]


def require_finite(pixels: Tensor) -> None:
    """Raises ValueError for NaN and infinity, which 8 bits would turn into levels like any other."""
    if not pixels.isfinite().all():
        raise ValueError(
            "Images must be finite; got NaN or infinity. Check the model and its dtype: float16 overflows in some "
            "autoencoders, float32 and bfloat16 do not."
        )


def image_digests(levels: np.ndarray) -> list[bytes]:
    """A sha256 per image of (B, H, W, 3), of its shape and pixels."""
    return [
        hashlib.sha256(f"{each.shape}".encode() + np.ascontiguousarray(each).tobytes()).digest() for each in levels
    ]


def hash_digests(digests: Sequence[bytes]) -> str:
    """16 hex digits of a set of images in its order."""
    return hashlib.sha256(b"".join(digests)).hexdigest()[:16]
