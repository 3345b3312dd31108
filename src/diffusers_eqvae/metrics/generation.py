"""Generated images against a reference: FID, sFID, Inception score, KID, precision and recall from one pass.

The ADM protocol (Dhariwal & Nichol, arXiv 2105.05233): features of uint8 images, statistics with ddof 1, splits of
5000 in order, k = 3 neighbours. With another network than FID's Inception every number carries that network's name.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files import open_npz_array, write_npz
from .distances import FeatureStatistics, frechet_distance, inception_score, kernel_distance, precision_recall
from .feature_networks import FeatureExtractor
from .image_sets import ALONE, Collected, Processes
from .inputs import ImageSet, archive_keys, open_images

logger = logging.getLogger(__name__)

# Changes when the same images and weights would give other numbers.
PROTOCOL_VERSION = "1 (ADM)"
NEIGHBOURS = 3
SPLIT_SIZE = 5000
STATISTICS_ROWS = 1024  # handed over at a time; changes no bit
# Of the reference, for precision, recall and KID.
REFERENCE_FEATURES = 10_000


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    Attributes:
        name, hash: of the images or the file the numbers came from.
        weights_hash: of the network that gave the numbers.
        count: images behind mean and covariance; None where the file does not say.
        mean, covariance: (D,), (D, D) float64.
        spatial_mean, spatial_covariance: likewise, or None.
        features: (M, D) for precision, recall and KID, or None.
    """

    name: str
    hash: str
    weights_hash: str
    count: int | None
    mean: Tensor
    covariance: Tensor
    spatial_mean: Tensor | None = None
    spatial_covariance: Tensor | None = None
    features: Tensor | None = None

    @classmethod
    def from_collected(cls, collected: Collected, *, name: str, weights_hash: str) -> Reference:
        statistics = feature_statistics(collected.features)
        spatial = None if collected.spatial is None else feature_statistics(collected.spatial)
        return cls(
            name,
            collected.hash,
            weights_hash,
            len(collected.features),
            statistics.mean,
            statistics.covariance,
            None if spatial is None else spatial.mean,
            None if spatial is None else spatial.covariance,
            collected.features[:REFERENCE_FEATURES],
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """An .npz under ADM's names (mu, sigma, mu_s, sigma_s), with the hashes and the features beside them."""
        arrays = {"mu": self.mean, "sigma": self.covariance, "features": self.features}
        arrays |= {"mu_s": self.spatial_mean, "sigma_s": self.spatial_covariance}
        stored: dict[str, Any] = {key: value.numpy() for key, value in arrays.items() if value is not None}
        count = -1 if self.count is None else self.count
        stored |= {"name": self.name, "hash": self.hash, "weights_hash": self.weights_hash, "count": np.int64(count)}
        write_npz(path, **stored)

    @classmethod
    def load(cls, path: str | os.PathLike[str], extractor: FeatureExtractor) -> Reference:
        """Statistics that `save` wrote; raises ValueError where they are of another network than `extractor`."""
        with np.load(path) as archive:
            weights_hash, count = str(archive["weights_hash"]), int(archive["count"])
            if weights_hash != extractor.weights_hash:
                raise ValueError(
                    f"{path} holds statistics of a network with weights {weights_hash}, and {extractor.name} has "
                    f"{extractor.weights_hash}. Compute the reference again with this network."
                )
            keys = ("mu", "sigma", "mu_s", "sigma_s", "features")
            arrays = [torch.from_numpy(archive[key]) if key in archive else None for key in keys]
            name, digest = str(archive["name"]), str(archive["hash"])
        mean, covariance, spatial_mean, spatial_covariance, features = arrays
        if mean is None or covariance is None:
            raise ValueError(f"{path} lacks mu and sigma; write it again.")
        numbers = (mean, covariance, spatial_mean, spatial_covariance, features)
        return cls(name, digest, weights_hash, None if count < 0 else count, *numbers)


def network_facts(extractor: FeatureExtractor) -> dict[str, str]:
    """What a result card's protocol says about the feature network."""
    return {
        "evaluator": extractor.name,
        "evaluator_version": PROTOCOL_VERSION,
        "weights_hash": extractor.weights_hash,
        "input_rule": extractor.input_rule,
    }


def feature_statistics(features: Tensor) -> FeatureStatistics:
    """Of rows (N, D), block by block: all at once would stand in memory three more times, in float64."""
    statistics = FeatureStatistics(features.shape[1])
    for rows in features.split(STATISTICS_ROWS):
        statistics.update(rows)
    return statistics


def load_reference(
    source: str | os.PathLike[str] | ImageSet,
    extractor: FeatureExtractor,
    *,
    batch_size: int = 64,
    resolution: int | None = None,
    processes: Processes = ALONE,
) -> Reference:
    """A reference: saved statistics, an ADM reference .npz (statistics, arr_0 or both), a folder, or any image set.

    mu, sigma, mu_s, sigma_s of an ADM file are Inception's and are used with FID's Inception only; any other network
    is run over its arr_0. Precision, recall and KID use the first 10 000 images of arr_0.

    Raises:
        ValueError: an .npz with neither images nor statistics for this network, of wrong shapes; and what
            `open_images` raises.
    """
    if isinstance(source, ImageSet):
        collected = processes.measure(extractor, source, batch_size=batch_size)
        return Reference.from_collected(collected, name=source.name, weights_hash=extractor.weights_hash)
    path = Path(source)
    keys = archive_keys(path) if path.is_file() else []
    if "weights_hash" in keys:
        return Reference.load(path, extractor)
    if "mu" in keys and extractor.suffix is None:
        return _adm_reference(path, keys, extractor, batch_size, processes)
    if keys and "arr_0" not in keys:
        raise ValueError(
            f"{path} must hold images (arr_0) to serve as a reference for {extractor.name} (only FID's Inception "
            f"can use mu and sigma); it holds {', '.join(keys)}."
        )
    images = open_images(path, resolution=resolution)
    return load_reference(images, extractor, batch_size=batch_size, processes=processes)


def _adm_reference(
    path: Path, keys: Sequence[str], extractor: FeatureExtractor, batch_size: int, processes: Processes
) -> Reference:
    digest = hashlib.sha256()

    def statistics(mean_key: str, covariance_key: str) -> tuple[Tensor | None, Tensor | None]:
        if mean_key not in keys or covariance_key not in keys:
            return None, None
        mean, covariance = (np.array(open_npz_array(path, key)) for key in (mean_key, covariance_key))
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or mean.dtype.kind != "f":
            raise ValueError(
                f"{mean_key} and {covariance_key} of {path} must be float (D,) and (D, D); got {mean.dtype} "
                f"{mean.shape} and {covariance.shape}."
            )
        digest.update(mean.tobytes() + covariance.tobytes())
        return torch.from_numpy(mean).double(), torch.from_numpy(covariance).double()

    mean, covariance = statistics("mu", "sigma")
    spatial_mean, spatial_covariance = statistics("mu_s", "sigma_s")
    if mean is None or covariance is None:
        raise ValueError(f"{path} must hold sigma beside mu; it holds {', '.join(keys)}.")
    features = None
    if "arr_0" in keys:
        images = ImageSet(open_npz_array(path, "arr_0")[:REFERENCE_FEATURES], name=path.name)
        collected = processes.measure(extractor, images, batch_size=batch_size)
        digest.update(collected.hash.encode())
        features = collected.features
    return Reference(
        path.name,
        digest.hexdigest()[:16],
        extractor.weights_hash,
        None,
        mean,
        covariance,
        spatial_mean,
        spatial_covariance,
        features,
    )


@dataclass(frozen=True)
class GenerationResult:
    """Numbers by name, and for those that are not to be trusted the reason."""

    metrics: dict[str, float]
    marks: dict[str, str] = field(default_factory=dict)


def evaluate_generation(
    samples: Collected, reference: Reference, *, extractor: FeatureExtractor, kid_seed: int = 0
) -> GenerationResult:
    """All metrics that the samples and the reference allow.

    A Fréchet distance of fewer images than feature dimensions is dominated by their number; it is computed, marked
    and warned about. So is a set in which images repeat.

    Returns:
        fid, sfid, inception_score, inception_score_std, precision, recall, kid, kid_std, as far as the network gives
        them and under names that say which it is; no kid_std where every subset of KID is both whole sets.

    Raises:
        ValueError: a reference of another network.
    """
    metrics, marks = _frechet_distances(samples, reference, extractor)
    name = extractor.metric_name
    if samples.logits is not None:
        score, deviation = inception_score(samples.logits, split_size=SPLIT_SIZE)
        metrics |= {name("inception_score"): score, name("inception_score_std"): deviation}
    if reference.features is not None and min(len(samples.features), len(reference.features)) > NEIGHBOURS:
        precision, recall = precision_recall(samples.features, reference.features, neighbours=NEIGHBOURS)
        metrics |= {name("precision"): precision, name("recall"): recall}
        generator = torch.Generator().manual_seed(kid_seed)
        kid, spread = kernel_distance(samples.features, reference.features, generator=generator)
        metrics |= {name("kid"): kid} | ({} if spread is None else {name("kid_std"): spread})
    return _marked(metrics, marks, samples, "samples")


def evaluate_reconstruction(
    reconstructions: Collected, images: Collected, *, extractor: FeatureExtractor
) -> GenerationResult:
    """rfid and, where the network has spatial features, rsfid: Fréchet distances of reconstructions to their images.

    Both sets are the same N images, cropped once. Names and marks are those of `evaluate_generation` with an r
    before them (rfid; rfd_NAME of another network than FID's Inception).
    """
    reference = Reference.from_collected(images, name="images", weights_hash=extractor.weights_hash)
    metrics, marks = _frechet_distances(reconstructions, reference, extractor)
    metrics = {f"r{name}": value for name, value in metrics.items()}
    return _marked(metrics, {f"r{name}": reason for name, reason in marks.items()}, images, "images")


def _frechet_distances(
    samples: Collected, reference: Reference, extractor: FeatureExtractor
) -> tuple[dict[str, float], dict[str, str]]:
    """fid and sfid by name, and what is to be said against them."""
    if reference.weights_hash != extractor.weights_hash or len(reference.mean) != samples.features.shape[1]:
        raise ValueError(
            f"The reference {reference.name} has {len(reference.mean)} dimensions of weights "
            f"{reference.weights_hash}; the samples have {samples.features.shape[1]} of {extractor.weights_hash}. "
            "Compute both with one network."
        )
    pairs = {"fid": (samples.features, reference.mean, reference.covariance)}
    if samples.spatial is not None and reference.spatial_mean is not None and reference.spatial_covariance is not None:
        pairs["sfid"] = (samples.spatial, reference.spatial_mean, reference.spatial_covariance)
    counts = [(len(samples.features), "samples")]
    counts += [] if reference.count is None else [(reference.count, "reference images")]
    metrics: dict[str, float] = {}
    marks: dict[str, str] = {}
    for metric, (features, mean, covariance) in pairs.items():
        own, name = feature_statistics(features), extractor.metric_name(metric)
        metrics[name] = frechet_distance(own.mean, own.covariance, mean, covariance)
        too_few = [
            f"{count} {what} for {own.dimension} dimensions" for count, what in counts if count <= own.dimension
        ]
        if too_few:
            marks[name] = "too few images: " + ", ".join(too_few)
    return metrics, marks


def _marked(metrics: dict[str, float], marks: dict[str, str], images: Collected, what: str) -> GenerationResult:
    """The result, with a mark and a warning where images repeat."""
    count = len(images.digests)
    if images.unique < count:
        repeated = f"only {images.unique} of {count} {what} are unique"
        marks = {metric: "; ".join(filter(None, (marks.get(metric), repeated))) for metric in metrics}
    for metric, reason in marks.items():
        logger.warning("%s = %.4g is not comparable: %s.", metric, metrics[metric], reason)
    return GenerationResult(metrics, marks)
