"""What a generator's network must be, whatever it is made of; and the room's list of them.

A backbone is one file `models/transformer_*.py`, or a file of yours (`--extension FILE`): a class decorated with
`@register_backbone`, with its sizes in `PRESETS`. No other file names it.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from .. import _registration
from ..classes import ClassTable

PREDICTION_TYPES = ("flow_prediction", "epsilon", "score", "v_prediction", "sample", "logits")
_BACKBONES: dict[str, type[Backbone]] = {}
B = TypeVar("B", bound="type[Backbone]")


@dataclass
class BackboneOutput(BaseOutput):
    """What a backbone gives.

    Args:
        sample: (B, C, h, w), (B, 2C, h, w) with a learned variance, or logits (B, V, h, w) of tokens.
        hidden_states: {n: (B, N, D)} after block n, for the `hidden_layers` that were asked for.

    Example:
        >>> model(latents, timestep, labels, hidden_layers=(8,)).hidden_states[8].shape
        torch.Size([2, 256, 768])
    """

    sample: Tensor
    hidden_states: dict[int, Tensor] | None = None


class Backbone(ModelMixin, ConfigMixin):
    """A generator's network: what stands in its saved config decides how it is trained and sampled.

    config:
        objective: "flow_matching" (time is 1000 sigma), "denoising" (time is a step of 0 .. 999) or "masked_tokens".
        prediction_type: what the output is, in diffusers' words: "flow_prediction" (velocity), "epsilon" (noise),
            "sample" (clean data), and "score".
        sample_size: of the latents or tokens; in_channels of latents, codebook_size of tokens.
        num_classes: labels are 0 .. num_classes - 1; num_classes itself is the null class.
        class_dropout_prob: share of samples trained without their label; 0 = there is no null class to guide with.
        autoencoder: identity of the autoencoder whose latents it knows (`provenance.autoencoder_identity`).
        id2label, class_counts: names and numbers of training images by class id (`classes.ClassTable.to_config`).

    Attributes:
        PRESETS: model name ("SiT-B/2") -> constructor arguments, objective and prediction_type included.
        hidden_size: D. num_layers: blocks. token_grid: tokens along height and width.
        gradient_checkpointing_every: with gradient checkpointing, every n-th block alone is recomputed; 1 = all.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    hidden_size: int
    num_layers: int
    token_grid: tuple[int, int]
    gradient_checkpointing: bool = False
    gradient_checkpointing_every: int = 1

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """A freshly initialised model of that name; `overrides` are constructor arguments.

        Raises:
            ValueError: for a name that is not in `PRESETS`.
        """
        if name not in cls.PRESETS:
            raise ValueError(f"Unknown model {name!r}. Choose one of: {', '.join(cls.PRESETS)}.")
        return cls(**{**cls.PRESETS[name], **overrides})

    @property
    def null_class(self) -> int:
        """The label that means "no class"."""
        return self.config.num_classes

    @property
    def class_table(self) -> ClassTable | None:
        """Names and counts of the classes, as the config states them."""
        return ClassTable.from_config(self.config)

    @torch.no_grad()
    def with_classes(self, classes: ClassTable) -> Self:
        """A copy for other classes: every weight but the label table, of which classes of equal names keep their row.

        Rows of new names are freshly initialised; the row for no class stays.

        Example:
            >>> model.with_classes(ClassTable(("daisy", "rose"))).config.num_classes
            2
        """
        fresh = type(self).from_config({**self.config, "num_classes": len(classes), **classes.to_config()})
        state, begun = self.state_dict(), fresh.state_dict()
        for name, (dimension, first) in self.label_tables().items():
            saved, table = state[name].movedim(dimension, 0), begun[name].to(state[name].dtype).movedim(dimension, 0)
            table[:first] = saved[:first]
            for here, there in classes.rows_from(self.class_table).items():
                table[first + here] = saved[first + there]
            table[first + len(classes) :] = saved[first + self.config.num_classes :]
            state[name] = table.movedim(0, dimension)
        fresh.load_state_dict(state)
        return fresh.to(self.dtype)

    def label_tables(self) -> dict[str, tuple[int, int]]:
        """Parameters with a row for each class and, where there is one, a last row for no class.

        Returns:
            name -> (dimension of the rows, row of class 0).
        """
        return {"class_embedder.weight": (0, 0)}

    def recomputes(self, block: int) -> bool:
        """Whether this forward keeps only the input of a block, counted from 1, for the backward."""
        return (
            torch.is_grad_enabled() and self.gradient_checkpointing and block % self.gradient_checkpointing_every == 0
        )

    @abstractmethod
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor,
        *,
        drop_labels: Tensor | None = None,
        hidden_layers: tuple[int, ...] = (),
        return_dict: bool = True,
    ) -> BackboneOutput | tuple[Tensor, dict[int, Tensor]]:
        """The prediction for noisy latents (B, C, h, w), or for tokens (B, h, w) with `timestep` None."""


def register_backbone(cls: B) -> B:
    """Class decorator: makes the names in `PRESETS` models of `--model`, and the class loadable by diffusers.

    Raises:
        ValueError: a name belongs to another class, or a preset does not say its objective and prediction_type.

    Example:
        >>> @register_backbone
        ... class MyTransformer2DModel(Backbone):
        ...     PRESETS = {"My-S": {"objective": "flow_matching", "prediction_type": "flow_prediction"}}
    """
    for name, config in cls.PRESETS.items():
        owner = _BACKBONES.get(name)
        if owner is not None and (owner.__module__, owner.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"The model name {name!r} of {cls.__module__} is taken by {owner.__module__}.")
        missing = [key for key in ("objective", "prediction_type") if key not in config]
        if missing:
            raise ValueError(f"The preset {name!r} of {cls.__name__} must say its {' and '.join(missing)}.")
    _BACKBONES.update(dict.fromkeys(cls.PRESETS, cls))
    _registration.register([cls])
    return cls


def backbones() -> dict[str, type[Backbone]]:
    """Model name -> class, of this folder's `transformer_*` modules and of the extensions.

    Example:
        >>> backbones()["SiT-B/2"].__name__
        'SiTTransformer2DModel'
    """
    package = importlib.import_module(__package__ or "")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.startswith("transformer_"):
            importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(_BACKBONES)


def backbone_class(name: str) -> type[Backbone]:
    """The class that is called `name`, as a saved config's `_class_name` says it.

    Raises:
        ValueError: there is none; says which there are.

    Example:
        >>> backbone_class("SiTTransformer2DModel").from_preset("SiT-B/2", num_classes=10)
    """
    classes = {cls.__name__: cls for cls in backbones().values()}
    if name not in classes:
        raise ValueError(f"{name} is not a backbone known here ({', '.join(sorted(classes))}). {_registration.REMEDY}")
    return classes[name]
