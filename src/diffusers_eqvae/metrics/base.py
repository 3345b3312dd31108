"""What a metric is: figures of a set of images from one pass, whatever the order, the batches and the processes.

A metric is one file in `metrics/members/`, or one of your own that `load_extension` runs:

    from diffusers_eqvae.metrics.base import PerImageMetric, register_metric

    @register_metric("saturation")
    class Saturation(PerImageMetric):
        needs = frozenset({"images"})

        def rows(self, batch):
            return {"saturation": batch["images"].abs().mean((1, 2, 3))}
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ..extensions import Registry

logger = logging.getLogger(__name__)

Better = Literal["higher", "lower"] | None

METRICS: Registry[type[Metric]] = Registry("metric", "diffusers_eqvae.metrics.members")
register_metric = METRICS.register


@dataclass(frozen=True)
class Figure:
    """One number of a set of images.

    Attributes:
        value: NaN where it is undefined for these images.
        error: standard error of the value, or None where it is not known.
        n: images behind it.
        unit: "dB", or "" for a number without one.
        better: whether "higher" or "lower" is better; None: neither.
        caveat: why the value is undefined or not to be trusted.

    Example:
        >>> Figure.mean(torch.tensor([20.0, 22.0]), unit="dB", better="higher")
        Figure(value=21.0, error=1.0, n=2, unit='dB', better='higher', caveat=None)
    """

    value: float
    error: float | None = None
    n: int | None = None
    unit: str = ""
    better: Better = None
    caveat: str | None = None

    @classmethod
    def mean(cls, values: Tensor, *, unit: str = "", better: Better = None) -> Figure:
        """The mean of (N,) and its standard error, the deviation (ddof 1) over sqrt(N)."""
        values = values.double()
        error = (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else None
        return cls(values.mean().item(), error, len(values), unit, better)


class Metric(ABC):
    """One or more figures from one pass over a set of images.

    A batch is a dict; `needs` names the entries that `update` reads:

    - "images": pixels (B, 3, H, W) in [-1, 1]; "labels": their class ids (B,), and "masks": their regions (B, H, W),
      only where the set has them: a metric does not need them, it `uses` them;
    - "reconstructions": likewise, clamped; "posteriors": their `Posterior`; "autoencoder": the model that made both;
    - "features": name of a feature network -> what it gives of the images; "reconstructed_features": likewise;
    - "reference": nothing of a batch, but a `Reference` at construction; "samples": nothing either, but that the
      images were generated, for figures that say nothing of others.

    Whatever reaches another process (`merge`) is pickled: leave networks out of it (`__getstate__`).

    Example:
        >>> metric = METRICS["psnr"]()
        >>> metric.update({"images": pixels, "reconstructions": reconstructions}, range(len(pixels)))
        >>> metric.compute()["psnr"].value
    """

    Arguments: type | None = None
    prefixes: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset()
    uses: frozenset[str] = frozenset()

    @classmethod
    def from_arguments(cls, arguments: Any = None, *, network: Any = None, reference: Any = None) -> Metric:
        """A metric for one pass: its flags, the feature network and the reference, as far as it reads them."""
        return cls()

    @abstractmethod
    def update(self, batch: Mapping[str, Any], index: Sequence[int]) -> None:
        """Takes in the images of a batch, which have these places in their set."""

    @abstractmethod
    def merge(self, other: Any) -> None:
        """As if this one had seen what `other`, of the same class, saw."""

    @abstractmethod
    def compute(self) -> dict[str, Figure]:
        """Name -> figure; none where the data do not allow them."""

    def details(self) -> dict[str, Any]:
        """What is measured beside numbers, such as a spectrum."""
        return {}

    def protocol(self) -> dict[str, Any]:
        """What must be equal where its figures are compared; keys of its own are called METRIC.KEY."""
        return {}


class PerImageMetric(Metric):
    """Keeps what `rows` gives of every image, and computes from all of it in the order of the set.

    So neither the order in which images come nor the number of processes changes a bit. Unless `compute` is
    overridden, each row (B,) becomes a figure: its mean over images, with its standard error.
    """

    unit: str = ""
    better: Better = None

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, dict[str, Tensor]]] = []

    @abstractmethod
    def rows(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Name -> (B, ...) of the images of a batch; floats are kept as float32."""

    def update(self, batch: Mapping[str, Any], index: Sequence[int]) -> None:
        rows = {name: _kept(values) for name, values in self.rows(batch).items()}
        self._kept.append((torch.tensor(list(index)), rows))

    def merge(self, other: Any) -> None:
        self._kept = self._kept + other._kept

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": self._kept}

    def joined(self) -> dict[str, Tensor]:
        """Name -> (N, ...) of all images, in the order of the set."""
        if not self._kept:
            raise ValueError(f"{type(self).__name__} needs at least one image to be measured on; got none.")
        order = torch.cat([places for places, _ in self._kept]).argsort()
        rows = {name: torch.cat([rows[name] for _, rows in self._kept]) for name in self._kept[0][1]}
        return rows if bool((order.diff() == 1).all()) else {name: values[order] for name, values in rows.items()}

    def compute(self) -> dict[str, Figure]:
        rows = self.joined()
        return {name: Figure.mean(values, unit=self.unit, better=self.better) for name, values in rows.items()}


def _kept(values: Tensor) -> Tensor:
    """On the CPU, floats in float32; the very object where it is that, so that metrics share what one batch gave."""
    values = (values.detach() if values.requires_grad else values).cpu()
    return values.float() if values.is_floating_point() else values


def build_metrics(
    names: Iterable[str],
    arguments: Mapping[str, Any] | None = None,
    *,
    offers: frozenset[str],
    network: Any = None,
    reference: Any = None,
) -> list[Metric]:
    """The metrics of these names, each once.

    Args:
        arguments: name -> instance of the metric's `Arguments`; without one its defaults hold.
        offers: what the batches of the pass hold; a metric that needs more is refused by name.
        network, reference: as `Metric.from_arguments` takes them.

    Example:
        >>> metrics = build_metrics(["psnr", "ssim"], offers=frozenset({"images", "reconstructions"}))
    """
    built = []
    for name in dict.fromkeys(names):
        member = METRICS[name]
        if missing := sorted(member.needs - offers):
            raise ValueError(
                f"The metric {name!r} needs {' and '.join(missing)}; what is measured here gives "
                f"{', '.join(sorted(offers))}."
            )
        given = (arguments or {}).get(name)
        if given is None and member.Arguments is not None:
            given = member.Arguments()
        built.append(member.from_arguments(given, network=network, reference=reference))
    return built


def build_groups(
    names: Iterable[str],
    arguments: Mapping[str, Any] | None = None,
    *,
    offers: frozenset[str],
    networks: Iterable[Any],
) -> tuple[list[Metric], list[list[Metric]]]:
    """Metrics that read no features, and the others once for each feature network; all of them take one pass.

    Example:
        >>> shared, groups = build_groups(["psnr", "rfid"], offers=OFFERS, networks=[inception, dinov2])
        >>> [len(shared), len(groups)]
        [1, 2]
    """
    reads = {name: bool(METRICS[name].needs & {"features", "reconstructed_features"}) for name in names}
    own, others = ([name for name in reads if reads[name] is asked] for asked in (True, False))
    groups = [build_metrics(own, arguments, offers=offers, network=each) for each in list(networks) or [None]]
    return build_metrics(others, arguments, offers=offers), groups


class Measurement:
    """Metrics that have seen their images: `figures`, `details` and `protocol` of all of them, computed when read."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self.metrics = metrics

    @cached_property
    def figures(self) -> dict[str, Figure]:
        """Name -> figure; one that is not to be trusted is warned about."""
        found: dict[str, Figure] = {}
        for metric in self.metrics:
            for name, figure in metric.compute().items():
                if name in found:
                    raise ValueError(f"Two of the metrics compute {name!r}; leave one of them out.")
                if figure.caveat and math.isfinite(figure.value):
                    logger.warning("%s = %.4g is not comparable: %s.", name, figure.value, figure.caveat)
                found[name] = figure
        return found

    def __or__(self, other: Measurement) -> Measurement:
        """Both, without computing again what either has computed."""
        joined = Measurement([*self.metrics, *other.metrics])
        if shared := sorted(self.figures.keys() & other.figures.keys()):
            raise ValueError(f"Two of the metrics compute {shared[0]!r}; leave one of them out.")
        joined.figures = self.figures | other.figures
        return joined

    @property
    def details(self) -> dict[str, Any]:
        return {key: value for metric in self.metrics for key, value in metric.details().items()}

    @property
    def protocol(self) -> dict[str, Any]:
        return {key: value for metric in self.metrics for key, value in metric.protocol().items()}

    def values(self) -> dict[str, float]:
        """Name -> value, NaN where it is undefined."""
        return {name: figure.value for name, figure in self.figures.items()}

    def card_parts(self) -> dict[str, dict[str, Any]]:
        """`metrics`, `errors`, `caveats`, `better` of a `ResultCard`; what is undefined is a caveat, and no number."""
        finite = {name: figure for name, figure in self.figures.items() if math.isfinite(figure.value)}
        undefined = {
            name: figure.caveat or f"{figure.value} for these images"
            for name, figure in self.figures.items()
            if name not in finite
        }
        return {
            "metrics": {name: figure.value for name, figure in finite.items()},
            "errors": {name: figure.error for name, figure in finite.items() if figure.error is not None},
            "caveats": {name: figure.caveat for name, figure in finite.items() if figure.caveat} | undefined,
            "better": {name: figure.better for name, figure in finite.items() if figure.better is not None},
        }


def measure(
    metrics: Sequence[Metric], batches: Iterable[tuple[Sequence[int], Mapping[str, Any]]], processes: Any = None
) -> Measurement:
    """One pass: every metric sees every batch, and afterwards what the other processes saw.

    Args:
        batches: (places in the set, batch), of this process.
        processes: accelerate's `PartialState` or `Accelerator` where several share the set; all must call this.

    Example:
        >>> batches = [(range(2), {"images": pixels, "reconstructions": reconstructions})]
        >>> measure([METRICS["psnr"]()], batches).figures["psnr"].value
    """
    with torch.no_grad():
        for index, batch in batches:
            for metric in metrics:
                metric.update(batch, index)
    for rank, theirs in enumerate(gather(list(metrics), processes)):
        if processes is not None and rank != processes.process_index:
            for metric, other in zip(metrics, theirs, strict=True):
                metric.merge(other)
    return Measurement(metrics)


def gather(value: Any, processes: Any) -> list[Any]:
    """The values of all processes, in the order of their ranks."""
    if processes is None or processes.num_processes == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])
