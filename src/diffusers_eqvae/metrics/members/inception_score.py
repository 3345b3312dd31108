from __future__ import annotations

from ..base import Figure, register_metric
from ..distances import inception_score
from ..errors import jackknife_error, kept_without_each
from ..generation import SPLIT_SIZE, FeatureMetric


@register_metric("inception_score")
class InceptionScore(FeatureMetric):
    """`inception_score` and its deviation over splits of 5000 images in order, where the network has logits."""

    needs = frozenset({"features", "samples"})
    outputs = ("logits",)

    def compute(self):
        rows = self.joined()
        if "logits" not in rows:
            return {}
        score, deviation = inception_score(rows["logits"], split_size=SPLIT_SIZE)
        error = jackknife_error(
            [
                inception_score(rows["logits"][kept], split_size=SPLIT_SIZE)[0]
                for kept in kept_without_each(len(rows["logits"]))
            ]
        )
        name, shared = self.network.metric_name, {"n": len(rows["logits"]), "caveat": self.repeated(rows)}
        return {
            name("inception_score"): Figure(score, error, better="higher", **shared),
            name("inception_score_std"): Figure(deviation, **shared),
        }
