"""The probability-flow ODE of flow matching, dx / d sigma = velocity, by Euler or Heun on a uniform grid."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar, Literal, get_args

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from ..flow import PATHS, FlowPath, interpolate

Solver = Literal["euler", "heun"]


class FlowMatchODEScheduler(SchedulerMixin, ConfigMixin):
    """Deterministic sampling from noise (sigma = 1) to data (sigma = 0): N steps mean N steps.

        euler:  x' = x + dsigma * v(x, sigma)                                                one model call per step
        heun:   x' = x + dsigma / 2 * (v(x, sigma) + v(x + dsigma * v(x, sigma), sigma'))    two model calls per step

    on sigma = 1, 1 - 1/N, ..., 1/N, 0 (SiT, arXiv 2401.08740, section 3). The model predicts the velocity
    d x / d sigma (noise - clean on the linear path).

    Args:
        num_train_timesteps: timestep = num_train_timesteps * sigma.
        solver: "euler" (order 1) or "heun" (order 2).
        path: how `scale_noise` mixes data and noise, and what the SDE scheduler needs to know when it takes over this
            config; the ODE itself is the same for every path.

    Attributes:
        timesteps: one per model call, on the device of `set_timesteps`: N for Euler, 2N for Heun.
        sigma_list: the noise level of each model call, floats on the host.
        sigmas: the same and the final 0 as a tensor on the CPU.

    Differs from the reference: SiT's fixed-step solvers take N - 1 steps for N. diffusers' default flow grid ends at
    .001 before 0; this one equals `FlowMatchEulerDiscreteScheduler` with sigmas = linspace(1, 1/N, N).

    Raises:
        ValueError: an unknown solver or path, or num_train_timesteps < 1.
    """

    _compatibles: ClassVar[list[str]] = [
        "FlowMatchODEScheduler",
        "FlowMatchSDEScheduler",
        "FlowMatchEulerDiscreteScheduler",
    ]
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, solver: Solver = "euler", path: FlowPath = "linear") -> None:
        for name, value, choices in (("solver", solver, get_args(Solver)), ("path", path, PATHS)):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")
        if num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps must be at least 1; got {num_train_timesteps}.")
        self.num_inference_steps: int | None = None
        self.sigma_list: list[float] = []
        self.sigmas = torch.empty(0)
        self.timesteps = torch.empty(0)
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._predictor: tuple[Tensor, Tensor] | None = None

    @property
    def order(self) -> int:
        """Model calls per step."""
        return 2 if self.config.solver == "heun" else 1

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
            ValueError: an odd index for Heun, whose steps begin at the even ones.
        """
        if begin_index % self.order:
            raise ValueError(f"A step of {self.order} model calls cannot begin at the odd index {begin_index}.")
        self._begin_index = begin_index

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Prepares N = `num_inference_steps` steps and forgets any sampling under way.

        Raises:
            ValueError: fewer than one step.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1; got {num_inference_steps}.")
        n = self.num_inference_steps = num_inference_steps
        grid = [(n - i) / n for i in range(n + 1)]
        if self.config.solver == "heun":
            self.sigma_list = [sigma for pair in pairwise(grid) for sigma in pair]
        else:
            self.sigma_list = grid[:-1]
        self.sigmas = torch.tensor([*self.sigma_list, 0.0])
        self.timesteps = torch.tensor([self.config.num_train_timesteps * s for s in self.sigma_list]).to(device)
        self._step_index = self._begin_index = self._predictor = None

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The sample as it is: flow matching does not rescale the model's input."""
        return sample

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """x_sigma of clean data `sample`, at timestep = num_train_timesteps * sigma, a number or (B,)."""
        return interpolate(sample, noise, timestep / self.config.num_train_timesteps, self.config.path)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Takes in one model call and gives the sample that the next one sees.

        Args:
            model_output: the velocity at `sample` and `timestep`, (B, C, h, w).
            timestep: the entry of `timesteps` that the model was called with.
            sample: (B, C, h, w); its dtype is kept, the arithmetic is float32 or better.
            generator: taken for the sake of the SDE scheduler's callers; nothing here is random.

        Raises:
            ValueError: before `set_timesteps`, after the last step, or at a timestep that is not on the grid.
        """
        index = self._advance(timestep)
        dtype = torch.promote_types(sample.dtype, torch.float32)
        velocity, x = model_output.to(dtype), sample.to(dtype)
        assert self.num_inference_steps is not None
        dsigma = -1.0 / self.num_inference_steps
        if index % self.order == 0:
            self._predictor = (x, velocity) if self.order == 2 else None
            previous = x + dsigma * velocity
        else:
            assert self._predictor is not None
            start, first_velocity = self._predictor
            self._predictor = None
            previous = start + 0.5 * dsigma * (first_velocity + velocity)
        previous = previous.to(sample.dtype)
        return SchedulerOutput(prev_sample=previous) if return_dict else (previous,)

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

    def __len__(self) -> int:
        return self.config.num_train_timesteps
