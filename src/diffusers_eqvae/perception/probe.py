"""A linear probe: how much of a class can be read off pooled features by a hyperplane."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import Standardization


@dataclass(frozen=True)
class LinearProbe:
    """Ridge regression onto one-hot classes, in closed form: deterministic, without a learning rate.

        W = (X^T X + ridge N I)^-1 X^T Y,  scores = x W + y

    with X the standardised features of the N examples, Y their one-hot classes and y the classes' frequencies: the
    offset bears no penalty, and X is centred, so that it can be solved for apart. Computed in float64.

    Args:
        standardization: of the training features.
        weight: (D, K).
        bias: (K,).
    """

    standardization: Standardization
    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(cls, features: Tensor, labels: Tensor, *, ridge: float = 1e-3) -> Self:
        """From features (N, D) and class ids (N,) of any integer type.

        Raises:
            ValueError: unequal lengths, ids that are negative or no integers, or a ridge that is not positive.
        """
        integers = not labels.is_floating_point() and not labels.is_complex()
        if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels) or not integers:
            raise ValueError(
                "A probe needs features (N, D) and as many class ids, integers from 0 on; got "
                f"{tuple(features.shape)} and {labels.dtype} {tuple(labels.shape)}."
            )
        if int(labels.min()) < 0:
            raise ValueError(f"Class ids start at 0; got {int(labels.min())}. Leave out examples without a class.")
        if ridge <= 0:
            raise ValueError(f"The ridge must be positive, or the solution may not be unique; got {ridge}.")
        rows = features.double()
        standardization = Standardization.of(rows)
        x, y = standardization(rows), F.one_hot(labels.to(rows.device, torch.int64)).double()
        gram = x.T @ x + ridge * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        return cls(standardization, torch.linalg.solve(gram, x.T @ y), y.mean(0))

    def __call__(self, features: Tensor) -> Tensor:
        """Scores (M, K) float64 of features (M, D); the highest is the class."""
        return self.standardization(features.double()) @ self.weight + self.bias

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Share of (M, D) whose highest score is their label (M,)."""
        return float((self(features).argmax(1) == labels).double().mean())
