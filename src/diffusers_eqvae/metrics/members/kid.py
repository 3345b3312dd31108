from __future__ import annotations

import torch

from ..base import Figure, register_metric
from ..distances import kernel_distance
from ..generation import NEIGHBOURS, SampleMetric

SEED = 0  # of the subsets


@register_metric("kid")
class KID(SampleMetric):
    """`kid` (Bińkowski et al., arXiv 1801.01401) and `kid_std` over subsets, where the reference has features.

    There is no `kid_std` where every subset is both whole sets. Of another network than FID's Inception they are
    called `kd_NAME` and `kd_std_NAME`.
    """

    def compute(self):
        rows, reference = self.joined(), self.reference.features
        if reference is None or min(len(rows["features"]), len(reference)) <= NEIGHBOURS:
            return {}
        generator = torch.Generator().manual_seed(SEED)
        kid, spread = kernel_distance(rows["features"], reference, generator=generator)
        name, shared = self.network.metric_name, {"n": len(rows["features"]), "caveat": self.repeated(rows)}
        figures = {name("kid"): Figure(kid, better="lower", **shared)}
        return figures | ({} if spread is None else {name("kid_std"): Figure(spread, **shared)})
