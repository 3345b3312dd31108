"""The reverse SDE of flow matching by Euler-Maruyama or Heun, with SiT's diffusion forms and last step."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import ClassVar, Literal, get_args

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..flow import (
    DIFFUSION_FORMS,
    DiffusionForm,
    FlowPath,
    FlowPrediction,
    diffusion_coefficient,
    velocity_to_clean,
    velocity_to_score,
)
from .flow_match_base import FlowMatchScheduler

LastStep = Literal["Mean", "Tweedie", "Euler"]
SDESolver = Literal["euler_maruyama", "heun"]


class FlowMatchSDEScheduler(FlowMatchScheduler):
    """Stochastic sampling from noise (sigma = 1) to data (sigma = 0).

        euler_maruyama:  x' = x + dt f(x, sigma) + sqrt(2 w dt) noise                       one model call per step
        heun:            y  = x + sqrt(2 w dt) noise                                        two model calls per step
                         x' = y + dt / 2 (f(y, sigma) + f(y + dt f(y, sigma), sigma'))

    with f = w score - v and dt = sigma - sigma' (SiT, arXiv 2401.08740, section 2, and its code). v = d x / d sigma is
    the model's prediction (or made of it, see `prediction_type`), score = -E[noise | x] / beta, and w(sigma) any
    diffusion coefficient. Its noise does not depend on x, so both solvers have strong and weak order 1; Heun's mean
    from a given start has order 2. Of N steps, N - 1 run on a uniform grid from 1 to `last_step_size`, and one last
    step of one call, without noise, reaches 0: "Mean" is the drift alone, x + (w score - v) dt; "Tweedie" the expected
    clean data E[clean | x]; "Euler" the ODE's step x - v dt. With `last_step` None all N steps are noisy and the grid
    is 1, 1 - 1/N, ..., 0. Heun takes 2N - 1 model calls; the noise of its first step is in `init_noise_sigma`.

    Args:
        num_train_timesteps: timestep = num_train_timesteps * sigma.
        diffusion_form: "sigma" (SiT's default), "constant", "SBDM", "linear", "decreasing" or "increasing-decreasing";
            see `diffusers_eqvae.flow.diffusion_coefficient`.
        diffusion_norm: its factor, >= 0; 0 turns the forms it multiplies into the ODE.
        last_step: "Mean", "Tweedie", "Euler" or None.
        last_step_size: sigma of the last step, in (0, 1).
        path: the interpolant the model was trained on.
        prediction_type: "flow_prediction" (velocity), "epsilon", "score" or "sample".
        shift: factor s > 0 that moves the grid towards noise, s sigma / (1 + (s - 1) sigma); 1 = uniform.
        sde_solver: "euler_maruyama" or "heun", which needs a last step: its drift is infinite at sigma = 0.

    Attributes:
        timesteps: one per model call, on the device of `set_timesteps`.
        sigma_list: the noise level of each model call, floats on the host.
        sigmas: the same and the noise level it ends at as a tensor on the CPU.

    Differs from the reference: the "SBDM" form is infinite at sigma = 1, where the first step takes the value it has
    at the end of that step. Any w >= 0 leaves the distribution in place, so this is a choice, not an approximation.

    Raises:
        ValueError: an unknown form, last step, path or prediction type, or a number outside its range.
    """

    _compatibles: ClassVar[list[str]] = [
        "FlowMatchSDEScheduler",
        "FlowMatchODEScheduler",
        "FlowMatchEulerDiscreteScheduler",
    ]

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        diffusion_form: DiffusionForm = "sigma",
        diffusion_norm: float = 1.0,
        last_step: LastStep | None = "Mean",
        last_step_size: float = 0.04,
        path: FlowPath = "linear",
        prediction_type: FlowPrediction = "flow_prediction",
        shift: float = 1.0,
        sde_solver: SDESolver = "euler_maruyama",
    ) -> None:
        self._check_config(
            diffusion_form=(diffusion_form, DIFFUSION_FORMS),
            last_step=(last_step, (*get_args(LastStep), None)),
            sde_solver=(sde_solver, get_args(SDESolver)),
        )
        if sde_solver == "heun" and last_step is None:
            raise ValueError(
                "sde_solver='heun' needs a last step (Mean, Tweedie or Euler): its drift is infinite at sigma = 0."
            )
        if not (diffusion_norm >= 0.0 and math.isfinite(diffusion_norm)):
            raise ValueError(f"diffusion_norm must be finite and >= 0; got {diffusion_norm}.")
        if not 0.0 < last_step_size < 1.0:
            raise ValueError(f"last_step_size is a noise level and must lie in (0, 1); got {last_step_size}.")
        self._predictor: tuple[Tensor, Tensor] | None = None
        self._forget()

    @property
    def order(self) -> int:
        """Model calls per step, but for the last one."""
        return 2 if self.config.sde_solver == "heun" else 1

    @property
    def init_noise_sigma(self) -> float:  # type: ignore[override]
        """Standard deviation to begin with: 1, and of Heun's first step that of its noise besides."""
        if self.order == 1 or not self.sigma_list:
            return 1.0
        return math.sqrt(1.0 + self._noise_scale(0) ** 2)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Starts at a later model call (image-to-image); Heun, whose noise comes before a step, does not."""
        if begin_index and self.order == 2:
            raise ValueError("sde_solver='heun' begins with a step's noise, so at index 0; use euler_maruyama.")
        super().set_begin_index(begin_index)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Prepares N = `num_inference_steps` steps and forgets any sampling under way.

        Raises:
            ValueError: fewer than one step, or than two where there is a separate last one.
        """
        fewest = 1 if self.config.last_step is None else 2
        if num_inference_steps < fewest:
            raise ValueError(
                f"num_inference_steps must be at least {fewest} for last_step={self.config.last_step!r}; "
                f"got {num_inference_steps}."
            )
        n = self.num_inference_steps = num_inference_steps
        if self.config.last_step is None:
            *grid, end = self._grid(n)
            self._lay(grid, device, end=end)
            return
        grid = self._grid(n - 1, lowest=self.config.last_step_size)
        calls = [sigma for pair in pairwise(grid) for sigma in pair] if self.order == 2 else grid[:-1]
        self._lay([*calls, grid[-1]], device)
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
            generator: of the noise; a list of B makes each sample independent of the rest of its batch.

        Raises:
            ValueError: before `set_timesteps`, after the last step, at a timestep that is not on the grid, or with a
                list of other than B generators.
        """
        if isinstance(generator, list) and len(generator) != len(sample):
            raise ValueError(f"A list of generators needs one per sample, {len(sample)}; got {len(generator)}.")
        index = self._advance(timestep)
        dtype = torch.promote_types(sample.dtype, torch.float32)
        x, sigma = sample.to(dtype), self.sigma_list[index]
        velocity = self._velocity(model_output.to(dtype), x, sigma)
        is_last = index == len(self.sigma_list) - 1
        dt = sigma - (self._end if is_last else self.sigma_list[index + 1])
        if is_last and self.config.last_step == "Tweedie":
            previous = velocity_to_clean(velocity, x, sigma, self.config.path)
        elif is_last and self.config.last_step == "Euler":
            previous = x - dt * velocity
        elif self.order == 2 and not is_last:
            previous = self._heun(index, x, velocity)
            if index % 2 and index + 2 < len(self.sigma_list):
                previous = previous + self._noise_scale(index + 1) * self._noise(x, generator)
        else:
            previous = x + dt * self._drift(velocity, x, sigma, sigma - dt)
            if not (is_last and self.config.last_step == "Mean"):
                previous = previous + self._noise_scale(index) * self._noise(x, generator)
        previous = previous.to(sample.dtype)
        return SchedulerOutput(prev_sample=previous) if return_dict else (previous,)

    def _heun(self, index: int, x: Tensor, velocity: Tensor) -> Tensor:
        """The first call of a step gives the point of the second, and that the step's end; without noise."""
        sigma = self.sigma_list[index]
        other = self.sigma_list[index + 1 if index % 2 == 0 else index - 1]
        drift = self._drift(velocity, x, sigma, other)
        if index % 2 == 0:
            self._predictor = (x, drift)
            return x + (sigma - other) * drift
        assert self._predictor is not None
        (start, first), self._predictor = self._predictor, None
        return start + 0.5 * (other - sigma) * (first + drift)

    def _drift(self, velocity: Tensor, x: Tensor, sigma: float, next_sigma: float) -> Tensor:
        w = self._diffusion(sigma, next_sigma)
        return w * velocity_to_score(velocity, x, sigma, self.config.path) - velocity

    def _noise_scale(self, index: int) -> float:
        """Standard deviation of the noise of the step that begins at this model call."""
        sigma, following = [*self.sigma_list, self._end][index : index + 2]
        return math.sqrt(2.0 * self._diffusion(sigma, following) * (sigma - following))

    def _noise(self, x: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
        return randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)

    def _diffusion(self, sigma: float, next_sigma: float) -> float:
        is_infinite = self.config.diffusion_form == "SBDM" and sigma == 1.0
        return diffusion_coefficient(
            next_sigma if is_infinite else sigma,
            self.config.diffusion_form,
            norm=self.config.diffusion_norm,
            path=self.config.path,
        )
