"""What a converter is, how one is found for given tensors, and what every conversion refuses."""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..extensions import Registry
from ..pretrained import require_finite_weights

logger = logging.getLogger(__name__)

CONVERTERS: Registry[type[Converter]] = Registry("converter", "diffusers_eqvae.conversion")
register_converter = CONVERTERS.register
_NAMED_AT_MOST = 8


class Converter(ABC):
    """One published layout of weights <-> one class of ours.

    Attributes:
        target: the class, a diffusers model.
        idle: patterns (`*`, `?`) of published tensors that may be absent or left out; any other unknown or missing
            tensor is refused by name.
        inside: prefixes under which it lies in larger checkpoints; what is beside it there is left out.

    Example:
        >>> @register_converter("renamed")
        ... class Renamed(Converter):
        ...     target = PatchDiscriminator
        ...     def matches(self, shapes):
        ...         return all(name.startswith("disc.") for name in shapes)
        ...     def config(self, tensors, overrides):
        ...         return {"in_channels": tensors["disc.layers.0.weight"].shape[1], **overrides}
        ...     def to_ours(self, tensors, config):
        ...         return {name.removeprefix("disc."): tensor for name, tensor in tensors.items()}
        ...     def from_ours(self, state_dict, config):
        ...         return {f"disc.{name}": tensor for name, tensor in state_dict.items()}
    """

    target: ClassVar[Any]
    idle: ClassVar[tuple[str, ...]] = ()
    inside: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def matches(self, shapes: Mapping[str, torch.Size]) -> bool:
        """Whether tensors of these names and shapes can be of this layout."""

    @abstractmethod
    def config(self, tensors: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> dict[str, Any]:
        """The constructor arguments of `target`; `overrides` win, and what is only assumed is logged as a warning."""

    @abstractmethod
    def to_ours(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        """A complete state dict of `target`; prefixes and ema/model entries have been dealt with before."""

    @abstractmethod
    def from_ours(self, state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        """The inverse, bit for bit; raises NotImplementedError where the layout is one way.

        Also called with tensors on the meta device, to know every published name and shape.
        """

    def stated(self, checkpoint: Mapping[str, Tensor]) -> dict[str, Any]:
        """Constructor arguments that follow from what lies beside it in a larger checkpoint."""
        return {}

    def reader_options(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What programs that read the layout are told by options of theirs, since it cannot hold it."""
        return {}

    def notes(self, config: Mapping[str, Any]) -> list[str]:
        """What else the layout does not hold of a model of this config, or its readers do not take; a line each."""
        return []

    def part(self, checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What of a larger checkpoint is of this layout, without its prefix; all of it where none is there."""
        for prefix in self.inside:
            if any(name.startswith(prefix) for name in checkpoint):
                return {
                    name.removeprefix(prefix): each for name, each in checkpoint.items() if name.startswith(prefix)
                }
        return dict(checkpoint)


def from_published(tensors: Mapping[str, Tensor], *, layout: str | None = None, **overrides: Any) -> Any:
    """A model of ours with published weights, in float32 and eval mode.

    Args:
        tensors: of a checkpoint, as `read_published` gives them.
        layout: name in `CONVERTERS`; without it the one that matches.
        overrides: constructor arguments that shapes do not tell, or tell wrongly.

    Raises:
        ValueError: no layout matches, or two do; a tensor that is missing, unknown, of another shape or not finite.

    Example:
        >>> transformer = from_published(read_published("SiT-XL-2-256x256.pt"), layout="sit")
    """
    converter = CONVERTERS[layout or _matching(tensors)]()
    _require_options(converter.target, overrides)
    checkpoint, tensors = tensors, converter.part(tensors)
    if beside := len(checkpoint) - len(tensors):
        logger.warning("%d of %d tensors are of other networks, and left out.", beside, len(checkpoint))
        overrides = converter.stated(checkpoint) | overrides
    try:
        config = converter.config(tensors, overrides)
    except KeyError as error:
        raise ValueError(f"The checkpoint lacks {error.args[0]}: it is not of this layout, or not whole.") from error
    except (TypeError, ArithmeticError) as error:  # of options of another type, or 0
        raise _no_model(converter, error) from error
    _require_tensors(converter, tensors, config)
    model = converter.target(**config)
    model.load_state_dict(converter.to_ours(tensors, config))
    require_finite_weights(model, "The checkpoint")
    return model.eval()


def to_published(model: Any, layout: str) -> dict[str, Tensor]:
    """The tensors of a model under the names of a published layout; the inverse of `from_published`.

    Raises:
        ValueError: the model is of another class, or follows conventions that the layout does not have.

    Example:
        >>> tensors = to_published(SiTTransformer2DModel.from_preset("SiT-S/2"), "sit")
    """
    converter = CONVERTERS[layout]()
    if not isinstance(model, converter.target):
        raise ValueError(
            f"The layout {layout} holds a {converter.target.__name__}, and the model is a {type(model).__name__}; "
            "choose another layout."
        )
    return converter.from_ours(model.state_dict(), model.config)


class UnclearLayout(ValueError):
    """The tensors fit several layouts, or none."""


def _matching(tensors: Mapping[str, Tensor]) -> str:
    found = []
    for name in CONVERTERS:
        converter = CONVERTERS[name]()
        if converter.matches({each: tensor.shape for each, tensor in converter.part(tensors).items()}):
            found.append(name)
    if len(found) > 1:
        raise UnclearLayout(
            f"The tensors fit the layouts {' and '.join(found)}, which differ in conventions that names and shapes do "
            "not show; say which one it is."
        )
    if not found:
        raise UnclearLayout(
            f"The tensors ({_listed(tensors)}) fit none of the layouts {', '.join(CONVERTERS.names())}. Say which one "
            "it is to see what does not fit, or add a converter of your own (diffusers_eqvae.load_extension)."
        )
    return found[0]


def _no_model(converter: Converter, error: Exception) -> ValueError:
    return ValueError(
        f"No {converter.target.__name__} can be made of these options ({error}); give those that shapes do not tell, "
        "such as norm_num_groups or num_attention_heads, as the model was made."
    )


def _require_options(target: type, overrides: Mapping[str, Any]) -> None:
    known = inspect.signature(target).parameters
    unknown = [name for name in overrides if name not in known]
    if unknown:
        raise ValueError(f"{target.__name__} has no option {unknown[0]!r}; its options are {', '.join(known)}.")


def _require_tensors(converter: Converter, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Compares names and shapes with those that a model of this config would be published with."""
    try:
        with torch.device("meta"):
            skeleton = converter.target(**config)
    except Exception as error:  # whatever a constructor has against its options
        raise _no_model(converter, error) from error
    try:
        expected = converter.from_ours(skeleton.state_dict(), config)
    except NotImplementedError:
        return  # one way: loading the state dict shows what is missing
    missing = [name for name in expected if name not in tensors and not _is_idle(converter, name)]
    if missing:
        raise ValueError(f"The checkpoint lacks {_listed(missing)}. Pass the whole state dict of the model.")
    unknown = [name for name in tensors if name not in expected]
    refused = [name for name in unknown if not _is_idle(converter, name)]
    if refused:
        raise ValueError(
            f"The checkpoint holds {_listed(refused)}, which {type(converter).__name__} does not know; "
            "it is of another layout, or they must be removed first."
        )
    for name in expected.keys() & tensors.keys():
        if expected[name].shape != tensors[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(tensors[name].shape)}, and a {converter.target.__name__} of this config "
                f"needs {tuple(expected[name].shape)}; give the options that are guessed wrongly."
            )
    if unknown:
        logger.warning("Not part of the model, left out: %s", _listed(unknown))


def _is_idle(converter: Converter, name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in converter.idle)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "") if names else "none"
