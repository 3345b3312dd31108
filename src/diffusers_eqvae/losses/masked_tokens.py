"""What a masked-token model minimises: cross-entropy at the masked positions (MaskGIT, arXiv 2202.04200, eq. 1)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import full_precision, require_equal_shapes

EXPECTED_SHARE = 2 / math.pi  # the mean of arccos(r) * 2 / pi over r in [0, 1]


def mask_probability(uniform: Tensor) -> Tensor:
    """arccos(r) * 2 / pi for r uniform in [0, 1]: 1 at r = 0, 0 at r = 1, and 2 / pi on average."""
    return torch.arccos(uniform) * (2 / math.pi)


def masked_token_loss(logits: Tensor, tokens: Tensor, masked: Tensor, *, label_smoothing: float = 0.1) -> Tensor:
    """Cross-entropy of the masked tokens per sample, (B,), over the expected number of them, h * w * 2 / pi.

    With smoothing s the target is 1 - s on the token and s spread evenly over all K, the token included.

    Args:
        logits: (B, K, h, w).
        tokens: (B, h, w) int64, the right ones.
        masked: (B, h, w) bool, which of them the model did not see.
        label_smoothing: s in [0, 1).

    Raises:
        ValueError: on unequal shapes.

    Differs from the reference: MaskGIT divides by the number of masked tokens in the batch at hand. That number
    differs between ranks, and two of them would not be one with twice the batch; its expectation does not. The PyTorch
    port compares the tokens that are not masked too.
    """
    require_equal_shapes(tokens, masked, ("The tokens", "their mask"))
    require_equal_shapes(logits[:, 0], tokens, ("The logits of one token", "the tokens"))
    errors = F.cross_entropy(full_precision(logits), tokens, reduction="none", label_smoothing=label_smoothing)
    return (errors * masked).flatten(1).sum(1) / (tokens[0].numel() * EXPECTED_SHARE)
