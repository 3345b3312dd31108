from __future__ import annotations

from ..base import PerImageMetric, register_metric
from ..reconstruction import psnr


@register_metric("psnr")
class PSNR(PerImageMetric):
    """`psnr`: peak signal-to-noise ratio of reconstructions, the mean over images of 10 log10(4 / MSE) in dB."""

    needs = frozenset({"images", "reconstructions"})
    unit, better = "dB", "higher"

    def rows(self, batch):
        return {"psnr": psnr(batch["reconstructions"], batch["images"])}
