"""Contrastive flow matching (arXiv 2506.05350): a prediction must also be far from another sample's target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor, nn

from ..losses.diffusion import flow_matching_loss
from ..options import Checked
from .base import GeneratorRegularizer, GeneratorState, register_regularizer


@dataclass
class ContrastiveFlowArguments(Checked):
    """How much the other sample counts.

    Example:
        >>> ContrastiveFlowRegularizer(weight=ContrastiveFlowArguments().contrastive_flow_weight)
    """

    contrastive_flow_weight: float = field(
        default=0.05, metadata={"help": "Weight of the distance to the partner's target.", "range": "[0, 1)"}
    )


@register_regularizer("contrastive_flow")
class ContrastiveFlowRegularizer(GeneratorRegularizer):
    """-mean |prediction_i - target_j|^2 with j = i xor 1: samples 2k and 2k + 1 push each other's predictions away.

    The partner's target is the finished one, of its own noise and noise level, as the authors' code takes it. Its
    place in the global batch decides who the partner is, so two ranks equal one with twice the batch; the micro-batch
    must be even.

    Differs from the reference: there the partner is any other sample at random.

    Args:
        weight: .05 in the paper; from 1 on the loss has no lower bound.
    """

    Arguments = ContrastiveFlowArguments
    predictions_of = ("latents",)

    def __init__(self, weight: float = 0.05) -> None:
        super().__init__()
        self.weight = weight

    @classmethod
    def from_arguments(cls, arguments: ContrastiveFlowArguments, model: nn.Module) -> Self:
        return cls(arguments.contrastive_flow_weight)

    def penalty(self, state: GeneratorState, batch: Mapping[str, Tensor], draw: Any) -> Tensor:
        if len(state.target) % 2:
            raise ValueError(
                f"Contrastive flow matching pairs samples, so its micro-batch must be even; got {len(state.target)}."
            )
        partners = state.target.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        return -flow_matching_loss(state.prediction, partners).mean()
