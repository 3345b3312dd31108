"""Masked tokens (MaskGIT, arXiv 2202.04200): the cross-entropy of tokens that the model does not see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..losses.masked_tokens import mask_probability, masked_token_loss
from ..models.backbone import Backbone
from ..options import Checked
from ..randomness import StepRandomness
from ..regularizers.base import GeneratorRegularizer, GeneratorState
from ..schedulers.scheduling_maskgit import MaskGITScheduler
from .base import GeneratorObjective, register_objective


@dataclass
class MaskedTokensArguments(Checked):
    """The target of masked tokens.

    Example:
        >>> MaskedTokensObjective(model, arguments=MaskedTokensArguments(mask_label_smoothing=0.0))
    """

    mask_label_smoothing: float = field(
        default=0.1, metadata={"help": "Share of the target that is spread evenly over all tokens.", "range": "[0, 1)"}
    )


@register_objective("masked_tokens")
class MaskedTokensObjective(GeneratorObjective):
    """-log p(token | tokens that are not masked, class) of the masked ones.

    A token is masked with probability arccos(r) * 2 / pi, r uniform, which is drawn once per sample; a share
    `class_dropout_prob` of samples (the model's config) has no class.

    Args:
        model: a backbone that predicts "logits" and has a `mask_token`.
        regularizers: by name, applied in this order.
        arguments: of the target; None takes the defaults.
    """

    Arguments = MaskedTokensArguments
    prefixes = ("mask_",)
    reads = "tokens"
    own_terms = ("masked",)
    prediction_types = ("logits",)
    pipeline = "MaskGITPipeline"

    def __init__(
        self,
        model: Backbone | nn.Module,
        regularizers: Mapping[str, GeneratorRegularizer] | None = None,
        *,
        arguments: MaskedTokensArguments | None = None,
    ) -> None:
        super().__init__(model, regularizers)
        self.arguments = arguments or MaskedTokensArguments()

    def draw(self, batch: Mapping[str, Tensor], randomness: StepRandomness) -> dict[str, Any]:
        """Its "masked" (B, h, w) bool, "shares" (B,) the probability of a mask, "drop_labels" (B,), "regularizers"."""
        tokens = batch["tokens"]
        size, device = len(tokens), tokens.device
        shares = mask_probability(randomness.rand((size,), device=device))
        masked = randomness.rand(tokens.shape, device=device) < shares[:, None, None]
        drop_labels = randomness.rand((size,), device=device) < self.model.config.class_dropout_prob
        regularizers = self.draw_regularizers(tuple(tokens.shape), randomness)
        return {"masked": masked, "shares": shares, "drop_labels": drop_labels, "regularizers": regularizers}

    def forward(self, batch: Mapping[str, Tensor], draw: Mapping[str, Any]) -> dict[str, Any]:
        """
        Args:
            batch: "tokens" (B, h, w) int64, "class_labels" (B,), and the features a regularizer reads.
            draw: from `draw`.
        """
        tokens, masked = batch["tokens"], draw["masked"]
        model: Any = self.model
        visible = tokens.masked_fill(masked, model.mask_token)
        active = self.active(draw)
        output = self.call(active, visible, None, batch["class_labels"], drop_labels=draw["drop_labels"])
        loss = masked_token_loss(
            output.sample, tokens, masked, label_smoothing=self.arguments.mask_label_smoothing
        ).mean()
        state = GeneratorState(
            output.sample, tokens, visible, tokens, masked, draw["shares"], output.hidden_states or {}
        )
        return self.regularized({"masked": loss}, active, state=state, batch=batch)

    def scheduler(self) -> MaskGITScheduler:
        """MaskGIT's iterative decoding."""
        return MaskGITScheduler()
