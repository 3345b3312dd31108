"""How hard latents are to generate: what no linear predictor explains of the velocity, and the shape of latents.

The velocity irreducible variance is the property that goes best with generation quality over 86 tokenizers, and
equivariance the least of seven (arXiv 2606.03578); each is one property and no verdict.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

HIGH_SHARE = 0.5  # rho of `spectral_energy`: own choice, the middle of all frequencies
FAR_CELLS = 6  # Manhattan distance from where on two cells are far apart
NEIGHBOURS = 10  # K of `nearest_class_share`: own choice
MAX_CELLS = 10_000  # cells that it compares, evenly spaced over all
_ITERATIONS, _TOLERANCE = 30, 1e-5
_BLOCK = 1024


def channel_normalized(latents: Tensor) -> Tensor:
    """(N, C, h, w) in float64 with mean 0 and variance 1 per channel over N, h and w; a constant channel is 0."""
    values = latents.detach().double()
    values = values - values.mean((0, 2, 3), keepdim=True)
    std = values.square().mean((0, 2, 3), keepdim=True).sqrt()
    return torch.where(std > 0, values / std.clamp_min(torch.finfo(values.dtype).tiny), 0.0)


@dataclass(frozen=True)
class KroneckerCovariance:
    """Covariance channel (x) spatial of latents (C, h, w), flattened to (C, P) with P = h w.

    Attributes:
        spatial: eigenvalues (P,) and vectors (P, P), by columns.
        channel: eigenvalues (C,), of mean 1, and vectors (C, C).
    """

    spatial: tuple[Tensor, Tensor]
    channel: tuple[Tensor, Tensor]

    @property
    def variances(self) -> Tensor:
        """Eigenvalues of the whole, (C, P)."""
        return self.channel[0][:, None] * self.spatial[0]

    def coordinates(self, rows: Tensor) -> Tensor:
        """Of centred rows (N, C, P) along the eigenvectors."""
        return self.channel[1].T @ (rows @ self.spatial[1])


def kronecker_covariance(rows: Tensor, *, means: int = 1) -> KroneckerCovariance | None:
    """The maximum-likelihood covariance of Kronecker form of centred rows (N, C, P), by flip-flop.

        spatial <- sum_n Z_n^T channel^-1 Z_n / ((N - m) C),   channel <- sum_n Z_n spatial^-1 Z_n^T / ((N - m) P)

    in turn until they stay (Dutilleul 1999, The MLE algorithm for the matrix normal distribution), in float64.
    Differs from the reference: divided by N - m, where m = `means` were taken out of the rows, and not by N.

    Returns:
        None where there is none: (N - m) C <= P or (N - m) P <= C, or directions without variance.
    """
    count, channels, positions = rows.shape
    degrees = count - means
    if degrees * channels <= positions or degrees * positions <= channels:
        return None
    first, second = torch.tril_indices(channels, channels)
    # Of each pair of channels, (P, P), symmetric: all that the steps read of the rows.
    scatters = torch.stack([rows[:, c].T @ rows[:, d] for c, d in zip(first.tolist(), second.tolist(), strict=True)])
    scatters = (scatters + scatters.mT).flatten(1) / 2
    twice = torch.where(first == second, 1.0, 2.0).to(rows)
    channel = torch.einsum("ncp,ndp->cd", rows, rows)
    for _ in range(_ITERATIONS):
        before = channel = channel * (channels / channel.trace())
        if (inverse := _inverse(channel)) is None:
            return None
        spatial = (inverse[first, second] * twice @ scatters).view(positions, positions) / (degrees * channels)
        if (inverse := _inverse(spatial)) is None:
            return None
        channel = torch.empty_like(channel)
        channel[first, second] = channel[second, first] = scatters @ inverse.flatten() / (degrees * positions)
        if (channel - before).norm() <= _TOLERANCE * before.norm():
            break
    scale = channel.trace() / channels
    values, vectors = torch.linalg.eigh(spatial)
    channel_values, channel_vectors = torch.linalg.eigh(channel / scale)
    return KroneckerCovariance((values * scale, vectors), (channel_values, channel_vectors))


def _inverse(matrix: Tensor) -> Tensor | None:
    """Of a symmetric positive definite matrix, or None where it is numerically singular."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal().square()
    smallest = len(matrix) * torch.finfo(matrix.dtype).eps * pivots.max()
    return None if failed or pivots.min() <= smallest else torch.cholesky_inverse(factor)


def velocity_residual(variances: Tensor, sigmas: Tensor | None = None) -> Tensor:
    """E |v - v*|^2 along directions of these variances, of the best affine predictor v* of the velocity.

    On the linear path x = (1 - s) z + s e, with latents z of mean m and variance L along a direction and noise e of
    variance 1, the velocity is v = e - z. The best affine predictor of v from x leaves

        Var v - Cov(v, x)^2 / Var x = 1 + L - (s - (1 - s) L)^2 / ((1 - s)^2 L + s^2) = L / ((1 - s)^2 L + s^2),

    whatever the distribution of z. With t = s / (1 - s), dt = ds / (1 - s)^2, its mean over s uniform in (0, 1) is

        integral_0^inf L / (L + t^2) dt = (pi / 2) sqrt(L).

    For Gaussian latents no predictor does better. Of others this is an upper bound of what the best one leaves.

    Args:
        variances: L, of any shape.
        sigmas: noise levels to average over; None is the uniform distribution, in closed form.

    Example:
        >>> velocity_residual(torch.tensor([1.0]))
        tensor([1.5708])
    """
    if sigmas is None:
        return math.pi / 2 * variances.clamp_min(0).sqrt()
    total = torch.zeros_like(variances)
    for sigma in sigmas.to(variances).split(1):
        total += variances / ((1 - sigma) ** 2 * variances + sigma**2)
    return total / len(sigmas)


@dataclass(frozen=True)
class Estimate:
    """A value, its standard error (None: unknown), what it rests on, and why it is undefined or marked."""

    value: float
    error: float | None = None
    n: int = 0
    caveat: str | None = None


def velocity_irreducible_variance(latents: Tensor, groups: Tensor, *, what: str = "classes") -> Estimate:
    """VIV (arXiv 2606.03578): the mean over groups k of (pi / 2) sum_i sqrt(lambda_ki), in the units of the latents.

    lambda_k are the eigenvalues of the covariance of group k, estimated in Kronecker form (`kronecker_covariance`).
    It is what `velocity_residual` leaves of the flow-matching loss, summed over dimensions, where the latents of a
    group are Gaussian with such a covariance; d latents of white noise have (pi / 2) d. Give channel-normalised ones.

    The error is the linearised one over latents. With a and b the square roots of the two factors, means a', b' of
    their eigenvalues and W a whitened latent, one latent moves the sum by half of
    b' tr(W a W^T) + a' tr(W^T b W) - a' b' |W|^2, the derivative of the sum along Kronecker covariances.
    From N latents of P positions and C channels the value falls short by up to about P / (8 N C) of itself, which is
    a caveat above 5 %.

    Args:
        latents: (N, C, h, w).
        groups: (N,) integers; groups that are too small for a covariance are left out, and a caveat.
        what: how the groups are called in a caveat.

    Example:
        >>> velocity_irreducible_variance(channel_normalized(raw_latents), labels).value
    """
    rows = latents.double().flatten(2)
    sums, squared_errors, counts, singular = [], [], [], 0
    for group in groups.unique():
        own = rows[groups == group]
        own = own - own.mean(0)
        fitted = kronecker_covariance(own)
        if fitted is None:
            singular += 1
            continue
        roots = fitted.variances.sqrt()
        shares = fitted.coordinates(own).square() / fitted.variances
        spatial, channel = fitted.spatial[0].sqrt(), fitted.channel[0].sqrt()
        moved = spatial * channel.mean() + spatial.mean() * channel[:, None] - spatial.mean() * channel.mean()
        influence = math.pi / 4 * (shares * moved).sum((1, 2))
        sums.append(math.pi / 2 * roots.sum().item())
        squared_errors.append(influence.var().item() / len(own))
        counts.append(len(own))
    channels, positions = rows.shape[1:]
    left_out = _left_out(singular, len(groups.unique()), positions, channels, what)
    if not sums:
        return Estimate(math.nan, None, 0, left_out)
    few = positions / (8 * (min(counts) - 1) * channels)
    short = f"low by up to about {few:.0%}, from {min(counts)} latents in the smallest of the {what}"
    caveat = "; ".join(filter(None, [left_out, short if few > 0.05 else None])) or None
    error = math.sqrt(math.fsum(squared_errors)) / len(sums)
    return Estimate(math.fsum(sums) / len(sums), error, sum(counts), caveat)


def _left_out(singular: int, count: int, positions: int, channels: int, what: str) -> str | None:
    if not singular:
        return None
    needed = max(positions // channels, channels // positions) + 2
    return (
        f"{'undefined: ' if singular == count else ''}{singular} of {count} {what} left out, which have fewer than "
        f"{needed} latents or directions without variance"
    )


def linear_predictor_loss(latents: Tensor, labels: Tensor | None = None, *, sigmas: Tensor | None = None) -> Estimate:
    """Flow-matching loss per dimension of a linear predictor of the velocity, an upper bound of the best network's.

    The predictor knows the noise level and the mean of each class, and treats the directions of one Kronecker
    covariance (within classes, all together) apart. With g_i the variance of the latents along direction i its loss
    is the mean of `velocity_residual`(g_i), whether or not the covariance is of that form; by Schur's theorem
    sum sqrt(g_i) >= sum sqrt(lambda_i), so it is never below the best linear predictor's, and equals it where the
    form holds. A network that learns goes below it.

    From N latents of P positions and C channels it falls short by up to about P / (8 N C) of itself.

    Args:
        latents: (N, C, h, w), as a model is trained on them.
        labels: (N,) class ids; without them there is one mean.
        sigmas: as `velocity_residual` takes them.

    Example:
        >>> linear_predictor_loss(torch.randn(4096, 4, 8, 8)).value  # white noise: pi / 2
        1.57
    """
    rows, means = _within(latents.double().flatten(2), labels)
    fitted = kronecker_covariance(rows, means=means)
    if fitted is None:
        channels, positions = rows.shape[1:]
        needed = max(positions // channels, channels // positions) + 1 + means
        reason = f"undefined: fewer than {needed} latents, or directions without variance"
        return Estimate(math.nan, None, len(rows), reason)
    squares = fitted.coordinates(rows).square()
    variances = squares.sum(0) / (len(rows) - means)
    residual = velocity_residual(variances, sigmas)
    influence = (squares * (residual / variances / 2)).mean((1, 2)) if sigmas is None else None
    error = None if influence is None else (influence.std() / math.sqrt(len(rows))).item()
    return Estimate(residual.mean().item(), error, len(rows))


def _within(rows: Tensor, labels: Tensor | None) -> tuple[Tensor, int]:
    """Rows around the mean of their class, and the number of classes."""
    if labels is None:
        return rows - rows.mean(0), 1
    _, index, counts = labels.unique(return_inverse=True, return_counts=True)
    sums = rows.new_zeros(len(counts), *rows.shape[1:]).index_add_(0, index, rows)
    return rows - (sums / counts[:, None, None])[index], len(counts)


def spectral_energy(latents: Tensor, *, share: float = HIGH_SHARE) -> Tensor:
    """SEC (arXiv 2606.03578): share of DCT energy at u + v > share * (h + w - 2), all channels together: (B,).

    The orthonormal DCT-II of every channel of (B, C, h, w), which are to be channel-normalised; the constant (0, 0)
    counts. White noise has the share of such (u, v) among all; smooth latents have close to 0. The paper's rho is not
    known here: `share` is our own choice.
    """
    height, width = latents.shape[-2:]
    rows, columns = (_dct(side).to(latents) for side in (height, width))
    energy = (rows @ latents @ columns.T).square().sum(1)
    places = torch.arange(height)[:, None] + torch.arange(width)
    high = energy * (places > share * (height + width - 2)).to(energy)
    return high.sum((1, 2)) / energy.sum((1, 2)).clamp_min(torch.finfo(energy.dtype).tiny)


@lru_cache(maxsize=8)
def _dct(side: int) -> Tensor:
    """The orthonormal DCT-II, (side, side) float64, a row for each frequency."""
    frequency, place = torch.arange(side, dtype=torch.float64)[:, None], torch.arange(side, dtype=torch.float64)
    matrix = torch.cos(math.pi / side * (place + 0.5) * frequency) * math.sqrt(2 / side)
    matrix[0] /= math.sqrt(2)
    return matrix


def local_similarity(latents: Tensor, *, far: int = FAR_CELLS) -> Tensor:
    """LDS (arXiv 2606.03578): mean cosine of 4-neighbours less that of cells at Manhattan distance >= `far`: (B,).

    Cells are the vectors (C,) of channel-normalised latents (B, C, h, w). White noise has 0; latents in which an
    image's parts stay together have more. NaN where no two cells are so far apart.
    """
    height, width = latents.shape[-2:]
    cells = F.normalize(latents, dim=1)
    near, near_pairs = _pairs(cells, [(0, 1), (1, 0)])
    offsets = [(y, x) for y in range(far) for x in range(-far, far) if abs(x) + y < far and (y > 0 or x > 0)]
    closer, closer_pairs = _pairs(cells, offsets)
    total = (cells.sum((2, 3)).square().sum(1) - cells.square().sum((1, 2, 3))) / 2
    far_pairs = height * width * (height * width - 1) // 2 - closer_pairs
    if not near_pairs or not far_pairs:
        return torch.full((len(latents),), math.nan, dtype=cells.dtype)
    return near / near_pairs - (total - closer) / far_pairs


def _pairs(cells: Tensor, offsets: Iterable[tuple[int, int]]) -> tuple[Tensor, int]:
    """Sum of the products of all pairs of cells that lie apart by one of the offsets (y >= 0, x), and their number."""
    height, width = cells.shape[-2:]
    total, count = cells.new_zeros(len(cells)), 0
    for y, x in offsets:
        if y >= height or abs(x) >= width:
            continue
        first = cells[..., : height - y, max(0, -x) : width - max(0, x)]
        second = cells[..., y:, max(0, x) : width + min(0, x)]
        total = total + (first * second).sum((1, 2, 3))
        count += first.shape[-2:].numel()
    return total, count


def region_similarity(latents: Tensor, regions: Tensor, *, background: int = 0) -> Tensor:
    """SRSS: mean cosine of two cells of the foreground less that of one of it with one of the background: (B,).

    After arXiv 2606.03578 and 2512.10794, whose texts leave the weights open: all pairs count alike here. NaN where
    an image has fewer than two cells of the foreground or none of the background.

    Args:
        latents: (B, C, h, w), channel-normalised.
        regions: (B, h, w) integers; `background` and whatever else is foreground; negative cells do not count.
    """
    cells = F.normalize(latents, dim=1)
    front = ((regions >= 0) & (regions != background)).to(cells)
    back = (regions == background).to(cells)
    front_sum, back_sum = ((cells * each[:, None]).sum((2, 3)) for each in (front, back))
    fronts, backs = front.sum((1, 2)), back.sum((1, 2))
    own = (cells.square().sum(1) * front).sum((1, 2))
    within = (front_sum.square().sum(1) - own) / (fronts * (fronts - 1))
    across = (front_sum * back_sum).sum(1) / (fronts * backs)
    return torch.where((fronts > 1) & (backs > 0), within - across, math.nan)


def nearest_class_share(
    cells: Tensor, classes: Tensor, images: Tensor, *, neighbours: int = NEIGHBOURS, max_cells: int = MAX_CELLS
) -> Tensor:
    """LNC (arXiv 2606.03578): share of the K nearest cells of other images that have a cell's class, by image.

    The mean over the cells of each image that is compared, in the order of their numbers. With unrelated cells it is
    the chance that two cells share a class. Distances are Euclidean, in float64.

    Args:
        cells: (M, C) of channel-normalised latents; where there are more than `max_cells`, so many evenly spaced
            ones are compared.
        classes, images: (M,) integers: the class of each cell, and the image it is of.

    Raises:
        ValueError: some image leaves fewer than K cells of others.
    """
    if len(cells) > max_cells:
        kept = torch.linspace(0, len(cells) - 1, max_cells, dtype=torch.float64).round().long()
        cells, classes, images = cells[kept], classes[kept], images[kept]
    largest = int(images.unique(return_counts=True)[1].max())
    if len(cells) - largest < neighbours:
        raise ValueError(
            f"The {neighbours} nearest cells of other images need so many; {len(cells) - largest} are left beside "
            "the largest image. Measure on more images."
        )
    cells = cells.double()
    shares = []
    for start in range(0, len(cells), _BLOCK):
        block = slice(start, start + _BLOCK)
        distances = torch.cdist(cells[block], cells)
        distances[images[block, None] == images] = torch.inf
        nearest = distances.topk(neighbours, largest=False).indices
        shares.append((classes[nearest] == classes[block, None]).double().mean(1))
    _, index, counts = images.unique(return_inverse=True, return_counts=True)
    return torch.zeros(len(counts), dtype=torch.float64).index_add_(0, index, torch.cat(shares)) / counts
