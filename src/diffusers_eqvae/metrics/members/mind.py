from __future__ import annotations

import torch
import torch.nn.functional as F

from ..base import Figure, register_metric
from ..distances import monge_distance, sorted_projections
from ..errors import GROUPS, jackknife_error
from ..generation import SampleMetric

SEED = 0  # of the directions, and of what is left out of the larger set
DIRECTIONS = 1000  # own choice


@register_metric("mind")
class MIND(SampleMetric):
    """`mind`: Monge Inception distance (`monge_distance`) along 1000 directions, where the reference has features.

    The larger set is cut to the size of the smaller one, by chance from a fixed seed. The error is a delete-d
    jackknife over both sets, left out together. Of another network than FID's Inception it is called `mind_NAME`.
    """

    def compute(self):
        rows = self.joined()
        reference = self.single_features(rows["features"])
        if reference is None:
            return {}
        count = min(len(rows["features"]), len(reference))
        generator = torch.Generator().manual_seed(SEED)
        dimension = reference.shape[1]
        directions = F.normalize(torch.randn(DIRECTIONS, dimension, generator=generator, dtype=torch.float64), dim=1)
        pair = [
            sorted_projections(each[_kept(len(each), count, generator)], directions)
            for each in (rows["features"], reference)
        ]
        without = [
            [values[places % GROUPS != left_out].view(DIRECTIONS, -1) for values, places in pair]
            for left_out in range(GROUPS if count >= 2 * GROUPS else 0)
        ]
        figure = Figure(
            monge_distance(*(values for values, _ in pair), dimension),
            jackknife_error([monge_distance(*each, dimension) for each in without]),
            count,
            better="lower",
            caveat=self.repeated(rows),
        )
        return {self.network.metric_name("mind"): figure}

    def protocol(self):
        return {**super().protocol(), "mind.directions": DIRECTIONS, "mind.seed": SEED}


def _kept(count, size, generator):
    return torch.randperm(count, generator=generator)[:size].sort().values if count > size else torch.arange(count)
