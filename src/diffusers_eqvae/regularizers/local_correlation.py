"""Neighbouring cells of the latents must resemble each other (SSVAE, arXiv 2512.05394)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn

from ..autoencoders import latent_channels
from ..losses._checks import full_precision
from ..options import Checked
from ._ranks import mean_over_ranks
from .base import AutoencoderRegularizer, AutoencoderState, register_regularizer

WINDOW = 2


@dataclass
class LocalCorrelationArguments(Checked):
    """How alike neighbours must be, and how much that counts."""

    local_correlation_weight: float = field(
        default=0.02, metadata={"help": "Weight of the missing correlation.", "range": "[0, inf)"}
    )
    local_correlation_threshold: float = field(
        default=0.75, metadata={"help": "Mean correlation from which on nothing is missing.", "range": "[-1, 1]"}
    )


@register_regularizer("local_correlation")
class LocalCorrelationRegularizer(AutoencoderRegularizer):
    """relu(t - c), c the mean correlation of two cells of one 2x2 window (LCR of SSVAE, arXiv 2512.05394).

        z = (mean - mean_k(mean)) / (std_k(mean) + 1e-6)                 of each channel k over all images and cells
        v = (z - mean over channels), divided by its norm                of each cell
        c = mean of v_i . v_j                                            over pairs, windows and images

    of the posterior means. Mean and std of the channels have no gradient. A last odd row or column is left out. The
    gradient reaches the encoder alone. It costs no time; neighbours that are alike hold less, so sharpness.

    It couples all samples of a step: the statistics and c are those of all ranks. Accumulated micro-batches have their
    own each, so with accumulation a step is not that of one larger batch.

    Args:
        weight: .02 in SSVAE.
        threshold: t.

    Example:
        >>> objective = AutoencoderObjective(vae, {"local_correlation": LocalCorrelationRegularizer()})
    """

    Arguments = LocalCorrelationArguments
    paper = ("SSVAE", "2512.05394")
    reaches = frozenset({"encoder"})
    couples_samples = True
    mean_over_elements = True

    def __init__(self, weight: float = 0.02, *, threshold: float = 0.75) -> None:
        super().__init__()
        self.weight, self.threshold = weight, threshold

    @classmethod
    def from_arguments(cls, arguments: LocalCorrelationArguments, model: nn.Module) -> Self:
        if latent_channels(model) < 2:
            raise ValueError(
                "local_correlation compares cells by their channels, and this autoencoder has one; leave it out."
            )
        return cls(arguments.local_correlation_weight, threshold=arguments.local_correlation_threshold)

    def penalty(self, state: AutoencoderState, batch: Mapping[str, Tensor], draw: Any) -> Tensor | None:
        if min(state.posterior.mean.shape[-2:]) < WINDOW:
            return None
        correlation = local_correlation(_standardized(full_precision(state.posterior.mean)))
        # On every rank with the sign that the mean over ranks decides: then the ranks' mean is relu(t - c).
        return (self.threshold - correlation) * (mean_over_ranks(correlation) < self.threshold)


def local_correlation(latents: Tensor) -> Tensor:
    """Mean Pearson correlation, over channels, of two cells of one 2x2 window of latents (B, C, h, w): a scalar."""
    height, width = (side // WINDOW * WINDOW for side in latents.shape[-2:])
    windows = F.unfold(latents[..., :height, :width].reshape(-1, 1, height, width), WINDOW, stride=WINDOW)
    cells = windows.unflatten(0, latents.shape[:2])  # (B, C, cells of a window, windows)
    cells = cells - cells.mean(1, keepdim=True)
    cells = cells / (cells.norm(dim=1, keepdim=True) + 1e-8)
    count = cells.shape[2]
    # The sum over pairs i != j is |sum v|^2 - sum |v|^2.
    pairs = cells.sum(2).square().sum(1) - cells.square().sum((1, 2))
    return (pairs / (count * (count - 1))).mean()


def _standardized(latents: Tensor) -> Tensor:
    """Every channel at mean 0 and std 1 over the images and cells of all ranks, which have equally many."""
    mean = mean_over_ranks(latents.mean((0, 2, 3))).view(1, -1, 1, 1)
    std = mean_over_ranks((latents - mean).square().mean((0, 2, 3))).sqrt().view(1, -1, 1, 1)
    return (latents - mean) / (std + 1e-6)
