"""One optimized module: float32 master weights, fused optimizer, learning rate by step, EMA, and the NaN guard."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


def learning_rate_factor(schedule: str, step: int, *, warmup_steps: int, total_steps: int) -> float:
    """What the learning rate is multiplied by in step `step` (0-based): a pure function, so nothing to checkpoint.

    Warm-up: (step + 1) / warmup_steps, for every schedule. Then, with r the share of the remaining steps done:
    constant 1; linear 1 - r; cosine (1 + cos(pi r)) / 2.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "linear":
        return max(0.0, 1.0 - done)
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    return 1.0


class ExponentialAverage:
    """A moving average of a module's weights, which starts at the present ones.

    Args:
        module: frozen parameters are shared with it, not copied; buffers follow it.
        decay: ema = decay * ema + (1 - decay) * weights.

    Attributes:
        module: the averaged copy, frozen and in eval mode.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        frozen = {id(parameter): parameter for parameter in module.parameters() if not parameter.requires_grad}
        self.module = copy.deepcopy(module, frozen).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, nonfinite: Tensor) -> None:
        """One step of the recursion, or none at all where `nonfinite` (0-dim, 0 or 1) is 1; decided on the device."""
        trained = [
            (averaged, current)
            for averaged, current in zip(self.module.parameters(), module.parameters(), strict=True)
            if averaged is not current
        ]
        averages: list[Tensor] = [averaged for averaged, _ in trained]
        currents: list[Tensor] = [current for _, current in trained]
        share = (1 - self.decay) * (1 - nonfinite)
        if share.device.type == "cpu":
            torch._foreach_lerp_(averages, currents, share.item())
        else:
            lerp_without_waiting(averages, currents, share)
        for averaged, current in zip(self.module.buffers(), module.buffers(), strict=True):
            averaged.copy_(torch.where(nonfinite.bool(), averaged, current))


def warn_of_slow_average(decay: float, steps: int) -> None:
    """Says where an average will be mostly the weights that it started from."""
    kept = decay**steps
    if kept > 0.5:
        said = (
            "--ema_decay %g over %d steps: %.0f %% of the average will be the weights it started from. For so short a "
            "run lower it, or use --no_use_ema."
        )
        logger.warning(said, decay, steps, 100 * kept)


def lerp_without_waiting(averages: list[Tensor], currents: list[Tensor], share: Tensor) -> None:
    """averages += share * (currents - averages) in place; the device is not asked for `share`, as lerp would.

    Holds one more copy of the weights meanwhile.
    """
    steps = torch._foreach_sub(currents, averages)
    torch._foreach_mul_(steps, share)
    torch._foreach_add_(averages, steps)


@dataclass
class OptimizedModule:
    """A module with all that training adds to it.

    Args:
        name: of the module in checkpoints and logs.
        module: the bare module, float32.
        wrapped: what the training step calls (autocast, DDP).
        optimizer: over its trainable parameters.
        learning_rate: peak value.
        ema: moving average of its weights, or None.
        optimizer_name: that of the optimizer in the table of optimizers.
    """

    name: str
    module: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    learning_rate: float
    ema: ExponentialAverage | None
    optimizer_name: str = "adamw"
    parameters: list[nn.Parameter] = field(init=False)
    frozen: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        # Noted now: a step may freeze a module for a moment, and a checkpoint must not depend on when it is written.
        self.frozen = frozenset(name for name, weight in self.module.named_parameters() if not weight.requires_grad)
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @property
    def received_gradients(self) -> bool:
        """False for a module that took no part in this step (a discriminator before its start): it does not step."""
        return any(parameter.grad is not None for parameter in self.parameters)

    def gradient_norm(self) -> Tensor:
        """L2 norm over all gradients: 0-dim tensor on the device, NaN or infinite where any gradient is."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def clip(self, max_norm: float, norm: Tensor) -> None:
        """Scales the gradients by min(1, max_norm / norm)."""
        torch.nn.utils.clip_grads_with_norm_(self.parameters, max_norm, norm)

    def step(self, learning_rate: float, nonfinite: Tensor) -> None:
        """One optimizer step, or none at all where `nonfinite` (0-dim, 0 or 1) is 1; decided on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.optimizer.defaults.get("fused"):
            setattr(self.optimizer, "found_inf", nonfinite)  # noqa: B010 (fused optimizers read it)
            self.optimizer.step()
        elif not nonfinite.item():
            self.optimizer.step()

    def update_ema(self, nonfinite: Tensor) -> None:
        """One step of the moving average, or none at all where `nonfinite` (0-dim, 0 or 1) is 1."""
        if self.ema is not None:
            self.ema.update(self.module, nonfinite)

    @torch.no_grad()
    def ema_distance(self) -> float:
        """|ema - weights| / |weights| over the trainable parameters; waits for the device."""
        averaged = dict(self.ema.module.named_parameters())
        pairs = [(averaged[name], now) for name, now in self.module.named_parameters() if name not in self.frozen]
        difference = torch._foreach_sub([pair[0] for pair in pairs], [pair[1] for pair in pairs])
        norm = torch.nn.utils.get_total_norm(difference) / torch.nn.utils.get_total_norm([pair[1] for pair in pairs])
        return norm.item()

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether all that a checkpoint takes of weights and EMA is finite; waits for the device."""
        modules = [self.module] if self.ema is None else [self.module, self.ema.module]
        tensors = [value for module in modules for value in self._learned_state(module).values() if value.numel()]
        norms = torch._foreach_norm([value for value in tensors if value.is_floating_point()], ord=math.inf)
        return bool(torch.stack(norms).isfinite().all())

    def state_dict(self) -> dict[str, Any]:
        """Learned weights and buffers, optimizer, EMA; frozen weights are not a run's to save."""
        state = {"module": self._learned_state(self.module), "optimizer": self.optimizer.state_dict()}
        return state if self.ema is None else {**state, "ema": self._learned_state(self.ema.module)}

    def save(self, directory: Path) -> None:
        """`state_dict` to NAME.pt, through a file of Python's own, whose errors say what is wrong with the disk."""
        with open(directory / f"{self.name}.pt", "wb") as file:
            torch.save(self.state_dict(), file)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Weights, moments, step counts and EMA of a checkpoint; betas and weight decay stay this run's."""
        self._load_learned_state(self.module, state["module"])
        own, saved = self.optimizer.state_dict()["param_groups"], state["optimizer"]["param_groups"]
        if len(own) != len(saved) or any(then.keys() - now.keys() for now, then in zip(own, saved, strict=True)):
            raise ValueError(
                f"The checkpoint's state of {self.name} is that of another optimizer than {self.optimizer_name}, "
                "which cannot go on from it. Resume with the --optimizer it was written with "
                "(resolved_arguments.yaml), or start from the finished weights in another output_dir."
            )
        options = [{**now, "params": then["params"]} for now, then in zip(own, saved, strict=True)]
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": options})
        if self.ema is not None:
            if "ema" not in state:
                logger.warning("The checkpoint holds no EMA of %s; the average starts from its weights.", self.name)
            self._load_learned_state(self.ema.module, state.get("ema", state["module"]))

    def _learned_state(self, module: nn.Module) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in module.state_dict().items() if name not in self.frozen}

    def _load_learned_state(self, module: nn.Module, state: dict[str, Tensor]) -> None:
        own = module.state_dict()
        wrong = [name for name in own if name in state and own[name].shape != state[name].shape]
        if wrong:
            shapes = ", ".join(f"{each} {tuple(state[each].shape)} -> {tuple(own[each].shape)}" for each in wrong[:3])
            raise ValueError(
                f"The checkpoint's {self.name} has another size than this run's ({shapes}, {len(wrong)} in all). "
                "Resume with the model it was written with (resolved_arguments.yaml), or start in another output_dir."
            )
        missing, unexpected = module.load_state_dict(state, strict=False)
        missing = [name for name in missing if name not in self.frozen]
        if missing or unexpected:
            raise ValueError(
                f"The checkpoint's {self.name} is not the module of this run: it lacks {missing[:3]} and has "
                f"{unexpected[:3]} besides. Resume with the arguments it was written with (resolved_arguments.yaml)."
            )


def check_master_weights(name: str, module: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters; raises ValueError unless there are some and all of them are float32."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError(f"{name} has no trainable parameter; unfreeze some, or use it without adding it to the run.")
    wrong = sorted({str(parameter.dtype) for parameter in trainable if parameter.dtype != torch.float32})
    if wrong:
        raise ValueError(
            f"{name} has {', '.join(wrong)} parameters, but master weights must be float32: a bfloat16 weight "
            "does not move at usual learning rates. Load it in float32 and use --mixed_precision bf16."
        )
    return trainable


def step_all(
    entries: Sequence[OptimizedModule], *, factor: float, max_grad_norm: float | None
) -> tuple[dict[str, Tensor], Tensor]:
    """Clips, steps and averages all modules, or none where any gradient is not finite; decided on the device.

    Returns:
        The norm of each one's gradients, and whether the step was skipped (0-dim, 0 or 1).
    """
    norms = {entry.name: entry.gradient_norm() for entry in entries}
    nonfinite = (~torch.isfinite(torch.stack(list(norms.values()))).all()).float()
    for entry in entries:
        if max_grad_norm is not None:
            entry.clip(max_grad_norm, norms[entry.name])
        entry.step(entry.learning_rate * factor, nonfinite)
        entry.update_ema(nonfinite)
        entry.optimizer.zero_grad(set_to_none=True)
    return norms, nonfinite


@contextmanager
def evaluating(entries: Iterable[OptimizedModule]) -> Iterator[None]:
    """Eval mode inside, and each part's own mode afterwards."""
    modules = [entry.module for entry in entries]
    modes = {part: part.training for module in modules for part in module.modules()}
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
