"""Where a token lies in its grid: fixed 2-D embeddings, and rotations of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_PERIOD = 10_000.0


def sincos_position_embedding(rows: int, columns: int, hidden_size: int) -> Tensor:
    """Fixed 2-D positions (1, rows * columns, hidden_size) in float32, row-major over the grid.

    The first half of the channels encodes the column, the second half the row; each half is [sin | cos] of
    position * 10000^(-i / (hidden_size / 4)), i = 0 .. hidden_size / 4 - 1 (MAE, arXiv:2111.06377).
    """
    # On the CPU in float64 whatever the default device: the table is made once, and some devices have no float64.
    index = torch.arange(hidden_size // 4, dtype=torch.float64, device="cpu")
    frequencies = MAX_PERIOD ** (-index / (hidden_size // 4))

    def encode(length: int) -> Tensor:
        angles = torch.arange(length, dtype=torch.float64, device="cpu")[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    by_column = encode(columns)[None].expand(rows, -1, -1)
    by_row = encode(rows)[:, None].expand(-1, columns, -1)
    table = torch.cat([by_column, by_row], dim=-1).reshape(1, rows * columns, hidden_size)
    return table.to(dtype=torch.float32).to(torch.empty(()).device)


def rotary_angles(rows: int, columns: int, head_dim: int) -> Tensor:
    """Angles (rows * columns, head_dim) of 2-D rotary positions, float32, row-major (RoFormer, 2104.09864; EVA-02).

    The first half of a head turns with the row, the second with the column; in each half channels 2i and 2i + 1 are
    one plane, turned by position * 10000^(-2i / (head_dim / 2)).
    """
    half = head_dim // 2
    index = torch.arange(0, half, 2, dtype=torch.float64, device="cpu")
    frequencies = (MAX_PERIOD ** (-index / half)).repeat_interleave(2)
    by_row = (torch.arange(rows, device="cpu")[:, None] * frequencies)[:, None].expand(-1, columns, -1)
    by_column = (torch.arange(columns, device="cpu")[:, None] * frequencies)[None].expand(rows, -1, -1)
    angles = torch.cat([by_row, by_column], dim=-1).flatten(0, 1)
    return angles.to(dtype=torch.float32).to(torch.empty(()).device)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turns the planes of queries or keys (B, N, heads, head_dim) by `rotary`, cosines and sines (2, N, head_dim)."""
    cos, sin = rotary[:, :, None].unbind(0)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return x * cos + turned * sin
