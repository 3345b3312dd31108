from __future__ import annotations

import math
from dataclasses import dataclass, field

from ...options import Checked
from ..base import Figure, PerImageMetric, register_metric
from ..latent_statistics import MIN_POINTS, intrinsic_dimension_if_defined


@register_metric("intrinsic_dimension")
class IntrinsicDimension(PerImageMetric):
    """`intrinsic_dimension` of the flattened latents (TwoNN, Facco et al. 2017); undefined below 10 different ones.

    Args:
        max_points: only the first so many latents count, since the cost grows with their square.
    """

    needs = frozenset({"posteriors"})

    @dataclass
    class Arguments(Checked):
        """How many latents the intrinsic dimension is taken of."""

        intrinsic_dimension_max_points: int = field(
            default=10_000,
            metadata={
                "help": "Latents that it is taken of, the first ones; it costs their square.",
                "range": "(0, inf)",
            },
        )

    def __init__(self, max_points: int = 10_000) -> None:
        super().__init__()
        self.max_points = max_points

    @classmethod
    def from_arguments(cls, arguments=None, *, network=None, reference=None):
        return cls(arguments.intrinsic_dimension_max_points)

    def rows(self, batch):
        return {"raw_latents": batch["posteriors"].mode()}

    def _points(self):
        return self.joined()["raw_latents"][: self.max_points].flatten(1)

    def compute(self):
        points = self._points()
        dimension = intrinsic_dimension_if_defined(points)
        caveat = f"undefined for fewer than {MIN_POINTS} different latents" if dimension is None else None
        value = math.nan if dimension is None else dimension
        error = None if dimension is None else dimension / math.sqrt(len(points))  # of a maximum-likelihood fit
        return {"intrinsic_dimension": Figure(value, error, len(points), better="lower", caveat=caveat)}

    def details(self):
        return {"intrinsic_dimension_points": len(self._points())}

    def protocol(self):
        return self.details()
