"""Aspect buckets: a few shapes of nearly as many pixels, and which of them each image of a data set is cropped to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np

from .order import BucketOrder

Shape = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Buckets:
    """The shape of every image; images of one batch have one.

    Args:
        shapes: (height, width) in pixels.
        of: (N,) the index of each image's shape.
        forms: (N,) log(height / width) of the images.
        batch_size: of all ranks and micro-batches of a step together.

    Example:
        >>> buckets = Buckets.fit({0: (768, 512), 1: (500, 700)}, 2, resolution=256, stride=8, most=4, batch_size=1)
        >>> buckets.shapes, buckets.shape(1)
        (((208, 312), (296, 216)), (296, 216))
    """

    shapes: tuple[Shape, ...]
    of: np.ndarray
    forms: np.ndarray
    batch_size: int

    @classmethod
    def fit(
        cls, sizes: Mapping[int, Shape], count: int, *, resolution: int, stride: int, most: int, batch_size: int
    ) -> Self:
        """At most so many of `bucket_shapes`, each of which is the nearest of at least a batch of images.

        While that is not so, a shape is given up, of those with too few images where there are any: the one whose
        images lose least by it, by their number and by how far the next shape is. The last one is kept. Own choice.

        Args:
            sizes: (width, height) by index of the images whose header can be read; another has that of the next.
            count: N.
            resolution: whose square is the most pixels that a shape has.
            stride: of the autoencoder, which divides all sides.
            most: number of shapes.
            batch_size: of all ranks and micro-batches of a step together.
        """
        readable = np.array(sorted(sizes))
        width, height = np.array([sizes[index] for index in readable.tolist()], dtype=np.float64).T
        forms = np.log(height / width)[np.searchsorted(readable, np.arange(count)) % len(readable)]
        distinct, inverse, numbers = np.unique(forms, return_inverse=True, return_counts=True)
        shapes = bucket_shapes(resolution, stride)
        while True:
            own = _forms(shapes)
            gaps = np.diff(own)
            nearest = np.searchsorted(own[:-1] + gaps / 2, distinct)
            held = np.bincount(nearest, weights=numbers, minlength=len(shapes))
            few = np.flatnonzero(held < batch_size)
            if len(shapes) == 1 or (not len(few) and len(shapes) <= most):
                return cls(tuple(shapes), nearest[inverse], forms, batch_size)
            loss = held * np.minimum(np.append(gaps, np.inf), np.append(np.inf, gaps))
            among = few if len(few) else np.arange(len(shapes))
            del shapes[among[loss[among].argmin()]]

    def shape(self, index: int) -> Shape:
        """(height, width) that the image at `index` is cropped to."""
        return self.shapes[self.of[index]]

    def order(self, *, seed: int) -> BucketOrder:
        return BucketOrder(self.of, self.batch_size, seed=seed)

    @property
    def shortest_px(self) -> int:
        """Of all sides."""
        return min(map(min, self.shapes))

    @cached_property
    def cut_off(self) -> np.ndarray:
        """(N,) the share of each image beyond the largest rectangle of its shape."""
        return 1 - np.exp(-np.abs(self.forms - _forms(self.shapes)[self.of]))

    @property
    def identity(self) -> str:
        return hashlib.sha256(repr(self.shapes).encode() + self.of.astype("<i8").tobytes()).hexdigest()[:16]

    def largest(self) -> Buckets:
        """All images in the shape of most pixels: for measuring what a step may need."""
        shape = max(self.shapes, key=lambda sides: sides[0] * sides[1])
        return Buckets((shape,), np.zeros_like(self.of), self.forms, self.batch_size)

    def __str__(self) -> str:
        held = zip(self.shapes, np.bincount(self.of).tolist(), strict=True)
        shapes = ", ".join(f"{height}x{width}: {number}" for (height, width), number in held)
        mean, most = self.cut_off.mean(), self.cut_off.max()
        return (
            f"{shapes} images (height x width); cropped to these they lose {mean:.1%} on average, {most:.1%} at most"
        )


def bucket_shapes(resolution: int, stride: int) -> list[Shape]:
    """(height, width), from the widest to the highest: the shorter side any multiple of `stride` from half of
    `resolution` to all of it, the longer one the largest for which there are at most resolution^2 pixels.

    Example:
        >>> bucket_shapes(64, 16)
        [(32, 128), (48, 80), (64, 64), (80, 48), (128, 32)]
    """
    shorter = range(-(-resolution // (2 * stride)) * stride, resolution + 1, stride)
    wide = [(height, resolution**2 // height // stride * stride) for height in shorter]
    return [*wide, *((width, height) for height, width in reversed(wide[:-1]))]


def _forms(shapes: Sequence[Shape]) -> np.ndarray:
    return np.array([np.log(height / width) for height, width in shapes])
