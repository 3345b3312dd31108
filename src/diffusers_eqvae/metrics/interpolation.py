"""Between latents: the most similar ones of a set, and the arc from one to another."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..randomness import torch_generator

_BLOCK = 1024  # rows whose similarities are held at once: 80 MB for 10 000 latents
_STREAM = 1  # apart from the noise of posteriors, which is of the same seed and place


def most_similar(rows: Tensor, count: int, *, block_size: int = _BLOCK) -> Tensor:
    """Places (N, count) of the rows (N, D) most similar to each by cosine, itself left out, the nearest first.

    In float64, in memory O(block_size * (N + D)) beside the rows; needs N^2 D multiplications.
    """
    if not 0 < count < len(rows):
        raise ValueError(f"{count} other rows need at least {count + 1}; got {len(rows)}.")
    found = []
    for first in range(0, len(rows), block_size):
        own = F.normalize(rows[first : first + block_size].double(), dim=1)
        others = rows.split(block_size)
        similar = torch.cat([own @ F.normalize(each.double(), dim=1).T for each in others], dim=1)
        places = torch.arange(len(own))
        similar[places, places + first] = -torch.inf
        found.append(similar.topk(count, dim=1).indices)
    return torch.cat(found)


def draw_neighbours(rows: Tensor, count: int, *, seed: int) -> Tensor:
    """For each row (N, D) the place (N,) of one of its `count` most similar ones, drawn by softmax(-mean square).

    The mean is of (row - neighbour)^2. A draw depends on the seed, the place and the rows alone.
    """
    drawn = []
    for place, neighbours in enumerate(most_similar(rows, count)):
        squares = (rows[neighbours].double() - rows[place].double()).square().mean(1)
        generator = torch_generator(seed, place, _STREAM)
        drawn.append(neighbours[torch.multinomial((-squares).softmax(0), 1, generator=generator)])
    return torch.cat(drawn)


def slerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    """The point at `share` of the arc from each `first` (N, ...) to its `second`, both as vectors:

        (sin((1 - t) a) first + sin(t a) second) / sin a,

    a the angle between them (Shoemake 1985), which also leads from one length to the other. Of parallel vectors, where
    sin a is 0, it is the straight line's.
    """
    rows, others = first.flatten(1).double(), second.flatten(1).double()
    angles = F.cosine_similarity(rows, others).clamp(-1, 1).acos()[:, None]
    straight = angles.sin() < 1e-6
    divisor = torch.where(straight, 1.0, angles.sin())
    own = torch.where(straight, 1 - share, ((1 - share) * angles).sin() / divisor)
    other = torch.where(straight, share, (share * angles).sin() / divisor)
    return (own * rows + other * others).view_as(first).to(first)
