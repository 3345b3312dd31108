"""What a product minimises: draw, one wrapped forward, total.

draw = objective.draw(batch, run.randomness)         everything random in this step
output = wrapped(batch, draw)                        one nn.Module.forward, so that DDP and FSDP see every parameter
loss, logs = objective.total(output)                 outside the wrapper
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

import torch
from diffusers import ModelMixin, SchedulerMixin
from torch import Tensor, nn

from ..extensions import Registry
from ..randomness import StepRandomness
from ..regularizers.base import Regularizer

OBJECTIVES: Registry[type[Objective]] = Registry("objective", "diffusers_eqvae.objectives")
register_objective = OBJECTIVES.register

Reads = Literal["pixels", "latents", "tokens"]
R = TypeVar("R", bound=Regularizer)


class Objective(nn.Module, ABC, Generic[R]):
    """The one wrapped forward around `model` and `regularizers`.

    What goes through the wrapper is dicts, lists and tuples of tensors: accelerate's conversion to float32 and FSDP
    look into nothing else.

    Attributes:
        Arguments: dataclass of its command-line options, each named after it or with one of `prefixes`.
        reads: the data that it is trained on; data of another kind are refused at start-up.
        prediction_types: what a model's config may say that its output is.
        own_terms: names of its own terms, which a regularizer cannot have.

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

    def draw_regularizers(self, size: tuple[int, int], randomness: StepRandomness) -> dict[str, Any]:
        """Each regularizer's draw for latents of `size` = (h, w), in their order, from one shared generator."""
        return {name: regularizer.draw(size, randomness) for name, regularizer in self.regularizers.items()}

    def active(self, draw: Mapping[str, Any]) -> list[tuple[str, R, Any]]:
        """Name, regularizer and draw of those that a step's draw does not switch off."""
        drawn = draw["regularizers"]
        return [(name, each, drawn[name]) for name, each in self.regularizers.items() if drawn[name] is not None]  # type: ignore[misc]

    def weight_of(self, term: str) -> float:
        """The factor of a term of the loss."""
        return self.regularizers[term].weight if term in self.regularizers else 1.0  # type: ignore[return-value]


def tie_idle(module: nn.Module, outputs: Iterable[Tensor]) -> Tensor:
    """0 times the sum of every trainable parameter of `module` that `outputs` do not depend on: a scalar.

    Added to the loss it changes no number, and gives every parameter a gradient in every step: data parallelism waits
    for all of them, and an optimizer on one rank must do to an unused weight what it does on several.

    Example:
        >>> loss = loss + tie_idle(model, [loss])
    """
    used = _reached(outputs)
    idle = [weight for weight in module.parameters() if weight.requires_grad and id(weight) not in used]
    if not idle:
        return next(iter(outputs)).new_zeros(())
    return 0.0 * torch.stack([weight.sum() for weight in idle]).sum()


def _reached(outputs: Iterable[Tensor]) -> set[int]:
    """Identities of the leaves that the outputs' gradients reach."""
    pending = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen, leaves = set(pending), {id(output) for output in outputs if output.is_leaf}
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
