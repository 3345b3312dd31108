from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from ...autoencoders import decode
from ...images import UINT8_RULE, to_uint8
from ...options import Checked
from ..base import Figure, register_metric
from ..generation import FeatureMetric, network_protocol, paired_frechet
from ..interpolation import draw_neighbours, slerp

SEED = 0  # of the neighbours
BLOCK = 16  # latents decoded at once, whatever the batches were


@register_metric("ifid")
class IFID(FeatureMetric):
    """`ifid`: Fréchet distance to the images of what is decoded half way from each latent to a similar one.

    The neighbour is drawn among the 10 latents of other images that are most similar by cosine, by softmax of minus
    the mean squared difference; half way is on the arc (`slerp`). At 0 of the way it is `rfid`. After the code of
    "Making rFID Predictive of Diffusion gFID" (its paper was not read). Latents are the posterior means, as they are.

    Differs from the reference: neighbours are other images of the measured set, not of a training set, and so farther
    away; images become uint8 by the rule of all others here.

    Of another network than FID's Inception it is called `ifd_NAME`. It decodes each image once more, in the first
    process, and compares all pairs of latents: N^2 times their length, so it is measured where it is asked for.
    """

    needs = frozenset({"posteriors", "autoencoder", "features"})
    what = "images"

    @dataclass
    class Arguments(Checked):
        """Which latents iFID decodes."""

        ifid_share: float = field(
            default=0.5, metadata={"help": "How far to go to the neighbour; 0 is rFID.", "range": "[0, 1]"}
        )
        ifid_neighbours: int = field(
            default=10, metadata={"help": "Similar latents that one is drawn from.", "range": "(0, inf)"}
        )

    def __init__(self, network, *, share: float = 0.5, neighbours: int = 10) -> None:
        super().__init__(network)
        self.share, self.neighbours = share, neighbours
        self.autoencoder = None

    @classmethod
    def from_arguments(cls, arguments=None, *, network=None, reference=None):
        metric = super().from_arguments(network=network)
        metric.share, metric.neighbours = arguments.ifid_share, arguments.ifid_neighbours
        return metric

    @property
    def name(self):
        return f"i{self.network.metric_name('fid')}"

    def update(self, batch, index):
        self.autoencoder = batch["autoencoder"]
        super().update(batch, index)

    def rows(self, batch):
        return super().rows(batch) | {"raw_latents": batch["posteriors"].mode()}

    @torch.no_grad()
    def compute(self):
        rows, name = self.joined(), self.name
        latents, device = rows["raw_latents"], next(self.autoencoder.parameters()).device
        if len(latents) <= self.neighbours:
            reason = f"undefined: {self.neighbours} similar latents need more images than {len(latents)}"
            return {name: Figure(math.nan, n=len(latents), caveat=reason)}
        drawn = draw_neighbours(latents.flatten(1), self.neighbours, seed=SEED)
        between = slerp(latents, latents[drawn], self.share)
        decoded = (decode(self.autoencoder, part.to(device)) for part in between.split(BLOCK))
        features = torch.cat([self.network(to_uint8(images))["features"].cpu() for images in decoded])
        return {name: paired_frechet(features, rows["features"], caveat=self.repeated(rows))}

    def protocol(self):
        stated = {"share": self.share, "neighbours": self.neighbours, "seed": SEED}
        stated = {f"{self.name}.{key}": value for key, value in stated.items()}
        return {**network_protocol(self.network), "uint8_rule": UINT8_RULE, **stated}
