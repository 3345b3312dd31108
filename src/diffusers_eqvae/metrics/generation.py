"""Generated images against a reference: FID, sFID, Inception score, KID, precision and recall from one pass.

The ADM protocol (Dhariwal & Nichol, arXiv 2105.05233): features of uint8 images, statistics with ddof 1, splits of
5000 in order, k = 3 neighbours. With another network than FID's Inception every number carries that network's name.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files import npz_keys, open_npz_array, require_format_version, write_npz
from .base import Measurement, PerImageMetric, build_metrics, measure
from .distances import FeatureStatistics
from .feature_networks import FeatureNetwork
from .image_sets import (
    Features,
    ImageSet,
    extract,
    hash_digests,
    image_digests,
    open_images,
    require_one_size,
    to_tensor,
)

# What `training/evaluate_generation.py` computes by default, and what its batches hold.
GENERATION_METRICS = ("fid", "inception_score", "precision_recall", "kid")
OFFERS = frozenset({"images", "features", "reference"})
# Changes when the same images and weights would give other numbers.
PROTOCOL_VERSION = "1 (ADM)"
NEIGHBOURS = 3
SPLIT_SIZE = 5000
STATISTICS_ROWS = 1024  # handed over at a time; changes no bit
# Of the reference, for precision, recall and KID.
REFERENCE_FEATURES = 10_000
REFERENCE_FORMAT_VERSION = 1


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
    def of(cls, images: Features, *, name: str, weights_hash: str) -> Reference:
        """The statistics of a set of images; precision, recall and KID use its first 10 000."""
        statistics = feature_statistics(images.outputs["features"])
        spatial = feature_statistics(images.outputs["spatial"]) if "spatial" in images.outputs else None
        return cls(
            name,
            images.hash,
            weights_hash,
            len(images),
            statistics.mean,
            statistics.covariance,
            None if spatial is None else spatial.mean,
            None if spatial is None else spatial.covariance,
            images.outputs["features"][:REFERENCE_FEATURES],
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """An .npz under ADM's names (mu, sigma, mu_s, sigma_s), with the hashes and the features beside them."""
        arrays = {"mu": self.mean, "sigma": self.covariance, "features": self.features}
        arrays |= {"mu_s": self.spatial_mean, "sigma_s": self.spatial_covariance}
        stored: dict[str, Any] = {key: value.numpy() for key, value in arrays.items() if value is not None}
        count = -1 if self.count is None else self.count
        stored |= {"name": self.name, "hash": self.hash, "weights_hash": self.weights_hash, "count": np.int64(count)}
        write_npz(path, format_version=np.int64(REFERENCE_FORMAT_VERSION), **stored)

    @classmethod
    def load(cls, path: str | os.PathLike[str], network: FeatureNetwork) -> Reference:
        """Statistics that `save` wrote; refused where they are another network's than `network`."""
        with np.load(path) as archive:
            found = archive["format_version"].item() if "format_version" in archive else None
            require_format_version(found, REFERENCE_FORMAT_VERSION, path=path, remedy="compute it again")
            weights_hash, count = str(archive["weights_hash"]), int(archive["count"])
            if weights_hash != network.weights_hash:
                raise ValueError(
                    f"{path} holds statistics of a network with weights {weights_hash}, and {network.name} has "
                    f"{network.weights_hash}. Compute the reference again with this network."
                )
            keys = ("mu", "sigma", "mu_s", "sigma_s", "features")
            arrays = [torch.from_numpy(archive[key]) if key in archive else None for key in keys]
            name, digest = str(archive["name"]), str(archive["hash"])
        mean, covariance, *others = arrays
        if mean is None or covariance is None:
            raise ValueError(f"{path} lacks mu and sigma; write it again.")
        return cls(name, digest, weights_hash, None if count < 0 else count, mean, covariance, *others)


def feature_statistics(features: Tensor) -> FeatureStatistics:
    """Of rows (N, D), block by block: all at once would stand in memory three more times, in float64."""
    statistics = FeatureStatistics(features.shape[1])
    for rows in features.split(STATISTICS_ROWS):
        statistics.update(rows)
    return statistics


def load_reference(
    source: str | os.PathLike[str] | ImageSet,
    network: FeatureNetwork,
    *,
    batch_size: int = 64,
    resolution: int | None = None,
    processes: Any = None,
) -> Reference:
    """A reference: saved statistics, an ADM reference .npz (statistics, arr_0 or both), a folder, or any image set.

    mu, sigma, mu_s, sigma_s of an ADM file are Inception's and are used with FID's Inception only; any other network
    is run over its arr_0. Precision, recall and KID use the first 10 000 images of arr_0.

    Example:
        >>> reference = load_reference("VIRTUAL_imagenet256_labeled.npz", network)
    """
    if isinstance(source, ImageSet):
        features = extract(network, source, batch_size=batch_size, processes=processes)
        return Reference.of(features, name=source.name, weights_hash=network.weights_hash)
    path = Path(source)
    keys = npz_keys(path) if path.is_file() else []
    if "weights_hash" in keys:
        return Reference.load(path, network)
    if "mu" in keys and network.suffix is None:
        return _adm_reference(path, keys, network, batch_size, processes)
    if keys and "arr_0" not in keys:
        raise ValueError(
            f"{path} must hold images (arr_0) to serve as a reference for {network.name} (only FID's Inception "
            f"can use mu and sigma); it holds {', '.join(keys)}."
        )
    images = open_images(path, resolution=resolution)
    return load_reference(images, network, batch_size=batch_size, processes=processes)


def _adm_reference(
    path: Path, keys: Sequence[str], network: FeatureNetwork, batch_size: int, processes: Any
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
    spatial = statistics("mu_s", "sigma_s")
    if mean is None or covariance is None:
        raise ValueError(f"{path} must hold sigma beside mu; it holds {', '.join(keys)}.")
    features = None
    if "arr_0" in keys:
        images = ImageSet(open_npz_array(path, "arr_0")[:REFERENCE_FEATURES], name=path.name)
        extracted = extract(network, images, batch_size=batch_size, processes=processes)
        digest.update(extracted.hash.encode())
        features = extracted.outputs["features"]
    return Reference(
        path.name, digest.hexdigest()[:16], network.weights_hash, None, mean, covariance, *spatial, features
    )


def network_protocol(network: FeatureNetwork) -> dict[str, str]:
    """What a result card's protocol says about the feature network."""
    return {
        "feature_network": network.name,
        "feature_network_version": PROTOCOL_VERSION,
        "feature_network_weights": network.weights_hash,
        "input_rule": network.input_rule,
    }


class FeatureMetric(PerImageMetric):
    """Keeps what a feature network gives of every image, under the network's name where it is not FID's Inception.

    Attributes:
        outputs: those of the network's outputs that the metric reads.
        what: what the images are called in a caveat.
    """

    needs = frozenset({"features"})
    outputs: tuple[str, ...] = ("features",)
    what = "samples"

    def __init__(self, network: FeatureNetwork) -> None:
        super().__init__()
        self.network = network

    @classmethod
    def from_arguments(cls, arguments: Any = None, *, network: Any = None, reference: Any = None) -> FeatureMetric:
        if network is None:
            raise ValueError(f"{cls.__name__} needs a feature network; name one with its weights (feature_networks).")
        return cls(network)

    def rows(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        given = batch["features"][self.network.name]
        return {"digests": batch["digests"], **{name: given[name] for name in self.outputs if name in given}}

    def protocol(self) -> dict[str, Any]:
        return network_protocol(self.network)

    def repeated(self, rows: Mapping[str, Tensor]) -> str | None:
        """The caveat of a set in which images repeat."""
        count, unique = len(rows["digests"]), len(torch.unique(rows["digests"], dim=0))
        return f"only {unique} of {count} {self.what} are unique" if unique < count else None


class SampleMetric(FeatureMetric):
    """Compares the features of samples with those of a `Reference`."""

    needs = frozenset({"features", "reference"})

    def __init__(self, network: FeatureNetwork, reference: Reference) -> None:
        super().__init__(network)
        if reference.weights_hash != network.weights_hash:
            raise ValueError(
                f"The reference {reference.name} is of weights {reference.weights_hash}, and {network.name} has "
                f"{network.weights_hash}. Compute both with one network."
            )
        self.reference = reference

    @classmethod
    def from_arguments(cls, arguments: Any = None, *, network: Any = None, reference: Any = None) -> SampleMetric:
        if network is None or reference is None:
            raise ValueError(f"{cls.__name__} needs a feature network and a reference to compare with.")
        return cls(network, reference)

    def protocol(self) -> dict[str, Any]:
        return {**super().protocol(), "reference_hash": self.reference.hash}


class ImageDigests(PerImageMetric):
    """No figure: which images were measured, and how many."""

    def rows(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"digests": batch["digests"]}

    def compute(self) -> dict[str, Any]:
        return {}

    def __len__(self) -> int:
        return len(self.joined()["digests"])

    @property
    def hash(self) -> str:
        return hash_digests(self.joined()["digests"])


def too_few(dimension: int, counts: Mapping[str, int | None]) -> str | None:
    """The caveat of a Fréchet distance of no more images than feature dimensions, which their number dominates."""
    few = [f"{n} {what} for {dimension} dimensions" for what, n in counts.items() if n is not None and n <= dimension]
    return "too few images: " + ", ".join(few) if few else None


def join_caveats(*caveats: str | None) -> str | None:
    return "; ".join(filter(None, caveats)) or None


def sample_batches(
    batches: Iterable[tuple[Sequence[int], np.ndarray]], networks: Iterable[FeatureNetwork] = ()
) -> Iterator[tuple[Sequence[int], dict[str, Any]]]:
    """What metrics of generated images are updated with, of (places in the set, uint8 (B, H, W, 3)).

    Example:
        >>> measured = measure(metrics, sample_batches(open_images("samples.npz").batches(64), [network]))
    """
    networks, size = list(networks), None
    for index, images_uint8 in batches:
        size = require_one_size(images_uint8, size)
        tensor = to_tensor(images_uint8)
        features = {each.name: {name: values.cpu() for name, values in each(tensor).items()} for each in networks}
        digests = image_digests(images_uint8)
        yield index, {"images": tensor.float() / 127.5 - 1, "features": features, "digests": digests}


def evaluate_generation(
    samples: Features, reference: Reference, network: FeatureNetwork, *, metrics: Iterable[str] = GENERATION_METRICS
) -> Measurement:
    """All figures that the features of samples and the reference allow.

    fid, sfid, inception_score, inception_score_std, precision, recall, kid and kid_std, under names that say which
    network it was unless it is FID's Inception.

    Example:
        >>> evaluate_generation(extract(network, batches), reference, network).figures["fid"].value
    """
    built = build_metrics(metrics, offers=OFFERS - {"images"}, network=network, reference=reference)
    batch = {"features": {network.name: samples.outputs}, "digests": samples.digests}
    return measure(built, [(range(len(samples)), batch)])


def evaluate_reconstruction(reconstructions: Features, images: Features, network: FeatureNetwork) -> Measurement:
    """rfid and, where the network has spatial features, rsfid, of reconstructions and the images they are of.

    Example:
        >>> features = [extract(network, each) for each in (reconstructions, images)]
        >>> evaluate_reconstruction(*features, network).figures["rfid"].value
    """
    batch = {
        "features": {network.name: images.outputs},
        "reconstructed_features": {network.name: reconstructions.outputs},
        "digests": images.digests,
    }
    built = build_metrics(["rfid"], offers=frozenset({"features", "reconstructed_features"}), network=network)
    return measure(built, [(range(len(images)), batch)])
