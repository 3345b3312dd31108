"""Flow matching (SiT, arXiv 2401.08740): the mean square of the predicted velocity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..flow import FlowPath, SigmaDistribution, interpolate, sample_sigmas, velocity_target
from ..losses._checks import full_precision
from ..losses.diffusion import flow_matching_loss
from ..models.backbone import Backbone
from ..options import Checked
from ..randomness import StepRandomness
from ..regularizers.base import GeneratorRegularizer, GeneratorState
from ..schedulers.scheduling_flow_match_ode import FlowMatchODEScheduler
from .base import Objective, register_objective, tie_idle

NUM_TRAIN_TIMESTEPS = 1000


@dataclass
class FlowMatchingArguments(Checked):
    """The path from data to noise, and how noise levels are drawn.

    Example:
        >>> FlowMatchingObjective(model, arguments=FlowMatchingArguments(flow_path="cosine"))
    """

    flow_path: FlowPath = field(
        default="linear", metadata={"help": "x = alpha * latents + beta * noise: (1 - sigma, sigma), or cosine."}
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
class FlowMatchingObjective(Objective[GeneratorRegularizer]):
    """|v(x_sigma, sigma, y) - d x_sigma / d sigma|^2, with x_sigma = alpha(sigma) * latents + beta(sigma) * noise.

    A model with a learned variance (2C channels) is trained on its first C; the others stay as they are.

    Args:
        model: a backbone that predicts "flow_prediction".
        regularizers: by name, applied in this order.
        arguments: path and noise levels; None takes the defaults.

    Raises:
        ValueError: for a model with another prediction type.
    """

    Arguments = FlowMatchingArguments
    prefixes = ("flow_", "sigma_")
    reads = "latents"
    own_terms = ("flow",)
    prediction_types = ("flow_prediction",)

    def __init__(
        self,
        model: Backbone | nn.Module,
        regularizers: Mapping[str, GeneratorRegularizer] | None = None,
        *,
        arguments: FlowMatchingArguments | None = None,
    ) -> None:
        super().__init__(model, regularizers)
        self.arguments = arguments or FlowMatchingArguments()

    def draw(self, batch: Mapping[str, Tensor], randomness: StepRandomness) -> dict[str, Any]:
        """Its "noise" (B, C, h, w), "sigmas" and "drop_labels" (B,), and "regularizers": each one's draw by name."""
        latents, options = batch["latents"], self.arguments
        size, device = len(latents), latents.device
        noise = randomness.randn(latents.shape, device=device)
        sigmas = sample_sigmas(
            randomness.rand((size,), device=device),
            options.sigma_distribution,
            mean=options.sigma_mean,
            std=options.sigma_std,
        )
        drop_labels = randomness.rand((size,), device=device) < self.model.config.class_dropout_prob
        regularizers = self.draw_regularizers((latents.shape[-2], latents.shape[-1]), randomness)
        return {"noise": noise, "sigmas": sigmas, "drop_labels": drop_labels, "regularizers": regularizers}

    def forward(self, batch: Mapping[str, Tensor], draw: Mapping[str, Any]) -> dict[str, Any]:
        """
        Args:
            batch: "latents" (B, C, h, w) normalised, "class_labels" (B,), and the features a regularizer reads.
            draw: from `draw`.
        """
        latents, noise, sigmas, path = batch["latents"], draw["noise"], draw["sigmas"], self.arguments.flow_path
        noisy, target = interpolate(latents, noise, sigmas, path), velocity_target(latents, noise, sigmas, path)
        active = self.active(draw)
        output = self.model(
            noisy,
            timestep=NUM_TRAIN_TIMESTEPS * sigmas,
            class_labels=batch["class_labels"],
            drop_labels=draw["drop_labels"],
            hidden_layers=tuple(sorted({layer for _, each, _ in active for layer in each.hidden_layers})),
        )
        prediction = full_precision(output.sample)
        if prediction.shape[1] != latents.shape[1]:  # a learned variance
            prediction = prediction[:, : latents.shape[1]]
        state = GeneratorState(prediction, target, noisy, latents, noise, sigmas, output.hidden_states or {})
        terms = {"flow": flow_matching_loss(prediction, target).mean()}
        for name, regularizer, drawn in active:
            penalty = regularizer.penalty(state, batch, drawn)
            if penalty is not None:
                terms[name] = penalty
        return {"terms": terms, "idle": tie_idle(self, terms.values())}

    def scheduler(self) -> FlowMatchODEScheduler:
        """An Euler solver of the path's ODE."""
        return FlowMatchODEScheduler(path=self.arguments.flow_path)
