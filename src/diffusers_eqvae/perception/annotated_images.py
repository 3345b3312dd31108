"""Annotated images as features, batch by batch, and the hash of all that was read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..autoencoders import Autoencoder, encode
from ..images import to_uint8
from ..metrics.image_sets import hash_digests, image_digests
from ..models.alignment_network import AlignmentNetwork, AlignmentOutput
from .features import latent_features
from .tasks import DepthTask, SegmentationTask, read_pixels


class AnnotatedReader:
    """Reads images with their annotations and turns them into features of an autoencoder's latents (their mean).

    Args:
        vae: where it is, images are brought.
        network: trained with it; None takes the latents themselves.
        window: of cells, see `latent_features`.
        resolution: side in pixels of the centre crops.
        batch_size: images per forward.
    """

    def __init__(
        self,
        vae: Autoencoder,
        task: SegmentationTask | DepthTask,
        *,
        network: AlignmentNetwork | None,
        window: int,
        resolution: int,
        batch_size: int,
    ) -> None:
        self.vae = vae
        self.task = task
        self.network = network
        self.window = window
        self.resolution = resolution
        self.batch_size = batch_size
        self._digests: dict[str, list[Tensor]] = {"images_hash": [], "targets_hash": []}

    @property
    def hashes(self) -> dict[str, str]:
        """Of the crops of all images read so far, pixel by pixel and in order, and of those of their annotations."""
        return {name: hash_digests(torch.cat(digests)) for name, digests in self._digests.items()}

    @property
    def protocol(self) -> dict[str, Any]:
        """What a result card of the task "perception" states of all that was read so far."""
        if isinstance(self.task, DepthTask):
            annotation = "depth" + (" up to a factor per image" if self.task.median_scaling else " in metres")
        else:
            annotation = f"classes, {self.task.ignore_index} is void"
        return {
            "annotation": annotation,
            "resize_rule": f"ADM centre crop to {self.resolution} px",
            **self.hashes,
        }

    @torch.no_grad()
    def batches(self, pairs: Sequence[tuple[Path, Path]]) -> Iterator[tuple[Tensor, AlignmentOutput, Tensor]]:
        """Pixels (B, 3, S, S), features, and annotations (B, S, S).

        Raises:
            ValueError: a file that cannot be read; names it. Latents or features with NaN or infinity.
        """
        for start in range(0, len(pairs), self.batch_size):
            images, targets = zip(*pairs[start : start + self.batch_size], strict=True)
            pixels, truth = read_pixels(images, self.resolution), self.task.read(targets, self.resolution)
            self._digests["images_hash"].append(image_digests(to_uint8(pixels).permute(0, 2, 3, 1).numpy()))
            self._digests["targets_hash"].append(image_digests(truth.numpy()))
            latents = encode(self.vae, pixels.to(self.vae.device)).mode()
            _require_finite(latents, "latents", "autoencoder", images)
            seen = latent_features(latents, self.network, window=self.window)
            for features in (seen.patch, *(() if seen.cls is None else (seen.cls,))):
                _require_finite(features, "features", "alignment network", images)
            yield pixels, seen, truth

    def cells(self, pairs: Sequence[tuple[Path, Path]]) -> tuple[Tensor, Tensor]:
        """Features (N, D, h, w) and targets (N, K, h, w) of every cell of annotated images, on the vae's device."""
        known = []
        for _, seen, truth in self.batches(pairs):
            height, width = seen.patch.shape[-2:]
            known.append((seen.patch, self.task.cell_targets(truth, (height, width))))
        features, targets = (torch.cat(parts) for parts in zip(*known, strict=True))
        return features, targets.to(features)


def split_figures(figures: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, str]]:
    """`figures` of a task as `metrics` and `caveats` of a result card, FIGURE_METHOD each; lists are left out.

    A figure that is not finite is a caveat and not a number.
    """
    values = {
        f"{name}_{method}": value
        for method, measured in figures.items()
        for name, value in measured.items()
        if isinstance(value, float)
    }
    numbers = {name: value for name, value in values.items() if math.isfinite(value)}
    return numbers, {name: f"{value} for these images" for name, value in values.items() if name not in numbers}


def _require_finite(values: Tensor, what: str, origin: str, images: Sequence[Path]) -> None:
    """NaN is nearest to nothing: any cells would be the neighbours, and figures would come out all the same."""
    for path, finite in zip(images, values.isfinite().flatten(1).all(1).tolist(), strict=True):
        if not finite:
            raise ValueError(
                f"The {what} of {path} hold NaN or infinity, and no figure means anything; check the weights of the "
                f"{origin}."
            )
