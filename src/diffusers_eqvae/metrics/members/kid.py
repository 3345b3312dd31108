from __future__ import annotations

import torch

from ..base import Figure, register_metric
from ..distances import kernel_distance
from ..errors import disjoint_error
from ..generation import SampleMetric

SEED = 0  # of the subsets
SUBSET_SIZE = 1000


@register_metric("kid")
class KID(SampleMetric):
    """`kid` (Bińkowski et al., arXiv 1801.01401) and `kid_std` over subsets, where the reference has features.

    The error is of both sets, from disjoint parts of them. There is no `kid_std` where every subset is both whole
    sets. Of another network than FID's Inception they are called `kd_NAME` and `kd_std_NAME`.
    """

    def compute(self):
        rows = self.joined()
        reference = self.single_features(rows["features"])
        if reference is None:
            return {}
        generator = torch.Generator().manual_seed(SEED)
        kid, spread = kernel_distance(rows["features"], reference, generator=generator)
        count = min(len(rows["features"]), len(reference))
        error = disjoint_error(
            lambda part: kernel_distance(rows["features"][part], reference[part], generator=generator)[0],
            count,
            most=SUBSET_SIZE,
        )
        name, shared = self.network.metric_name, {"n": len(rows["features"]), "caveat": self.repeated(rows)}
        figures = {name("kid"): Figure(kid, error, better="lower", **shared)}
        return figures | ({} if spread is None else {name("kid_std"): Figure(spread, **shared)})
