"""The direction of the predicted velocity (FasterDiT, arXiv 2410.10356; LightningDiT): 1 - cosine per position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn

from ..losses._checks import full_precision
from ..options import Checked
from .base import GeneratorRegularizer, GeneratorState, register_regularizer


@dataclass
class VelocityDirectionArguments(Checked):
    """How much the direction counts.

    Example:
        >>> VelocityDirectionRegularizer(weight=VelocityDirectionArguments().velocity_direction_weight)
    """

    velocity_direction_weight: float = field(
        default=1.0, metadata={"help": "Weight of 1 - cos(prediction, target).", "range": "[0, inf)"}
    )


@register_regularizer("velocity_direction")
class VelocityDirectionRegularizer(GeneratorRegularizer):
    """mean of 1 - cos(prediction, target) over the channels of every position, beside the mean square.

    Args:
        weight: factor of the penalty; 1 in LightningDiT.
    """

    Arguments = VelocityDirectionArguments
    predictions_of = ("latents",)

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    @classmethod
    def from_arguments(cls, arguments: VelocityDirectionArguments, model: nn.Module) -> Self:
        return cls(arguments.velocity_direction_weight)

    def penalty(self, state: GeneratorState, batch: Mapping[str, Tensor], draw: Any) -> Tensor:
        return (1 - F.cosine_similarity(full_precision(state.prediction), full_precision(state.target), dim=1)).mean()
