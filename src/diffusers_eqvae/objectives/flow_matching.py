"""Flow matching (SiT, arXiv 2401.08740): the velocity from noise to data, or what it can be made of."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from ..flow import (
    FLOW_PREDICTIONS,
    FlowPath,
    LossWeighting,
    SigmaDistribution,
    default_shift,
    interpolate,
    loss_weight,
    prediction_target,
    sample_sigmas,
    shift_sigma,
    sigma_interval,
)
from ..losses.diffusion import flow_matching_loss
from ..models.backbone import Backbone
from ..options import Checked
from ..regularizers.base import GeneratorRegularizer, GeneratorState
from ..schedulers.scheduling_flow_match_ode import FlowMatchODEScheduler
from .base import LatentObjective, register_objective

logger = logging.getLogger(__name__)


@dataclass
class FlowMatchingArguments(Checked):
    """The path from data to noise, and how noise levels are drawn.

    Example:
        >>> FlowMatchingObjective(model, arguments=FlowMatchingArguments(flow_path="cosine"))
    """

    flow_path: FlowPath = field(
        default="linear",
        metadata={"help": "x = alpha * latents + beta * noise: linear (1 - sigma, sigma), cosine, or vp."},
    )
    flow_weighting: LossWeighting = field(
        default="none",
        metadata={"help": "Weight of the squared error of a noise, score or clean-data prediction, as in SiT."},
    )
    flow_shift: float | None = field(
        default=None,
        metadata={
            "help": "Noise levels become s * sigma / (1 + (s - 1) * sigma), in training and in the saved sampler; "
            "unset, s = sqrt(C * h * w / 4096), at least 1, for latents of 16 channels or more, and 1 for fewer.",
            "range": "(0, inf)",
        },
    )
    sigma_distribution: SigmaDistribution = field(
        default="uniform", metadata={"help": "How noise levels are drawn in training."}
    )
    sigma_mean: float = field(
        default=0.0, metadata={"help": "Mean of logit(sigma) for logit_normal; > 0: noisier.", "range": "(-inf, inf)"}
    )
    sigma_std: float = field(
        default=1.0, metadata={"help": "Standard deviation of logit(sigma) for logit_normal.", "range": "(0, inf)"}
    )


@register_objective("flow_matching")
class FlowMatchingObjective(LatentObjective):
    """w |prediction - target|^2 at x_sigma = alpha(sigma) * latents + beta(sigma) * noise.

    The target is d x_sigma / d sigma, or what the model's prediction_type says: the noise, -noise / beta (the score)
    or the clean latents; then w follows `flow_weighting` (`flow.loss_weight`). A model with a learned variance (2C
    channels) is trained on its first C; the others stay as they are.

    Args:
        model: a backbone of time 1000 sigma.
        regularizers: by name, applied in this order.
        arguments: path, weights and noise levels; None takes the defaults.

    Attributes:
        arguments: with the shift that is used.

    Raises:
        ValueError: for a model with another prediction type, or a weighting that it does not have.
    """

    Arguments = FlowMatchingArguments
    prefixes = ("flow_", "sigma_")
    own_terms = ("flow",)
    prediction_types = FLOW_PREDICTIONS

    def __init__(
        self,
        model: Backbone | nn.Module,
        regularizers: Mapping[str, GeneratorRegularizer] | None = None,
        *,
        arguments: FlowMatchingArguments | None = None,
    ) -> None:
        super().__init__(model, regularizers)
        given = arguments or FlowMatchingArguments()
        shift = self._default_shift() if given.flow_shift is None else given.flow_shift
        self.arguments = replace(given, flow_shift=shift)
        self._weight(0.5)

    def _default_shift(self) -> float:
        config: Any = self.model.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shift = default_shift(config.in_channels, height, width)
        if shift != 1.0:
            numbers = (config.in_channels, height, width, shift)
            logger.info("Noise levels are shifted by sqrt(%d * %d * %d / 4096) = %.3g towards noise.", *numbers)
        return shift

    def sigmas(self, uniform: Tensor) -> Tensor:
        options = self.arguments
        assert options.flow_shift is not None
        drawn = sample_sigmas(uniform, options.sigma_distribution, mean=options.sigma_mean, std=options.sigma_std)
        low, high = sigma_interval(options.flow_path, self.prediction_type, training=True)
        return low + (high - low) * shift_sigma(drawn, options.flow_shift)

    def corrupt(self, latents: Tensor, noise: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        path = self.arguments.flow_path
        target = prediction_target(latents, noise, sigmas, prediction_type=self.prediction_type, path=path)
        return interpolate(latents, noise, sigmas, path), target

    def losses(self, state: GeneratorState, extra: Tensor | None) -> dict[str, Tensor]:
        loss = flow_matching_loss(state.prediction, state.target)
        weighted = loss if self.prediction_type == "flow_prediction" else self._weight(state.sigmas) * loss
        return {"flow": weighted.mean()}

    def _weight(self, sigmas: Any) -> Any:
        options = self.arguments
        chosen = {"prediction_type": self.prediction_type, "weighting": options.flow_weighting}
        return loss_weight(sigmas, **chosen, path=options.flow_path)

    def scheduler(self) -> FlowMatchODEScheduler:
        """An Euler solver of the path's ODE."""
        options = self.arguments
        assert options.flow_shift is not None
        return FlowMatchODEScheduler(
            path=options.flow_path, prediction_type=self.prediction_type, shift=options.flow_shift
        )
