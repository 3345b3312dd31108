"""How many directions a cloud of points really has (EQ-VAE, table of ablations: smaller is easier to generate)."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

KEPT_SHARE = 0.9
MIN_POINTS = 10
BLOCK_POINTS = 1024


def intrinsic_dimension(points: Tensor) -> float:
    """TwoNN (Facco et al. 2017): the dimension d of the manifold that `points` (N, D) lie on.

    With r1, r2 the distances from a point to its two nearest others and F the empirical distribution of mu = r2 / r1,

        -log(1 - F(mu)) = d log(mu),   fitted through the origin on the lower 90 % of mu (eqs. 5 to 8).

    The estimate scatters by about d / sqrt(N) and, for large d, falls short of the truth unless N is large: say N and
    what a point is beside the number. For EQ-VAE's figures a point is the flattened latent of one picture.

    Computed in float64 in blocks of rows; memory grows with N, not with N^2. Equal points, which have no r2 / r1,
    count once, and a warning says how many there were.

    Raises:
        ValueError: other than two axes, values that are not finite, or fewer than 10 different points.
    """
    dimension = intrinsic_dimension_if_defined(points)
    if dimension is None:
        raise ValueError(
            f"An intrinsic dimension needs at least {MIN_POINTS} different points; there are fewer among these "
            f"{len(points)}. Measure on more pictures."
        )
    return dimension


def intrinsic_dimension_if_defined(points: Tensor) -> float | None:
    """`intrinsic_dimension`, or None for fewer than 10 different points, as those of an encoder that has collapsed."""
    if points.ndim != 2 or not torch.isfinite(points).all():
        raise ValueError(
            f"Points must be finite and of shape (N, D); got {tuple(points.shape)}. Flatten latents first."
        )
    distinct = torch.unique(points.detach().double(), dim=0)
    if len(distinct) < len(points):
        logger.warning("%d of %d points equal another one and count once.", len(points) - len(distinct), len(points))
    if len(distinct) < MIN_POINTS:
        return None
    log_ratios = _log_ratios(distinct).sort().values
    kept = int(KEPT_SHARE * len(log_ratios))
    rank = torch.arange(1, kept + 1, dtype=torch.float64, device=distinct.device)
    survival = -torch.log1p(-rank / len(log_ratios))
    x = log_ratios[:kept]
    return float((x @ survival) / (x @ x))


def _log_ratios(points: Tensor) -> Tensor:
    """log(r2 / r1) of every point, (N,)."""
    centred = points - points.mean(0)
    squares = centred.square().sum(1)
    ratios = []
    for start in range(0, len(points), BLOCK_POINTS):
        rows = centred[start : start + BLOCK_POINTS]
        distances = squares[start : start + len(rows), None] + squares - 2 * rows @ centred.T
        own = torch.arange(len(rows), device=points.device)
        distances[own, own + start] = torch.inf
        # The expansion finds the neighbours; it cancels for close ones, so their distances are taken again.
        neighbours = distances.topk(2, largest=False).indices
        exact = torch.stack([(rows - centred[column]).norm(dim=1) for column in neighbours.T], dim=1).sort(1).values
        ratios.append(torch.log(exact[:, 1] / exact[:, 0]))
    return torch.cat(ratios)
