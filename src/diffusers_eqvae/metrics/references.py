"""What generated images are compared with: the statistics of a reference, and which evaluator gave them.

An evaluator is a network with its weights, the rule by which it is given images, and the size of those: distances by
different ones cannot be compared. What a file does not say is unknown, which is stated, and marked beside a figure.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..classes import ClassTable
from ..files import npz_keys, open_npz_array, read_npz, require_format_version, write_npz
from .distances import FeatureStatistics
from .feature_networks import FeatureNetwork
from .image_sets import Features, ImageSet, extract, open_images
from .result_card import UNKNOWN

logger = logging.getLogger(__name__)

# Changes when the same images and weights would give other numbers.
PROTOCOL_VERSION = "1 (ADM)"
STATISTICS_ROWS = 1024  # handed over at a time; changes no bit
# Of the reference, for precision, recall and KID.
REFERENCE_FEATURES = 10_000
FORMAT_VERSION = 2  # 1 did not know the size of its images
_CALLED = {
    "weights": "network's weights",
    "version": "transcription of the network",
    "input_rule": "rule by which the network is given images",
    "image_size": "size of images",
}
# How far the mean of some of the images may be from that of all, in squared standard errors; and their variances.
_LARGEST_SQUARED_ERROR, _LARGEST_RATIO = 2.0, 1.5


def evaluator_identity(network: FeatureNetwork, image_size: str | None = None) -> dict[str, str]:
    """What two sets of features must share to be compared, as a JSON value that travels with them.

    Example:
        >>> evaluator_identity(network, "256x256")["image_size"]
        '256x256'
    """
    return {
        "weights": network.weights_hash,
        "version": PROTOCOL_VERSION,
        "input_rule": network.input_rule,
        "image_size": image_size or UNKNOWN,
    }


def require_same_evaluator(
    expected: Mapping[str, str], given: Mapping[str, str], *, whose: str, resolution: str = "resolution"
) -> None:
    """Refuses an evaluator, or a part of one, that differs from `expected`; what is unknown passes.

    Args:
        whose: what `expected` belongs to, for the message.
        resolution: what the option is called that crops images to a size.

    Example:
        >>> require_same_evaluator(reference.evaluator, {"image_size": "32x32"}, whose="the reference images64")
    """
    for part in given:
        pair = expected.get(part, UNKNOWN), given[part]
        if UNKNOWN in pair or pair[0] == pair[1]:
            continue
        remedy = "Compute the reference again with this network"
        if part == "image_size":
            remedy = f"Crop folders and datasets to one size by {resolution}, or take a reference of the other size"
        raise ValueError(f"The {_CALLED[part]} of {whose} is {pair[0]}, and here it is {pair[1]}. {remedy}.")


def require_same_classes(references: Iterable[Reference | None], classes: ClassTable) -> None:
    """Refuses samples of other classes than a reference's, by name, and warns of those of its classes without samples.

    Example:
        >>> require_same_classes([reference], sampled_classes(pipeline, 50000, pipeline.class_ids, seed=0))
    """
    remedy = (
        "Take a reference of these classes, or sample those it has; where they are the same under other names, let "
        'id2label of what was sampled (its config.json, or sampling.json beside the samples) give both, as "tench, '
        'n01440764"'
    )
    for reference in filter(None, references):
        whose = f"the reference {reference.name}"
        if said := reference.classes.uncovered(classes, whose=whose, remedy=remedy):
            logger.warning("%s", said)


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    Attributes:
        name, hash: of the images or the file the numbers came from.
        evaluator: which network gave them, of images of which size (`evaluator_identity`), as far as it is known.
        resize_rule: how the images were brought to that size.
        count: images behind mean and covariance; None where the file does not say.
        mean, covariance: (D,), (D, D) float64.
        spatial_mean, spatial_covariance: likewise, or None.
        features: (M, D) for precision, recall and KID, or None.
        doubt: why it is not known that mean and covariance are this network's; None where it is.
        classes: names and counts of its images' classes; empty where nothing says them.
    """

    name: str
    hash: str
    evaluator: Mapping[str, str]
    resize_rule: str
    count: int | None
    mean: Tensor
    covariance: Tensor
    spatial_mean: Tensor | None = None
    spatial_covariance: Tensor | None = None
    features: Tensor | None = None
    doubt: str | None = None
    classes: ClassTable = field(default_factory=ClassTable)

    @property
    def weights_hash(self) -> str:
        """Of the network that gave the numbers, or "unknown"."""
        return self.evaluator.get("weights", UNKNOWN)

    @classmethod
    def of(
        cls,
        images: Features,
        *,
        name: str,
        evaluator: Mapping[str, str],
        resize_rule: str = UNKNOWN,
        classes: ClassTable | None = None,
    ) -> Reference:
        """The statistics of a set of images; precision, recall and KID use its first 10 000."""
        statistics = feature_statistics(images.outputs["features"])
        spatial = feature_statistics(images.outputs["spatial"]) if "spatial" in images.outputs else None
        return cls(
            name,
            images.hash,
            evaluator,
            resize_rule,
            len(images),
            statistics.mean,
            statistics.covariance,
            None if spatial is None else spatial.mean,
            None if spatial is None else spatial.covariance,
            images.outputs["features"][:REFERENCE_FEATURES],
            classes=classes or ClassTable(),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """An .npz under ADM's names (mu, sigma, mu_s, sigma_s), with what they are of and the features beside them."""
        arrays = {"mu": self.mean, "sigma": self.covariance, "features": self.features}
        arrays |= {"mu_s": self.spatial_mean, "sigma_s": self.spatial_covariance}
        stored: dict[str, Any] = {key: value.numpy() for key, value in arrays.items() if value is not None}
        said = {"name": self.name, "hash": self.hash, "evaluator": dict(self.evaluator), "count": self.count}
        said |= {"resize_rule": self.resize_rule, "doubt": self.doubt, "classes": self.classes.to_config()}
        write_npz(path, format_version=np.int64(FORMAT_VERSION), reference=json.dumps(said), **stored)

    @classmethod
    def load(cls, path: str | os.PathLike[str], network: FeatureNetwork) -> Reference:
        """Statistics that `save` wrote; refused where they are another network's than `network`."""
        keys, name = npz_keys(Path(path)), Path(path).name
        found = read_npz(Path(path), "format_version")["format_version"].item() if "format_version" in keys else None
        require_format_version(found, FORMAT_VERSION, path=path, remedy="compute it again")
        try:
            said = json.loads(str(read_npz(Path(path), "reference")["reference"]))
            who, rule, doubt = said["evaluator"], str(said["resize_rule"]), said["doubt"]
            identity, count = (str(said["name"]), str(said["hash"])), said["count"]
            classes = ClassTable.from_config(said.get("classes", {})) or ClassTable()
            require_same_evaluator(who, evaluator_identity(network), whose=f"the reference {name}")
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} does not say what its statistics are of ({error}); compute it again.") from error
        mean, covariance = _moments(Path(path), keys, "mu", "sigma")
        if mean is None or covariance is None:
            raise ValueError(f"{path} lacks mu and sigma; compute it again.")
        features = torch.from_numpy(read_npz(Path(path), "features")["features"]) if "features" in keys else None
        if features is not None and (features.ndim != 2 or features.shape[1] != len(mean)):
            raise ValueError(f"features of {path} must be (M, {len(mean)}); got {tuple(features.shape)}.")
        spatial = _moments(Path(path), keys, "mu_s", "sigma_s")
        return cls(*identity, who, rule, count, mean, covariance, *spatial, features, doubt, classes)

    def statement(self) -> dict[str, str]:
        """What a result card's protocol says about the reference."""
        return {
            "reference_hash": self.hash,
            "reference_weights": self.weights_hash,
            "reference_size": self.evaluator.get("image_size", UNKNOWN),
            "reference_resize_rule": self.resize_rule,
        }


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
    is run over its arr_0. Which Inception gave them, no such file says: it is taken as known where arr_0 beside them
    has their mean within its standard error, and stated as unknown elsewhere. Precision, recall and KID use the first
    10 000 images of arr_0.

    Example:
        >>> reference = load_reference("VIRTUAL_imagenet256_labeled.npz", network)
    """
    if isinstance(source, ImageSet):
        features = extract(network, source, batch_size=batch_size, processes=processes)
        who = evaluator_identity(network, features.image_size)
        rule, classes = source.resize_rule, source.classes
        return Reference.of(features, name=source.name, evaluator=who, resize_rule=rule, classes=classes)
    path = Path(source)
    keys = npz_keys(path) if path.is_file() else []
    if {"format_version", "reference", "weights_hash"} & set(keys):
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
    path: Path, keys: Iterable[str], network: FeatureNetwork, batch_size: int, processes: Any
) -> Reference:
    mean, covariance = _moments(path, keys, "mu", "sigma")
    spatial_mean, spatial_covariance = _moments(path, keys, "mu_s", "sigma_s")
    if mean is None or covariance is None:
        raise ValueError(f"{path} must hold sigma beside mu; it holds {', '.join(keys)}.")
    digest = hashlib.sha256()
    for each in (mean, covariance, spatial_mean, spatial_covariance):
        digest.update(b"" if each is None else each.numpy().tobytes())
    features, who, rule = None, evaluator_identity(network) | {"weights": UNKNOWN}, UNKNOWN
    doubt: str | None = f"nothing in {path.name} says which network gave its mu and sigma"
    if "arr_0" in keys:
        images = ImageSet(open_npz_array(path, "arr_0")[:REFERENCE_FEATURES], name=path.name)
        extracted = extract(network, images, batch_size=batch_size, processes=processes)
        digest.update(extracted.hash.encode())
        features, rule, who["image_size"] = extracted.outputs["features"], images.resize_rule, extracted.image_size
        doubt = f"mu and sigma of {path.name} are not what this network gives of the images beside them"
        if _agree(features, mean, covariance):
            doubt, who["weights"] = None, network.weights_hash
    moments = (mean, covariance, spatial_mean, spatial_covariance)
    return Reference(path.name, digest.hexdigest()[:16], who, rule, None, *moments, features, doubt)


def _agree(features: Tensor, mean: Tensor, covariance: Tensor) -> bool:
    """Whether features (N, D) may be some of those that mean and covariance are of."""
    if features.shape[1] != len(mean) or len(features) < 2:
        return False
    variance = covariance.diagonal().clamp_min(torch.finfo(torch.float64).tiny)
    squared_errors = (features.double().mean(0) - mean).square() / variance * len(features)
    ratio = features.double().var(0).sum() / variance.sum()
    return bool(squared_errors.mean() <= _LARGEST_SQUARED_ERROR and 1 / _LARGEST_RATIO <= ratio <= _LARGEST_RATIO)


def _moments(
    path: Path, keys: Iterable[str], mean_key: str, covariance_key: str
) -> tuple[Tensor | None, Tensor | None]:
    """Mean (D,) and covariance (D, D) of an .npz in float64; None for both where it lacks one of them."""
    if mean_key not in keys or covariance_key not in keys:
        return None, None
    mean, covariance = (np.array(open_npz_array(path, key)) for key in (mean_key, covariance_key))
    if (
        mean.ndim != 1
        or covariance.shape != (len(mean), len(mean))
        or {mean.dtype.kind, covariance.dtype.kind} != {"f"}
    ):
        raise ValueError(
            f"{mean_key} and {covariance_key} of {path} must be float (D,) and (D, D); got {mean.dtype} "
            f"{mean.shape} and {covariance.dtype} {covariance.shape}."
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{mean_key} and {covariance_key} of {path} must be finite; compute them again.")
    return torch.from_numpy(mean).double(), torch.from_numpy(covariance).double()
