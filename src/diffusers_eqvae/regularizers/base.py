"""What a regularizer may do: one base class for each product, with hooks that compose.

A method is one file: a class with its `Arguments`, decorated with `@register_regularizer("its_name")`, in this folder
or anywhere else (`--extension FILE`). No other file names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self

from diffusers import ModelMixin
from torch import Tensor, nn

from ..autoencoders import Decoded, Posterior
from ..data.latent_format import FeatureSettings
from ..extensions import Registry
from ..provenance import weights_of
from ..randomness import StepRandomness

REGULARIZERS: Registry[type[Regularizer]] = Registry("regularizer", "diffusers_eqvae.regularizers")
register_regularizer = REGULARIZERS.register


class _Shared:
    """Hides a module from nn.Module's registration; copies share it, so that an EMA needs no second teacher."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


class Regularizer(nn.Module):
    """One method: what it draws once per step, and the term it adds. Not subclassed directly.

    Attributes:
        Arguments: dataclass of its command-line options, each named after the method or with one of `prefixes`.
        weight: factor of the penalty.
        mean_over_elements: whether the penalty is a mean, so that beside a reconstruction error that is summed over
            channels and pixels it counts once per element (autoencoder side).
        adaptive: whether the penalty is first scaled so that its gradient at the encoder's last layer is as large as
            that of the reconstruction (autoencoder side).
        couples_samples: whether its penalty depends on all samples of a step together, gathered over ranks, so that
            two ranks equal one with twice the batch, and accumulated micro-batches do not.
        excludes: what it cannot run beside, a regularizer or a term of the objective's own (kl) -> the reason.
        features: features of the clean images that it reads as `batch["features.NAME"]`.
        reads_pixels: whether it reads the clean images (generator side: as `batch["pixel_values"]`); beside
            `features`, in place of those that the data do not hold.
        paper: what the card of a model names: (name of the method, number on arXiv).

    Example:
        >>> class Toward(AutoencoderRegularizer):
        ...     def __init__(self, teacher: nn.Module) -> None:
        ...         super().__init__()
        ...         self.hold(teacher)
        ...
        ...     def penalty(self, state, batch, draw):
        ...         return (state.raw_latents - self.frozen_modules()[0](state.pixels)).square().mean()
    """

    Arguments: ClassVar[type | None] = None
    prefixes: ClassVar[tuple[str, ...]] = ()
    couples_samples: ClassVar[bool] = False
    features: tuple[str, ...] = ()
    reads_pixels: bool = False
    paper: ClassVar[tuple[str, str] | None] = None
    excludes: ClassVar[Mapping[str, str]] = MappingProxyType({})
    mean_over_elements: ClassVar[bool] = False
    weight: float = 1.0
    adaptive: bool = False
    _held: tuple[_Shared, ...] = ()

    @classmethod
    def features_of(cls, arguments: Any) -> tuple[str, ...]:
        """The features that it reads with these arguments; where there are any, `from_arguments` is also given
        `features`, those of them that the data hold: name -> `FeatureSettings`."""
        return cls.features

    @classmethod
    def from_arguments(cls, arguments: Any, model: nn.Module) -> Self:
        """Built for `model` from an instance of `Arguments`; a component that an earlier run saved goes on."""
        return cls()

    def draw(self, shape: tuple[int, ...], randomness: StepRandomness) -> Any:
        """Every random choice of one step; None = switched off in this step.

        `randomness.shared_generator()` is the same on all ranks, `.rand` and `.randn` are per sample,
        `.step` is the number of the optimizer step, for schedules. A method without random choices keeps the default.

        Args:
            shape: of what is trained on: latents (B, C, h, w), or tokens (B, h, w). Another method's `augment` may
                still make the latents of this step smaller.
            randomness: of this micro-batch.
        """
        return ()

    def penalty(self, state: Any, batch: Mapping[str, Tensor], draw: Any) -> Tensor | None:
        """A scalar to add to the loss, the mean over samples; None for nothing."""
        return None

    def components(self) -> dict[str, ModelMixin]:
        """Networks worth keeping, by the folder that they are saved in beside the finished model."""
        return {}

    def hold(self, module: nn.Module) -> None:
        """Keeps a frozen network, a teacher, outside the module tree; `frozen_modules()` gives it back.

        It moves with the regularizer and is shared by its copies, but is in no state dict, no parameter list and no
        data-parallel wrapper. Call it in `__init__`, after that of the base class.
        """
        self._held = (*self._held, _Shared(module.requires_grad_(False).eval()))

    def frozen_modules(self) -> list[nn.Module]:
        """Networks that help without learning, in the order of `hold`: moved to the device, never trained or saved."""
        return [shared.module for shared in self._held]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for module in self.frozen_modules():
            module._apply(fn, recurse)
        return super()._apply(fn, recurse)


@dataclass
class AutoencoderState:
    """What an autoencoder-side penalty sees.

    Attributes:
        posterior: of the encoded pixels.
        raw_latents: (B, C, h, w), its sample or mode, not transformed.
        pixels: (B, 3, H, W) that were encoded.
        encode, decode: the autoencoder's own, inside the wrapped forward.

    Example:
        >>> error = (state.decode(state.raw_latents).pixels - state.pixels).square().mean()
    """

    posterior: Posterior
    raw_latents: Tensor
    pixels: Tensor
    encode: Callable[[Tensor], Posterior]
    decode: Callable[[Tensor], Decoded]


class AutoencoderRegularizer(Regularizer):
    """Regularizes an autoencoder. One step calls, in this order and with the same draw,

        pixels             = augment(pixels)                    what is encoded
        raw_latents, target = transform(raw_latents, pixels)    what is decoded, and what it must become
        (latents, target, weight) ... = decodings(state)        further pairs, judged like the first
        term               = penalty(state)                     of the untransformed raw latents

    Attributes:
        reaches: what its gradient moves: "encoder", "decoder", and "component" where it trains weights of its own.
            A method is refused where every half that it reaches is frozen (`require_reach`).
    """

    reaches: ClassVar[frozenset[str]] = frozenset({"encoder", "decoder"})

    def smallest_scale(self) -> float:
        """The least factor by which it may shrink an image, for the size checks of a run."""
        return 1.0

    def changed_images(self) -> str | None:
        """What it may encode in place of the batch's images, which features of those do not fit, in words; or None."""
        return None if type(self).augment is AutoencoderRegularizer.augment else "images of its own"

    def augment(self, pixels: Tensor, draw: Any) -> Tensor:
        """Pixels (B, 3, H, W) to encode, of any size that the autoencoder accepts."""
        return pixels

    def transform(self, raw_latents: Tensor, pixels: Tensor, draw: Any) -> tuple[Tensor, Tensor]:
        """The raw latents to decode, and the pixels that their decoding is compared with."""
        return raw_latents, pixels

    def decodings(self, state: AutoencoderState, draw: Any) -> list[tuple[Tensor, Tensor, float]]:
        """Further (raw_latents, target, weight), judged like the first."""
        return []


@dataclass
class GeneratorState:
    """What a generator-side penalty sees.

    Attributes:
        prediction: of the network, (B, C, h, w) in the objective's prediction type, or logits of tokens.
        target: what it is compared with.
        noisy, clean, noise: (B, C, h, w).
        sigmas: (B,) noise levels; the share of masked tokens for a discrete objective.
        hidden_states: {n: (B, N, D)} after block n, for the `hidden_layers` that were asked for.

    Example:
        >>> error = (state.prediction - state.target).square().mean()
    """

    prediction: Tensor
    target: Tensor
    noisy: Tensor
    clean: Tensor
    noise: Tensor
    sigmas: Tensor
    hidden_states: dict[int, Tensor] = field(default_factory=dict)


class GeneratorRegularizer(Regularizer):
    """Regularizes a generator. An objective refuses one that asks its model or its data for what they do not give.

    Attributes:
        hidden_layers: blocks (counted from 1) whose output it reads, inside the one wrapped forward.
        predictions_of: whose predictions it can regularize, of latents (shaped as their target) or of tokens (logits).

    Example:
        >>> class SmallStates(GeneratorRegularizer):
        ...     hidden_layers = (8,)
        ...
        ...     def penalty(self, state, batch, draw):
        ...         return state.hidden_states[8].square().mean()
    """

    hidden_layers: tuple[int, ...] = ()
    predictions_of: ClassVar[tuple[Literal["latents", "tokens"], ...]] = ("latents", "tokens")


def build_regularizers(
    names: Sequence[str],
    arguments: Mapping[str, Any],
    model: nn.Module,
    *,
    features: Mapping[str, FeatureSettings] = MappingProxyType({}),
    pixels: bool = False,
    remedy: Callable[[Sequence[str]], str] = lambda lacking: "train on images that are encoded on the way",
) -> dict[str, Any]:
    """The regularizers of these names for `model`, in this order.

    Args:
        names: "none" counts for nothing.
        arguments: instances of their `Arguments`, by name.
        features: what the data can give, by name.
        pixels: whether the data can give images.
        remedy: what to do about features that the data lack, in words.

    Raises:
        ValueError: an unknown name, two that exclude each other, or a method that reads what the data do not give.

    Example:
        >>> build_regularizers(["equivariance"], {"equivariance": EquivarianceArguments()}, vae)
    """
    built = {}
    names = [name for name in names if name != "none"]
    require_compatible({name: REGULARIZERS[name] for name in names}, names)
    for name in names:
        cls, options = REGULARIZERS[name], arguments.get(name)
        wanted = cls.features_of(options)
        lacking = [each for each in wanted if each not in features]
        if (lacking and not (cls.reads_pixels and pixels)) or (cls.reads_pixels and not wanted and not pixels):
            kinds = [f"the features {', '.join(lacking)}"] if lacking else []
            what = " or ".join([*kinds, *(["images"] if cls.reads_pixels else [])])
            raise ValueError(f"The regularizer {name} reads {what}, which these data do not hold; {remedy(lacking)}.")
        given = {"features": {each: features[each] for each in wanted if each in features}} if wanted else {}
        built[name] = cls.from_arguments(options, model, **given)
    return built


def require_compatible(regularizers: Mapping[str, Any], beside: Iterable[str]) -> None:
    """Refuses a regularizer that says of one of the names `beside` it, and why, that the two exclude each other.

    Example:
        >>> require_compatible({"noise": NoiseRegularizer()}, ["noise", "equivariance"])
    """
    for name, regularizer in regularizers.items():
        for other in beside:
            if other in regularizer.excludes:
                reason = regularizer.excludes[other]
                raise ValueError(f"The regularizer {name} cannot run beside {other}: {reason}; leave one of them out.")


def require_reach(name: str, regularizer: AutoencoderRegularizer, model: nn.Module) -> None:
    """Refuses a regularizer of which every half of the autoencoder that it reaches is frozen.

    Example:
        >>> require_reach("noise", NoiseRegularizer(), vae)
    """
    halves = sorted(regularizer.reaches - {"component"})
    if not any(weight.requires_grad for weight in weights_of(model, *halves)):
        raise ValueError(
            f"The regularizer {name} moves nothing of the autoencoder but its {' and '.join(halves)}, and no weight "
            "of that learns here; let it learn, or leave the regularizer out."
        )
