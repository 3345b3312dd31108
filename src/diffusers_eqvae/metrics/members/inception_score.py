from __future__ import annotations

from ..base import Figure, register_metric
from ..distances import inception_score
from ..generation import SPLIT_SIZE, FeatureMetric


@register_metric("inception_score")
class InceptionScore(FeatureMetric):
    """`inception_score` and its deviation over splits of 5000 images in order, where the network has logits."""

    outputs = ("logits",)

    def compute(self):
        rows = self.joined()
        if "logits" not in rows:
            return {}
        score, deviation = inception_score(rows["logits"], split_size=SPLIT_SIZE)
        name, shared = self.network.metric_name, {"n": len(rows["logits"]), "caveat": self.repeated(rows)}
        return {
            name("inception_score"): Figure(score, better="higher", **shared),
            name("inception_score_std"): Figure(deviation, **shared),
        }
