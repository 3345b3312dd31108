from __future__ import annotations

from ...images import UINT8_RULE
from ..base import Figure, register_metric
from ..distances import frechet_distance
from ..errors import jackknife_error, without_each
from ..generation import FeatureMetric, feature_statistics, join_caveats, network_protocol, too_few


@register_metric("rfid")
class RFID(FeatureMetric):
    """`rfid` and, where the network has spatial features, `rsfid`: Fréchet distances of reconstructions to images.

    Both sets are the same N images, cropped once. Of another network than FID's Inception they are called `rfd_NAME`
    and `rsfd_NAME`; caveats are those of `fid`.
    """

    needs = frozenset({"features", "reconstructed_features"})
    outputs = ("features", "spatial")
    what = "images"

    def rows(self, batch):
        theirs = batch["reconstructed_features"][self.network.name]
        reconstructed = {f"reconstructed_{name}": theirs[name] for name in self.outputs if name in theirs}
        return super().rows(batch) | reconstructed

    def compute(self):
        rows, figures = self.joined(), {}
        for name, output in {"fid": "features", "sfid": "spatial"}.items():
            if output not in rows:
                continue
            images, own = feature_statistics(rows[output]), feature_statistics(rows[f"reconstructed_{output}"])
            caveat = too_few(own.dimension, {"samples": own.count, "reference images": images.count})
            figures[f"r{self.network.metric_name(name)}"] = Figure(
                frechet_distance(own.mean, own.covariance, images.mean, images.covariance),
                jackknife_error(
                    [
                        frechet_distance(theirs.mean, theirs.covariance, its.mean, its.covariance)
                        for theirs, its in zip(
                            without_each(rows[f"reconstructed_{output}"]), without_each(rows[output]), strict=True
                        )
                    ]
                ),
                own.count,
                better="lower",
                caveat=join_caveats(caveat, self.repeated(rows)),
            )
        return figures

    def protocol(self):
        return {**network_protocol(self.network), "uint8_rule": UINT8_RULE}
