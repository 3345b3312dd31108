from __future__ import annotations

from ..base import Figure, register_metric
from ..distances import precision_recall
from ..errors import share_error
from ..generation import NEIGHBOURS, SampleMetric


@register_metric("precision_recall")
class PrecisionRecall(SampleMetric):
    """`precision` and `recall` (Kynkäänniemi et al. 2019) with k = 3, where the reference has features.

    Each is a share of images; its error is that of the share, with the manifold of the other set held fixed.
    """

    def compute(self):
        rows = self.joined()
        reference = self.single_features(rows["features"])
        if reference is None:
            return {}
        values = precision_recall(rows["features"], reference, neighbours=NEIGHBOURS)
        counts = len(rows["features"]), len(reference)
        return {
            self.network.metric_name(name): Figure(
                value, share_error(value, count), len(rows["features"]), better="higher", caveat=self.repeated(rows)
            )
            for name, value, count in zip(("precision", "recall"), values, counts, strict=True)
        }
