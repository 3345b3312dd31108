"""What the flow-matching schedulers share: the grid's bookkeeping, and the way from a timestep to a model call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from ..flow import interpolate


class FlowMatchScheduler(SchedulerMixin, ConfigMixin):
    """Not used by itself: subclasses lay the grid and take the step.

    Attributes:
        timesteps: one per model call, on the device of `set_timesteps`.
        sigma_list: the noise level of each model call, floats on the host.
        sigmas: the same and the final 0 as a tensor on the CPU.
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

    def _lay(self, sigmas: Sequence[float], device: str | torch.device | None = None) -> None:
        """Takes over a grid of noise levels, one per model call, and forgets any sampling under way."""
        self.sigma_list = list(sigmas)
        self.sigmas = torch.tensor([*self.sigma_list, 0.0])
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
