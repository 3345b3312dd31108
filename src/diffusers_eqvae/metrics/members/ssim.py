from __future__ import annotations

from ..base import PerImageMetric, register_metric
from ..reconstruction import ssim


@register_metric("ssim")
class SSIM(PerImageMetric):
    """`ssim`: structural similarity of reconstructions (Wang et al. 2004, eq. 13), the mean over images."""

    needs = frozenset({"images", "reconstructions"})
    better = "higher"

    def rows(self, batch):
        return {"ssim": ssim(batch["reconstructions"], batch["images"])}
