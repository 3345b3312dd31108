from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from ...clusters import cluster_positions
from ...options import Checked
from ...perception.transfer import IGNORE_INDEX, position_labels
from ..base import Figure, PerImageMetric, register_metric
from ..diffusability import (
    FAR_CELLS,
    HIGH_SHARE,
    MAX_CELLS,
    NEIGHBOURS,
    channel_normalized,
    linear_predictor_loss,
    local_similarity,
    nearest_class_share,
    region_similarity,
    spectral_energy,
    velocity_irreducible_variance,
)
from ..image_sets import hash_digests, image_digests

CLUSTERS = 10  # own choice


@register_metric("diffusability")
class Diffusability(PerImageMetric):
    """How hard the latents are to generate: `viv`, `viv_per_dimension`, `linear_loss`, `sec`, `lds`, `lnc` and `srss`.

    See `metrics.diffusability` for each. VIV is the mean over classes, where the images have labels, else over
    clusters (k-means of whole latents), which its protocol says; LNC needs labels, SRSS masks, in which 0
    is the background and 255 nothing. The latents are the posterior mean,
    normalised per channel. VIV is compared between latents of one shape only; per dimension it may be between others.

    Args:
        max_latents: only the first so many count.
    """

    needs = frozenset({"posteriors"})
    uses = frozenset({"labels", "masks"})

    @dataclass
    class Arguments(Checked):
        """How many latents diffusability is measured on."""

        diffusability_max_latents: int = field(
            default=10_000,
            metadata={"help": "Latents that diffusability is measured on, the first ones.", "range": "(0, inf)"},
        )

    def __init__(self, max_latents: int = 10_000) -> None:
        super().__init__()
        self.max_latents = max_latents

    @classmethod
    def from_arguments(cls, arguments=None, *, network=None, reference=None):
        return cls(arguments.diffusability_max_latents)

    def rows(self, batch):
        labels = {"labels": batch["labels"]} if "labels" in batch else {}
        latents = batch["posteriors"].mode()
        return {"raw_latents": latents, **labels, **_regions(batch.get("masks"), latents)}

    def _rows(self):
        return {name: values[: self.max_latents] for name, values in self.joined().items()}

    def compute(self):
        rows = self._rows()
        return diffusability_figures(rows["raw_latents"], rows.get("labels"), rows.get("regions"))

    def protocol(self):
        rows = self._rows()
        latents, labels = rows["raw_latents"], rows.get("labels")
        groups = f"{_clusters(latents)} k-means clusters" if labels is None else f"{len(labels.unique())} classes"
        known = {"lnc.neighbours": NEIGHBOURS, "lnc.cells": min(MAX_CELLS, latents[:, 0].numel())}
        return {
            "viv.latents": len(latents),
            "viv.groups": groups,
            "linear_loss.latents": len(latents),
            "sec.above": HIGH_SHARE,
            "lds.far": FAR_CELLS,
            **({} if labels is None else known),
            **({"srss.masks_hash": _hash(rows["regions"])} if "regions" in rows else {}),
        }


def diffusability_figures(
    raw_latents: torch.Tensor, labels: torch.Tensor | None = None, regions: torch.Tensor | None = None
) -> dict[str, Figure]:
    """What `Diffusability` computes of raw latents (N, C, h, w), class ids (N,) and regions (N, h, w).

    Example:
        >>> diffusability_figures(raw_latents, labels)["viv_per_dimension"].value
    """
    latents = channel_normalized(raw_latents)
    groups, what = labels, "classes"
    if groups is None:
        what = "clusters"
        groups = cluster_positions(latents.flatten(1)[:, :, None, None], _clusters(latents)).flatten()
    viv, linear = velocity_irreducible_variance(latents, groups, what=what), linear_predictor_loss(latents, labels)
    dimensions, single = latents[0].numel(), latents.float()
    parts = single.split(64)
    near = Figure.mean(torch.cat([local_similarity(each) for each in parts]), better="higher")
    figures = {
        "viv": Figure(viv.value, viv.error, viv.n, better="lower", caveat=viv.caveat),
        "viv_per_dimension": Figure(
            viv.value / dimensions,
            None if viv.error is None else viv.error / dimensions,
            viv.n,
            better="lower",
            caveat=viv.caveat,
        ),
        "linear_loss": Figure(linear.value, linear.error, linear.n, caveat=linear.caveat),
        "sec": Figure.mean(torch.cat([spectral_energy(each) for each in parts]), better="lower"),
        "lds": near,
    }
    if labels is not None:
        figures["lnc"] = _nearest_classes(latents, labels)
    if regions is not None:
        figures["srss"] = _regions_apart(region_similarity(single, regions))
    return figures


def _regions(masks: torch.Tensor | None, latents: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of masks (B, S, S) the most frequent label of each cell; -1 where that is `IGNORE_INDEX`."""
    if masks is None:
        return {}
    labels = position_labels(masks, (latents.shape[-2], latents.shape[-1]))
    return {"regions": labels.masked_fill(labels == IGNORE_INDEX, -1)}


def _hash(regions: torch.Tensor) -> str:
    return hash_digests(image_digests(regions.numpy()))


def _regions_apart(values: torch.Tensor) -> Figure:
    """The mean over the images that have both a foreground and a background."""
    both = values[values.isfinite()]
    if not len(both):
        reason = "undefined: no mask has two cells of the foreground and one of the background, which is 0"
        return Figure(torch.nan, n=0, caveat=reason)
    missing = len(values) - len(both)
    caveat = f"{missing} of {len(values)} images left out, whose masks lack foreground or background"
    return replace(Figure.mean(both, better="higher"), caveat=caveat if missing else None)


def _nearest_classes(latents: torch.Tensor, labels: torch.Tensor) -> Figure:
    positions = latents[0, 0].numel()
    cells = latents.movedim(1, -1).flatten(0, 2)
    images = torch.arange(len(latents)).repeat_interleave(positions)
    if len(cells) - positions < NEIGHBOURS:
        return Figure(torch.nan, n=len(latents), caveat=f"undefined for fewer than {NEIGHBOURS} cells of other images")
    return Figure.mean(nearest_class_share(cells, labels[images], images), better="higher")


def _clusters(latents: torch.Tensor) -> int:
    """As many as leave each enough latents for a covariance, twice over on average; at most `CLUSTERS`."""
    channels, positions = latents.shape[1], latents[0, 0].numel()
    needed = max(positions // channels, channels // positions) + 2
    return max(1, min(CLUSTERS, len(latents) // (2 * needed)))
