"""The optimizers by name: what each is, how it is built, and what its state weighs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

logger = logging.getLogger(__name__)

OptimizerName = Literal["adamw", "adam", "adamw_8bit", "adafactor", "muon"]
FLOAT32_BYTES = 4
# bitsandbytes: the moments of smaller tensors stay float32; of others a byte a value, and a float32 scale per block.
SMALLEST_8BIT, BLOCK_8BIT = 4096, 256


def _adamw_8bit() -> type[Optimizer]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        said = "--optimizer adamw_8bit needs the package bitsandbytes: pip install bitsandbytes. Or use adafactor."
        raise ValueError(said) from error
    return AdamW8bit


def _muon() -> type[Optimizer]:
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"--optimizer muon needs torch 2.9 or newer, and this is {torch.__version__}; use adamw.")
    return torch.optim.Muon


def _two_moments(weight: Tensor) -> int:
    return 2 * weight.numel() * FLOAT32_BYTES


def _two_moments_in_bytes(weight: Tensor) -> int:
    if weight.numel() < SMALLEST_8BIT:
        return _two_moments(weight)
    return 2 * (weight.numel() + FLOAT32_BYTES * -(-weight.numel() // BLOCK_8BIT))


def _rows_and_columns(weight: Tensor) -> int:
    """Of the last two dimensions, which for a kernel are its height and width."""
    if weight.ndim < 2:
        return weight.numel() * FLOAT32_BYTES
    return (weight.numel() // weight.shape[-1] + weight.numel() // weight.shape[-2]) * FLOAT32_BYTES


def _momentum(weight: Tensor) -> int:
    return weight.numel() * FLOAT32_BYTES


def everything(module: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def hidden_matrices(module: nn.Module) -> list[nn.Parameter]:
    """The trainable weights of `nn.Linear` layers inside an `nn.ModuleList`, where networks keep their blocks.

    Kernels, biases, gains, tables, and the layers before and after the blocks are not among them.
    """
    blocks = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    layers: dict[Any, None] = dict.fromkeys(
        layer for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear)
    )
    return [layer.weight for layer in layers if layer.weight.requires_grad]


@dataclass(frozen=True)
class OptimizerKind:
    """One entry of the table.

    Args:
        find: its class; ValueError with the remedy where this machine lacks it.
        state_bytes: of a weight tensor's state, but for a counter of steps.
        takes: which options of a run act on it.
        fixed: arguments that it is always built with.
        optimizes: which parameters of a module; AdamW gets the rest.
    """

    find: Callable[[], type[Optimizer]]
    state_bytes: Callable[[Tensor], int]
    takes: tuple[str, ...] = ("betas", "eps", "weight_decay")
    fixed: Mapping[str, Any] = field(default_factory=dict)
    optimizes: Callable[[nn.Module], list[nn.Parameter]] = everything


OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(lambda: torch.optim.AdamW, _two_moments, fixed={"fused": True}),
    "adam": OptimizerKind(lambda: torch.optim.Adam, _two_moments, fixed={"fused": True}),
    "adamw_8bit": OptimizerKind(_adamw_8bit, _two_moments_in_bytes),
    "adafactor": OptimizerKind(lambda: torch.optim.Adafactor, _rows_and_columns, takes=("weight_decay",)),
    # Steps as large as AdamW's (arXiv 2502.16982, as torch states it), so that both share a learning rate.
    "muon": OptimizerKind(
        _muon,
        _momentum,
        takes=("weight_decay",),
        fixed={"adjust_lr_fn": "match_rms_adamw"},
        optimizes=hidden_matrices,
    ),
}


def _shares(name: str, module: nn.Module) -> Iterator[tuple[OptimizerKind, list[nn.Parameter]]]:
    """What of the module the optimizer takes, and AdamW with what is left, if anything is."""
    kind = OPTIMIZERS[name]
    own = kind.optimizes(module)
    yield kind, own
    taken = {id(parameter) for parameter in own}
    if rest := [parameter for parameter in everything(module) if id(parameter) not in taken]:
        yield OPTIMIZERS["adamw"], rest


def state_bytes(name: str, module: nn.Module) -> int:
    """Bytes of what the optimizer keeps for a module's trainable parameters.

    Example:
        >>> state_bytes("adamw", nn.Linear(1000, 1000, bias=False))
        8000000
    """
    return sum(kind.state_bytes(parameter) for kind, share in _shares(name, module) for parameter in share)


def build_optimizer(name: str, module: nn.Module, *, lr: float, **options: Any) -> Optimizer:
    """The optimizer of that name over the trainable parameters of a module.

    adam, adamw: torch's fused form (one kernel, and it can skip a step without asking the host).
    adamw_8bit: bitsandbytes' blockwise quantised moments (arXiv 2110.02861).
    adafactor: torch's (arXiv 1804.04235). A step is min(lr, t**-0.5) * max(1e-3, RMS(weight)) times the gradient over
        the root of its factored second moment: the learning rate is relative to the weights.
    muon: torch's, of the `hidden_matrices`; AdamW, with `betas` and `eps`, of all else.

    Args:
        lr: peak learning rate.
        options: betas, eps and weight_decay; those that the optimizer has not are left out.

    Raises:
        ValueError: an unknown name, one that this machine lacks, or muon for a module without such matrices.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"The optimizer must be one of {', '.join(OPTIMIZERS)}; got {name!r}.")
    parts = []
    for kind, share in _shares(name, module):
        if not share:
            raise ValueError(
                f"--optimizer {name} acts on the weights of linear layers inside blocks (an nn.ModuleList), and no "
                f"such weight of this {type(module).__name__} is trained; use --optimizer adamw."
            )
        own = {key: value for key, value in options.items() if key in kind.takes}
        parts.append(_build(kind, share, {"lr": lr, **own}))
    return parts[0] if len(parts) == 1 else SeveralOptimizers(*parts)


def _build(kind: OptimizerKind, parameters: list[nn.Parameter], options: dict[str, Any]) -> Optimizer:
    cls: Any = kind.find()
    try:
        return cls(parameters, **kind.fixed, **options)
    except RuntimeError as reason:
        if "fused" not in kind.fixed:
            raise
        logger.warning(
            "No fused %s on this device (%s); the plain one reads one flag per step back.", cls.__name__, reason
        )
        return cls(parameters, **options)


class SeveralOptimizers(Optimizer):
    """Optimizers of different parameters as one, whose groups and state are theirs together."""

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self.parts:
            part.state = self.state
            part.param_groups = [next(groups) for _ in part.param_groups]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # called without one
        for part in self.parts:
            part.step()
