"""What a product minimises: draw, one wrapped forward, total.

draw = objective.draw(batch, run.randomness)         everything random in this step
output = wrapped(batch, draw)                        one nn.Module.forward, so that DDP and FSDP see every parameter
loss, logs = objective.total(output)                 outside the wrapper
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

import torch
from diffusers import ModelMixin, SchedulerMixin
from torch import Tensor, nn

from ..extensions import Registry
from ..losses._checks import full_precision
from ..models.backbone import Backbone
from ..randomness import StepRandomness
from ..regularizers.base import GeneratorRegularizer, GeneratorState, Regularizer

OBJECTIVES: Registry[type[Objective]] = Registry("objective", "diffusers_eqvae.objectives")
register_objective = OBJECTIVES.register

Reads = Literal["pixels", "latents", "tokens"]
R = TypeVar("R", bound=Regularizer)
NUM_TRAIN_TIMESTEPS = 1000  # what noise level 1 is on a backbone's time axis


class Objective(nn.Module, ABC, Generic[R]):
    """The one wrapped forward around `model` and `regularizers`.

    What goes through the wrapper is dicts, lists and tuples of tensors: accelerate's conversion to float32 and FSDP
    look into nothing else.

    Attributes:
        Arguments: dataclass of its command-line options, each named after it or with one of `prefixes`.
        reads: the data that it is trained on; data of another kind are refused at start-up.
        prediction_types: what a model's config may say that its output is.
        own_terms: names of its own terms, which a regularizer cannot have.
        pipeline: the class that samples what it trains, by the name that a saved pipeline has.

    Args:
        model: what is trained.
        regularizers: by name, applied in this order.

    Example:
        >>> draw = objective.draw(batch, randomness)
        >>> loss, logs = objective.total(objective(batch, draw))
    """

    Arguments: ClassVar[type | None] = None
    prefixes: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[Reads]
    prediction_types: ClassVar[tuple[str, ...]] = ()
    own_terms: ClassVar[tuple[str, ...]] = ()
    pipeline: ClassVar[str] = "ClassConditionalPipeline"

    def __init__(self, model: nn.Module, regularizers: Mapping[str, R] | None = None) -> None:
        super().__init__()
        taken = sorted(set(self.own_terms) & set(regularizers or {}))
        if taken:
            raise ValueError(f"A regularizer cannot be called {taken[0]!r}: {type(self).__name__} has such a term.")
        self.model = model
        self.regularizers = nn.ModuleDict(regularizers or {})

    @classmethod
    def from_arguments(cls, arguments: Any, model: nn.Module, regularizers: Mapping[str, R] | None = None) -> Self:
        """Built from an instance of `Arguments`, the constructor's `arguments`; None where it has none."""
        options = {} if arguments is None else {"arguments": arguments}
        return cls(model, regularizers, **options)

    @abstractmethod
    def draw(self, batch: Mapping[str, Tensor], randomness: StepRandomness) -> dict[str, Any]:
        """All that is random in one step: its own noise first, then `draw_regularizers` under "regularizers"."""

    @abstractmethod
    def forward(self, batch: Mapping[str, Tensor], draw: Mapping[str, Any]) -> dict[str, Any]:
        """Inside the wrapper: {"terms": {name: scalar}} and whatever else `total` needs.

        Ends with `tie_idle`, so that a step which leaves parameters out stalls no rank.
        """

    def total(self, output: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Outside the wrapper: the weighted sum of the terms, and every term for the logs (detached).

        A term that carries a regularizer's name has that regularizer's weight, any other has weight 1.
        """
        terms: Mapping[str, Tensor] = output["terms"]
        loss = output["idle"]
        for name, term in terms.items():
            loss = loss + self.weight_of(name) * term
        logs = {f"loss/{name}": term.detach() for name, term in terms.items()} if len(terms) > 1 else {}
        return loss, {"loss": loss.detach(), **logs}

    def scheduler(self) -> SchedulerMixin | None:
        """What samples that which was trained; None for an autoencoder."""
        return None

    def components(self) -> dict[str, ModelMixin]:
        """Networks saved beside the model, by folder name: those of the regularizers."""
        found: dict[str, ModelMixin] = {}
        for regularizer in self.regularizers.values():
            found |= regularizer.components()
        return found

    def frozen_modules(self) -> list[nn.Module]:
        """Teachers and other helpers of the regularizers."""
        return [module for regularizer in self.regularizers.values() for module in regularizer.frozen_modules()]

    def draw_regularizers(self, shape: tuple[int, ...], randomness: StepRandomness) -> dict[str, Any]:
        """Each regularizer's draw for latents or tokens of this shape, in their order, from one shared generator."""
        return {name: regularizer.draw(shape, randomness) for name, regularizer in self.regularizers.items()}

    def active(self, draw: Mapping[str, Any]) -> list[tuple[str, R, Any]]:
        """Name, regularizer and draw of those that a step's draw does not switch off."""
        drawn = draw["regularizers"]
        return [(name, each, drawn[name]) for name, each in self.regularizers.items() if drawn[name] is not None]  # type: ignore[misc]

    def weight_of(self, term: str) -> float:
        """The factor of a term of the loss."""
        return self.regularizers[term].weight if term in self.regularizers else 1.0  # type: ignore[return-value]


class GeneratorObjective(Objective[GeneratorRegularizer]):
    """What the objectives of all generators do with their regularizers.

    Raises:
        ValueError: a regularizer that reads a block which the model does not have, or predictions of other data.
    """

    def __init__(
        self, model: Backbone | nn.Module, regularizers: Mapping[str, GeneratorRegularizer] | None = None
    ) -> None:
        super().__init__(model, regularizers)
        for name, each in (regularizers or {}).items():
            if self.reads not in each.predictions_of:
                raise ValueError(
                    f"The regularizer {name} compares predictions of {' or '.join(each.predictions_of)}, and "
                    f"{type(self).__name__} trains a model to predict {self.reads}; leave it out, or choose a model "
                    "of another objective."
                )
            blocks: Any = getattr(model, "num_layers", None)
            if wrong := [layer for layer in each.hidden_layers if not 1 <= layer <= blocks]:
                raise ValueError(
                    f"The regularizer {name} reads the hidden states after block {wrong[0]}, and the model has the "
                    f"blocks 1 .. {blocks}; choose one of these."
                )

    def call(self, active: Sequence[tuple[str, GeneratorRegularizer, Any]], *inputs: Any, **options: Any) -> Any:
        """The network's output, with the hidden states that the regularizers read."""
        layers = {layer for _, each, _ in active for layer in each.hidden_layers}
        return self.model(*inputs, **options, hidden_layers=tuple(sorted(layers)))

    def regularized(
        self,
        terms: dict[str, Tensor],
        active: Sequence[tuple[str, GeneratorRegularizer, Any]],
        *,
        state: GeneratorState,
        batch: Mapping[str, Tensor],
    ) -> dict[str, Any]:
        """What `forward` gives: its own terms, and those of the regularizers by name."""
        for name, regularizer, drawn in active:
            penalty = regularizer.penalty(state, batch, drawn)
            if penalty is not None:
                terms[name] = penalty
        return {"terms": terms, "idle": tie_idle(self, terms.values())}


class LatentObjective(GeneratorObjective):
    """What the objectives of continuous latents share: noise, one call of the network, its regularizers.

    A member says which noise levels it trains on, how they spoil the latents, and what it compares.

    Args:
        model: a backbone that predicts one of `prediction_types`.
        regularizers: by name, applied in this order.

    Raises:
        ValueError: for a model with another prediction type.

    Example:
        >>> class Own(LatentObjective):
        ...     own_terms, prediction_types = ("noise",), ("epsilon",)
        ...     def sigmas(self, uniform):
        ...         return uniform
        ...     def corrupt(self, latents, noise, sigmas):
        ...         return latents + sigmas.view(-1, 1, 1, 1) * noise, noise
        ...     def losses(self, state, extra):
        ...         return {"noise": (state.prediction - state.target).square().mean()}
    """

    reads = "latents"

    def __init__(
        self, model: Backbone | nn.Module, regularizers: Mapping[str, GeneratorRegularizer] | None = None
    ) -> None:
        super().__init__(model, regularizers)
        config: Any = model.config
        if config.prediction_type not in self.prediction_types:
            raise ValueError(
                f"{type(self).__name__} trains models that predict {' or '.join(self.prediction_types)}; this one "
                f"predicts {config.prediction_type}."
            )
        self.prediction_type: Any = config.prediction_type

    @abstractmethod
    def sigmas(self, uniform: Tensor) -> Tensor:
        """Noise levels (B,) in [0, 1] from uniform numbers (B,)."""

    @abstractmethod
    def corrupt(self, latents: Tensor, noise: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        """The noisy latents, and what the network shall say of them, both (B, C, h, w)."""

    @abstractmethod
    def losses(self, state: GeneratorState, extra: Tensor | None) -> dict[str, Tensor]:
        """Its own terms: scalars by the names in `own_terms`. `extra` are the output's further channels, if any."""

    def timestep(self, sigmas: Tensor) -> Tensor:
        """The network's time axis."""
        return NUM_TRAIN_TIMESTEPS * sigmas

    def draw(self, batch: Mapping[str, Tensor], randomness: StepRandomness) -> dict[str, Any]:
        """Its "noise" (B, C, h, w), "sigmas" and "drop_labels" (B,), and "regularizers": each one's draw by name."""
        latents = batch["latents"]
        size, device = len(latents), latents.device
        noise = randomness.randn(latents.shape, device=device)
        sigmas = self.sigmas(randomness.rand((size,), device=device))
        config: Any = self.model.config
        drop_labels = randomness.rand((size,), device=device) < config.class_dropout_prob
        regularizers = self.draw_regularizers(tuple(latents.shape), randomness)
        return {"noise": noise, "sigmas": sigmas, "drop_labels": drop_labels, "regularizers": regularizers}

    def forward(self, batch: Mapping[str, Tensor], draw: Mapping[str, Any]) -> dict[str, Any]:
        """
        Args:
            batch: "latents" (B, C, h, w) normalised, "class_labels" (B,), and the features a regularizer reads.
            draw: from `draw`.
        """
        latents, noise, sigmas = batch["latents"], draw["noise"], draw["sigmas"]
        noisy, target = self.corrupt(latents, noise, sigmas)
        active = self.active(draw)
        labels = {"class_labels": batch["class_labels"], "drop_labels": draw["drop_labels"]}
        output = self.call(active, noisy, timestep=self.timestep(sigmas), **labels)
        prediction, extra = full_precision(output.sample), None
        if prediction.shape[1] != latents.shape[1]:
            prediction, extra = prediction.split(latents.shape[1], dim=1)
        state = GeneratorState(prediction, target, noisy, latents, noise, sigmas, output.hidden_states or {})
        return self.regularized(self.losses(state, extra), active, state=state, batch=batch)


@torch.compiler.disable  # it walks the autograd graph, which does not exist while a step is traced
def tie_idle(module: nn.Module, outputs: Iterable[Tensor]) -> Tensor:
    """0 times the sum of every trainable parameter of `module` that `outputs` do not depend on: a scalar.

    Added to the loss it changes no number, and gives every parameter a gradient in every step: data parallelism waits
    for all of them, and an optimizer on one rank must do to an unused weight what it does on several.

    Example:
        >>> loss = loss + tie_idle(model, [loss])
    """
    used = reached_by(outputs)
    idle = [weight for weight in module.parameters() if weight.requires_grad and id(weight) not in used]
    if not idle:
        return next(iter(outputs)).new_zeros(())
    return 0.0 * torch.stack([weight.sum() for weight in idle]).sum()


def reached_by(outputs: Iterable[Tensor], *, short_of: Iterable[Tensor] = ()) -> set[int]:
    """Identities of the leaves that the outputs' gradients reach, without passing through tensors `short_of` them."""
    ends = {tensor.grad_fn for tensor in short_of}
    pending = [output.grad_fn for output in outputs if output.grad_fn is not None and output.grad_fn not in ends]
    seen, leaves = {*pending, *ends}, {id(output) for output in outputs if output.is_leaf}
    while pending:
        node = pending.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            leaves.add(id(leaf))
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)
    return leaves
