from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from ...losses.perceptual import LPIPS
from ...options import Checked
from ...provenance import weights_hash
from ..base import PerImageMetric, register_metric


@register_metric("lpips")
class PerceptualDistance(PerImageMetric):
    """`lpips`: perceptual distance of reconstructions (Zhang et al., arXiv 1801.03924), the mean over images.

    Args:
        network: `LPIPS`, or whatever maps (reconstructions, images) to (B,).
    """

    needs = frozenset({"images", "reconstructions"})
    better = "lower"

    @dataclass
    class Arguments(Checked):
        """Network and weights of LPIPS."""

        lpips_net: Literal["vgg", "alex", "squeeze"] = field(default="vgg", metadata={"help": "LPIPS network."})
        lpips_backbone_weights: str | None = field(
            default=None,
            metadata={"reads": True, "help": "Its ImageNet weights; LPIPS is measured if these are given."},
        )
        lpips_linear_weights: str | None = field(
            default=None, metadata={"reads": True, "help": "Its linear heads, v0.1."}
        )

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @classmethod
    def from_arguments(cls, arguments=None, *, network=None, reference=None):
        files = {"backbone_weights": arguments.lpips_backbone_weights}
        files["linear_weights"] = arguments.lpips_linear_weights
        return cls(LPIPS.from_pretrained(arguments.lpips_net, **files))

    def rows(self, batch):
        return {"lpips": self.network.to(batch["images"].device)(batch["reconstructions"], batch["images"])}

    def protocol(self):
        name = getattr(self.network, "net", type(self.network).__name__)
        return {"lpips_net": name, "lpips_weights_hash": weights_hash(self.network)}
