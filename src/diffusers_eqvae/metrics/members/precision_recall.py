from __future__ import annotations

from ..base import Figure, register_metric
from ..distances import precision_recall
from ..generation import NEIGHBOURS, SampleMetric


@register_metric("precision_recall")
class PrecisionRecall(SampleMetric):
    """`precision` and `recall` (Kynkäänniemi et al. 2019) with k = 3, where the reference has features."""

    def compute(self):
        rows, reference = self.joined(), self.reference.features
        if reference is None or min(len(rows["features"]), len(reference)) <= NEIGHBOURS:
            return {}
        values = precision_recall(rows["features"], reference, neighbours=NEIGHBOURS)
        return {
            self.network.metric_name(name): Figure(
                value, n=len(rows["features"]), better="higher", caveat=self.repeated(rows)
            )
            for name, value in zip(("precision", "recall"), values, strict=True)
        }
