"""Labels and depths of a few annotated images, carried over to others by the nearest latent positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..clusters import Standardization, to_rows

IGNORE_INDEX = 255
# Temperature of the votes: Wu et al. 2018 (arXiv 1805.01978), as in DINO's nearest-neighbour classifier.
TEMPERATURE = 0.07
# Similarities, or targets of neighbours, held at once: 2^24 float32 are 64 MiB.
_CHUNK = 2**24


def position_labels(masks: Tensor, grid: tuple[int, int], *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """The most frequent label of each latent position: masks (B, H, W) of integers -> (B, h, w) int64.

    Void counts as a label, so a position that is mostly void is void; where labels are equally frequent the lowest
    wins, and void never does.

    Args:
        masks: classes from 0 on, and `ignore_index` where there is none.
        grid: (h, w); H and W must be multiples.

    Example:
        >>> position_labels(torch.tensor([[[1, 1, 2, 2], [1, 0, 2, 255]]]), (1, 2))
        tensor([[[1, 2]]])
    """
    size = _position_size(masks, grid)
    known = sorted(label for label in masks.unique().tolist() if label != ignore_index)
    labels = torch.full((len(masks), *grid), ignore_index, dtype=torch.int64, device=masks.device)
    most = torch.zeros(labels.shape, device=masks.device)
    for label in [*known, ignore_index]:
        share = F.avg_pool2d((masks == label).float(), size)
        labels[share > most] = label
        most = torch.maximum(most, share)
    return labels


def label_targets(labels: Tensor, num_classes: int, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Labels (B, h, w) as one-hot targets (B, K, h, w) float32, NaN where the label is `ignore_index`.

    Example:
        >>> label_targets(torch.tensor([[[1, 255]]]), 2)[0, :, 0]
        tensor([[0., nan],
                [1., nan]])
    """
    labels = labels.long()
    void = labels == ignore_index
    valid = labels[~void]
    if len(valid) and not 0 <= int(valid.min()) <= int(valid.max()) < num_classes:
        raise ValueError(
            f"Labels must be 0..{num_classes - 1} or the ignored {ignore_index}; got {int(valid.min())}.."
            f"{int(valid.max())}. Say which label is void, or how many classes there are."
        )
    targets = F.one_hot(labels.masked_fill(void, 0), num_classes).movedim(-1, 1).float()
    return targets.masked_fill(void[:, None], torch.nan)


def position_values(values: Tensor, valid: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean of the valid pixels of each latent position: (B, H, W) and its mask -> (B, 1, h, w), NaN without any.

    Example:
        >>> depths = position_values(metres, metres > 0, (32, 32))
    """
    size = _position_size(values, grid)
    total = F.avg_pool2d(values.float().masked_fill(~valid, 0.0)[:, None], size)
    return total / F.avg_pool2d(valid.float()[:, None], size)  # 0 / 0 is the NaN


def _position_size(maps: Tensor, grid: tuple[int, int]) -> tuple[int, int]:
    height, width = maps.shape[-2:]
    if height % grid[0] or width % grid[1]:  # pooling would leave out the rest in silence
        raise ValueError(
            f"{grid[0]}x{grid[1]} latent positions do not tile annotations of {height}x{width} px. Crop them as the "
            "images, to a multiple of the autoencoder's stride."
        )
    return height // grid[0], width // grid[1]


class NearestTransfer:
    """Targets of annotated latent positions, averaged over each new position's nearest neighbours by cosine.

        t(q) = sum_i w_i t_i / sum_i w_i,  w_i = exp(cos(q, f_i) / 0.07),  i in the k nearest

    One-hot targets give class shares (segmentation), metres give depth. Features are standardised per channel by the
    annotated positions first: the angle between latents means nothing unless their mean is the origin.

    Args:
        features: of the annotated images, (B, D, h, w).
        targets: (B, K, h, w), NaN where unknown; such positions are left out.
        neighbours: k; fewer where fewer positions are annotated.

    Example:
        >>> transfer = NearestTransfer(annotated.patch, label_targets(labels, 11))
        >>> classes = to_size(transfer(new.patch), (256, 256)).argmax(1)
    """

    def __init__(self, features: Tensor, targets: Tensor, *, neighbours: int = 5) -> None:
        if features[:, 0].shape != targets[:, 0].shape:
            raise ValueError(
                "Features (B, D, h, w) and targets (B, K, h, w) must have the same images and latent positions; got "
                f"{tuple(features.shape)} and {tuple(targets.shape)}."
            )
        if neighbours < 1:
            raise ValueError(f"At least one neighbour is needed; got {neighbours}.")
        rows, values = to_rows(features.float()), to_rows(targets.float())
        known = ~values.isnan().any(1)
        if not known.any():
            raise ValueError("Nothing is annotated: all targets are void. Check the masks and the ignored label.")
        self.standardization = Standardization.of(rows[known])
        self.bank = F.normalize(self.standardization(rows[known]), dim=1)
        self.values = values[known]
        self.neighbours = min(neighbours, len(self.values))

    def __call__(self, features: Tensor) -> Tensor:
        """Targets (B, K, h, w) of the positions of features (B, D, h, w)."""
        queries = F.normalize(self.standardization(to_rows(features.float())), dim=1)
        widest = max(len(self.bank), self.neighbours * self.values.shape[1])
        chunks = [self._average(chunk) for chunk in queries.split(max(1, _CHUNK // widest))]
        return torch.cat(chunks).view(len(features), *features.shape[-2:], -1).movedim(-1, 1)

    def _average(self, queries: Tensor) -> Tensor:
        similarity, nearest = (queries @ self.bank.T).topk(self.neighbours, dim=1)
        weight = (similarity / TEMPERATURE).softmax(1)
        return torch.einsum("nk,nkc->nc", weight, self.values[nearest])


def target_means(targets: Tensor, *, per_position: bool = False) -> Tensor:
    """What can be said without looking at an image: the mean of targets (B, K, h, w), of all positions or of each.

    Shares of one-hot targets (their argmax is the mode), means of values. Positions that are void in every image get
    the mean of all: (K, h, w).

    Example:
        >>> target_means(label_targets(labels, 11)).argmax(0)  # the most frequent class, everywhere
    """
    overall = targets.nanmean((0, 2, 3))[:, None, None].expand(targets.shape[1:])
    if not per_position:
        return overall
    mean = targets.nanmean(0)
    return torch.where(mean.isnan(), overall, mean)
