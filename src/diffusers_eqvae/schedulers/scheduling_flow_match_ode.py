"""The probability-flow ODE of flow matching, dx / d sigma = velocity, by Euler or Heun on a uniform grid."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar, Literal, get_args

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ..flow import FlowPath, FlowPrediction
from .flow_match_base import FlowMatchScheduler

Solver = Literal["euler", "heun"]


class FlowMatchODEScheduler(FlowMatchScheduler):
    """Deterministic sampling from noise (sigma = 1) to data (sigma = 0): N steps mean N steps.

        euler:  x' = x + dsigma * v(x, sigma)                                                one model call per step
        heun:   x' = x + dsigma / 2 * (v(x, sigma) + v(x + dsigma * v(x, sigma), sigma'))    two model calls per step

    on sigma = 1, 1 - 1/N, ..., 1/N, 0 (SiT, arXiv 2401.08740, section 3). The model predicts the velocity
    d x / d sigma (noise - clean on the linear path), or what `prediction_type` says; the grid then keeps inside
    `flow.sigma_interval`.

    Args:
        num_train_timesteps: timestep = num_train_timesteps * sigma.
        solver: "euler" (order 1) or "heun" (order 2).
        path: how `scale_noise` mixes data and noise, and how other predictions become velocities; of velocities the
            ODE is the same for every path.
        prediction_type: "flow_prediction" (velocity), "epsilon", "score" or "sample".
        shift: factor s > 0 that moves the grid towards noise, s sigma / (1 + (s - 1) sigma); 1 = uniform.

    Attributes:
        timesteps: one per model call, on the device of `set_timesteps`: N for Euler, 2N for Heun.
        sigma_list: the noise level of each model call, floats on the host.
        sigmas: the same and the noise level it ends at as a tensor on the CPU.

    Differs from the reference: SiT's fixed-step solvers take N - 1 steps for N. diffusers' default flow grid ends at
    .001 before 0; this one equals `FlowMatchEulerDiscreteScheduler` with sigmas = linspace(1, 1/N, N). REPA's Heun
    guides the second call of a step by the noise level of the first, and its last step is Euler's (2N - 1 calls); here
    every call is guided by its own level, and every step is Heun's (2N calls), the last one's second at sigma = 0.

    Raises:
        ValueError: an unknown solver, path or prediction type, num_train_timesteps < 1, or shift <= 0.
    """

    _compatibles: ClassVar[list[str]] = [
        "FlowMatchODEScheduler",
        "FlowMatchSDEScheduler",
        "FlowMatchEulerDiscreteScheduler",
    ]

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        solver: Solver = "euler",
        path: FlowPath = "linear",
        prediction_type: FlowPrediction = "flow_prediction",
        shift: float = 1.0,
    ) -> None:
        self._check_config(solver=(solver, get_args(Solver)))
        self._predictor: tuple[Tensor, Tensor] | None = None
        self._forget()

    @property
    def order(self) -> int:
        """Model calls per step."""
        return 2 if self.config.solver == "heun" else 1

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Prepares N = `num_inference_steps` steps and forgets any sampling under way.

        Raises:
            ValueError: fewer than one step.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1; got {num_inference_steps}.")
        n = self.num_inference_steps = num_inference_steps
        grid = self._grid(n)
        uniform = self.config.shift == 1.0  # all steps bit for bit alike
        self._step_sizes = [(grid[-1] - grid[0]) / n if uniform else after - now for now, after in pairwise(grid)]
        heun = self.config.solver == "heun"
        calls = [sigma for pair in pairwise(grid) for sigma in pair] if heun else grid[:-1]
        self._lay(calls, device, end=grid[-1])
        self._predictor = None

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
            model_output: the prediction at `sample` and `timestep`, (B, C, h, w).
            timestep: the entry of `timesteps` that the model was called with.
            sample: (B, C, h, w); its dtype is kept, the arithmetic is float32 or better.
            generator: taken for the sake of the SDE scheduler's callers; nothing here is random.

        Raises:
            ValueError: before `set_timesteps`, after the last step, or at a timestep that is not on the grid.
        """
        index = self._advance(timestep)
        dtype = torch.promote_types(sample.dtype, torch.float32)
        x = sample.to(dtype)
        velocity = self._velocity(model_output.to(dtype), x, self.sigma_list[index])
        dsigma = self._step_sizes[index // self.order]
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
