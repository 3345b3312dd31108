"""Generated images against a reference: FID, sFID, Inception score, KID, precision and recall from one pass.

The ADM protocol (Dhariwal & Nichol, arXiv 2105.05233): features of uint8 images, statistics with ddof 1, splits of
5000 in order, k = 3 neighbours. With another network than FID's Inception every number carries that network's name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import Figure, Measurement, PerImageMetric, build_metrics, measure
from .distances import FeatureStatistics, frechet_distance
from .errors import jackknife_error, without_each
from .feature_networks import FeatureNetwork
from .image_sets import Features, hash_digests, image_digests, require_one_size, size_of, to_tensor
from .references import (
    PROTOCOL_VERSION,
    Reference,
    evaluator_identity,
    feature_statistics,
    load_reference,
    require_same_classes,
    require_same_evaluator,
)

__all__ = [
    "FeatureMetric",
    "ImageDigests",
    "Reference",
    "SampleMetric",
    "evaluate_generation",
    "evaluate_reconstruction",
    "feature_statistics",
    "load_reference",
    "require_same_classes",
    "sample_batches",
]

logger = logging.getLogger(__name__)

# What `training/evaluate_generation.py` computes by default, and what its batches hold.
GENERATION_METRICS = ("fid", "inception_score", "precision_recall", "kid")
OFFERS = frozenset({"images", "samples", "features", "reference"})
NEIGHBOURS = 3
SPLIT_SIZE = 5000


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
        whose = f"the reference {reference.name}"
        require_same_evaluator(reference.evaluator, evaluator_identity(network), whose=whose)
        self.reference = reference

    @classmethod
    def from_arguments(cls, arguments: Any = None, *, network: Any = None, reference: Any = None) -> SampleMetric:
        if network is None or reference is None:
            raise ValueError(f"{cls.__name__} needs a feature network and a reference to compare with.")
        return cls(network, reference)

    def single_features(self, features: Tensor) -> Tensor | None:
        """The reference's features of single images; None, which is said, where either set has too few to compare."""
        reference = self.reference.features
        count = 0 if reference is None else min(len(features), len(reference))
        if count > NEIGHBOURS:
            return reference
        why = "statistics only" if reference is None else f"{count} images, and more than {NEIGHBOURS} are needed"
        logger.warning(
            "%s is not measured against the reference %s: %s.", type(self).__name__, self.reference.name, why
        )
        return None

    def protocol(self) -> dict[str, Any]:
        return {**super().protocol(), **self.reference.statement()}


class ImageDigests(PerImageMetric):
    """No figure: which images were measured, how many, and their size."""

    def rows(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        sides = torch.tensor(batch["images"].shape[:1:-1]).expand(len(batch["digests"]), 2)
        return {"digests": batch["digests"], "sides": sides}

    @property
    def image_size(self) -> str:
        """ "WIDTHxHEIGHT", or those of the smallest and the largest sides where they differ."""
        sides = self.joined()["sides"]
        return "-".join(dict.fromkeys("x".join(map(str, each.tolist())) for each in (sides.amin(0), sides.amax(0))))

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


def paired_frechet(own: Tensor, images: Tensor, *, caveat: str | None = None) -> Figure:
    """The Fréchet distance of features (N, D) to those of the images they go with, left out together for its error."""
    theirs, its = feature_statistics(own), feature_statistics(images)
    rest = zip(without_each(own), without_each(images), strict=True)
    return Figure(
        _frechet(theirs, its),
        jackknife_error([_frechet(*pair) for pair in rest]),
        len(own),
        better="lower",
        caveat=join_caveats(too_few(theirs.dimension, {"samples": len(own), "reference images": len(images)}), caveat),
    )


def _frechet(own: FeatureStatistics, images: FeatureStatistics) -> float:
    return frechet_distance(own.mean, own.covariance, images.mean, images.covariance)


def join_caveats(*caveats: str | None) -> str | None:
    return "; ".join(filter(None, caveats)) or None


def sample_batches(
    batches: Iterable[tuple[Sequence[int], np.ndarray]],
    networks: Iterable[FeatureNetwork] = (),
    *,
    references: Iterable[Reference | None] = (),
    resolution: str = "resolution",
) -> Iterator[tuple[Sequence[int], dict[str, Any]]]:
    """What metrics of generated images are updated with, of (places in the set, uint8 (B, H, W, 3)).

    Args:
        references: images of another size than theirs are refused, before a network sees any.
        resolution: what the option is called that crops images to a size.

    Example:
        >>> measured = measure(metrics, sample_batches(open_images("samples.npz").batches(64), [network]))
    """
    networks, references, size = list(networks), list(references), None
    for index, images_uint8 in batches:
        size = require_one_size(images_uint8, size)
        for reference in filter(None, references):
            own, whose = {"image_size": size_of(images_uint8)}, f"the reference {reference.name}"
            require_same_evaluator(reference.evaluator, own, whose=whose, resolution=resolution)
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
    own = {"image_size": samples.image_size}
    require_same_evaluator(reference.evaluator, own, whose=f"the reference {reference.name}")
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
