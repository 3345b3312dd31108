from __future__ import annotations

from ...images import UINT8_RULE
from ..base import register_metric
from ..generation import FeatureMetric, network_protocol, paired_frechet


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
            figures[f"r{self.network.metric_name(name)}"] = paired_frechet(
                rows[f"reconstructed_{output}"], rows[output], caveat=self.repeated(rows)
            )
        return figures

    def protocol(self):
        return {**network_protocol(self.network), "uint8_rule": UINT8_RULE}
