"""What the flow-matching schedulers share: the grid's bookkeeping, and the way from a timestep to a model call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from ..flow import FLOW_PREDICTIONS, PATHS, interpolate, shift_sigma, sigma_interval, to_velocity


class FlowMatchScheduler(SchedulerMixin, ConfigMixin):
    """Not used by itself: subclasses lay the grid and take the step.

    Every one has in its config: `num_train_timesteps`; `path`; `prediction_type`, what the network says (a velocity,
    "epsilon", "score" or "sample", turned into the velocity before the step); and `shift`, which moves its grid
    towards noise (`flow.shift_sigma`).

    Attributes:
        timesteps: one per model call, on the device of `set_timesteps`.
        sigma_list: the noise level of each model call, floats on the host.
        sigmas: the same and the noise level it ends at as a tensor on the CPU.
    """

    init_noise_sigma = 1.0
    num_inference_steps: int | None
    _step_index: int | None
    _begin_index: int | None

    @property
    def order(self) -> int:
        """Model calls per step."""
        return 1

    @property
    def step_index(self) -> int | None:
        """Index into `timesteps` of the model call that `step` takes in next; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index into `timesteps` of the first model call where a pipeline set one."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Starts at a later model call (image-to-image).

        Raises:
            ValueError: an index at which no step begins.
        """
        if begin_index % self.order:
            raise ValueError(f"A step of {self.order} model calls cannot begin at the odd index {begin_index}.")
        self._begin_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The sample as it is: flow matching does not rescale the model's input."""
        return sample

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """x_sigma of clean data `sample`, at timestep = num_train_timesteps * sigma, a number or (B,)."""
        return interpolate(sample, noise, timestep / self.config.num_train_timesteps, self.config.path)

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """Where in `timesteps` a step begins with `timestep`.

        Raises:
            ValueError: nowhere.
        """
        matches = (self.timesteps == timestep).nonzero().flatten().tolist()
        beginnings = [index for index in matches if index % self.order == 0]
        if not beginnings:
            raise ValueError(f"No step begins at timestep {float(timestep)}; take it from scheduler.timesteps.")
        return beginnings[0]

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def _forget(self) -> None:
        """The state before `set_timesteps`."""
        self.num_inference_steps = None
        self._lay(())

    def _check_config(self, **choices: tuple[Any, Sequence[Any]]) -> None:
        """Refuses what no scheduler of this family takes, and values outside `choices`: name -> (value, allowed)."""
        config = self.config
        shared = {"path": (config.path, PATHS), "prediction_type": (config.prediction_type, FLOW_PREDICTIONS)}
        for name, (value, allowed) in {**choices, **shared}.items():
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}.")
        if config.num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps must be at least 1; got {config.num_train_timesteps}.")
        if not 0.0 < config.get("shift", 1.0) < math.inf:
            raise ValueError(f"shift is a factor and must be positive; got {config.shift}.")

    def _grid(self, steps: int, *, lowest: float | None = None) -> list[float]:
        """steps + 1 noise levels from the highest to the lowest, shifted towards noise."""
        low, high = sigma_interval(self.config.path, self.config.prediction_type)
        low = low if lowest is None else lowest
        if self.config.shift == 1.0:
            return [low + (high - low) * k / steps for k in range(steps, -1, -1)]
        return [low + (high - low) * shift_sigma(k / steps, self.config.shift) for k in range(steps, -1, -1)]

    def _velocity(self, model_output: Tensor, x: Tensor, sigma: float | Tensor) -> Tensor:
        """d x / d sigma of what the network predicts at noise level `sigma`, one or (B,)."""
        config = self.config
        return to_velocity(model_output, x, sigma, prediction_type=config.prediction_type, path=config.path)

    def _lay(self, sigmas: Sequence[float], device: str | torch.device | None = None, *, end: float = 0.0) -> None:
        """Takes over a grid of noise levels, one per model call, and forgets any sampling under way."""
        self.sigma_list, self._end = list(sigmas), end
        self.sigmas = torch.tensor([*self.sigma_list, end])
        self.timesteps = torch.tensor([self.config.num_train_timesteps * s for s in self.sigma_list]).to(device)
        self._step_index = self._begin_index = None

    def _advance(self, timestep: float | Tensor) -> int:
        """The index of this model call; looked up for the first one, counted from there on."""
        if self.num_inference_steps is None:
            raise ValueError("The number of steps is not set; call set_timesteps before step.")
        if self._step_index is None:
            begin = self._begin_index
            self._step_index = self.index_for_timestep(timestep) if begin is None else begin
        if self._step_index >= len(self.sigma_list):
            raise ValueError(
                f"All {self.num_inference_steps} steps have been taken; call set_timesteps to sample again."
            )
        self._step_index += 1
        return self._step_index - 1
