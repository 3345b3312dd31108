"""Annotated images as features and annotations, batch by batch, and the hashes of all that was read."""

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
from ..models.alignment_network import AlignmentNetwork
from .annotated_images import read_pixels
from .features import LatentFeatures, latent_features
from .tasks import Task


class AnnotatedReader:
    """Reads images with their annotations and turns them into features of an autoencoder's latents (their mean).

    Args:
        vae: where it is, images are brought.
        tasks: one for each annotation of an image.
        network: trained with the autoencoder; None takes the latents themselves.
        window: of latent positions, see `latent_features`.
        resolution: side in pixels of the centre crops.
        batch_size: images per forward.

    Example:
        >>> reader = AnnotatedReader(vae, [DepthTask()], network=None, window=5, resolution=256, batch_size=8)
        >>> for pixels, features, (metres,) in reader.batches(paired_files("images", "depths")): ...
    """

    def __init__(
        self,
        vae: Autoencoder,
        tasks: Sequence[Task],
        *,
        network: AlignmentNetwork | None,
        window: int,
        resolution: int,
        batch_size: int,
    ) -> None:
        if network is not None:
            network.check_autoencoder(vae)
        self.vae = vae
        self.tasks = tasks
        self.network = network
        self.window = window
        self.resolution = resolution
        self.batch_size = batch_size
        self._digests: list[list[Tensor]] = [[] for _ in range(1 + len(tasks))]  # of images, and of each annotation

    @property
    def protocol(self) -> dict[str, Any]:
        """What a result card of the task "perception" states of all that was read so far."""
        images, *annotations = self._digests
        return {
            "annotation": "; ".join(task.annotation for task in self.tasks),
            "image_size": f"{self.resolution}x{self.resolution}",
            "resize_rule": f"ADM centre crop to {self.resolution} px",
            "data_hash": hash_digests(torch.cat(images)),
            "targets_hash": hash_digests(torch.cat([digest for digests in annotations for digest in digests])),
        }

    @torch.no_grad()
    def batches(self, rows: Sequence[tuple[Path, ...]]) -> Iterator[tuple[Tensor, LatentFeatures, list[Tensor]]]:
        """Pixels (B, 3, S, S), features, and the annotations (B, S, S) of each task; see `paired_files` for rows.

        Latents and features with NaN or infinity are refused, and so is a file that cannot be read.
        """
        for start in range(0, len(rows), self.batch_size):
            images, *annotations = zip(*rows[start : start + self.batch_size], strict=True)
            pixels = read_pixels(images, self.resolution)
            truths = [task.read(files, self.resolution) for task, files in zip(self.tasks, annotations, strict=True)]
            read = [to_uint8(pixels).permute(0, 2, 3, 1), *truths]
            for digests, values in zip(self._digests, read, strict=True):
                digests.append(image_digests(values.numpy()))
            raw_latents = encode(self.vae, pixels.to(self.vae.device)).mode()
            _require_finite(raw_latents, "latents", "autoencoder", images)
            features = latent_features(raw_latents, self.network, window=self.window)
            for values in (features.patch, *(() if features.cls is None else (features.cls,))):
                _require_finite(values, "features", "alignment network", images)
            yield pixels, features, truths

    def positions(self, rows: Sequence[tuple[Path, ...]]) -> tuple[Tensor, list[Tensor]]:
        """Features (N, D, h, w) of annotated images, and each task's targets (N, K, h, w), on the vae's device."""
        patches, targets = [], []
        for _, features, truths in self.batches(rows):
            grid = (features.patch.shape[-2], features.patch.shape[-1])
            patches.append(features.patch)
            targets.append([task.targets(truth, grid) for task, truth in zip(self.tasks, truths, strict=True)])
        known = torch.cat(patches)
        return known, [torch.cat(parts).to(known) for parts in zip(*targets, strict=True)]


def split_results(results: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, str]]:
    """`results` of a task as `metrics` and `caveats` of a result card, METRIC_METHOD each; lists are left out.

    A value that is not finite is not a number, and a caveat stands in its place.

    Example:
        >>> split_results({"head": {"mean_iou": 0.5, "accuracy": float("nan"), "iou": [0.5]}})
        ({'mean_iou_head': 0.5}, {'accuracy_head': 'nan for these images'})
    """
    values = {
        f"{name}_{method}": value
        for method, measured in results.items()
        for name, value in measured.items()
        if isinstance(value, float)
    }
    numbers = {name: value for name, value in values.items() if math.isfinite(value)}
    return numbers, {name: f"{value} for these images" for name, value in values.items() if name not in numbers}


def _require_finite(values: Tensor, what: str, origin: str, images: Sequence[Path]) -> None:
    """NaN is nearest to nothing: any positions would be the neighbours, and metrics would come out all the same."""
    for path, finite in zip(images, values.isfinite().flatten(1).all(1).tolist(), strict=True):
        if not finite:
            raise ValueError(
                f"The {what} of {path} hold NaN or infinity, and no metric means anything; check the weights of the "
                f"{origin}."
            )
