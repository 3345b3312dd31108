"""The probability-flow ODE of flow matching by dopri5, each sample with step sizes of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from ..flow import FlowPath, FlowPrediction, sigma_interval
from .flow_match_base import FlowMatchScheduler

MAX_STEPS = 10_000


class FlowMatchAdaptiveScheduler(FlowMatchScheduler):
    """d x / d sigma = velocity from sigma = 1 to 0 by Dormand and Prince's method of order 5(4).

    A step is as long as the estimated error, against `atol + rtol |x|`, allows for that sample: a sample does not
    depend on its batch. The number of model calls is the ODE's choice; a pipeline reports it as `nfe`, of the sample
    that needs most. SiT evaluates its ODE figures so, with these tolerances (arXiv 2401.08740).

    Args:
        num_train_timesteps: timestep = num_train_timesteps * sigma.
        atol, rtol: absolute and relative tolerance of one step, root mean square over a sample.
        path: the interpolant, for predictions other than the velocity.
        prediction_type: "flow_prediction" (velocity), "epsilon", "score" or "sample".

    Differs from the reference: there torchdiffeq chooses one step size for a whole batch.

    Raises:
        ValueError: a tolerance that is not positive, an unknown path or prediction type.

    Example:
        >>> scheduler = FlowMatchAdaptiveScheduler(rtol=1e-4)
        >>> latents = scheduler.integrate(lambda x, sigmas: model(x, 1000 * sigmas, labels).sample, noise)
    """

    _compatibles: ClassVar[list[str]] = [
        "FlowMatchAdaptiveScheduler",
        "FlowMatchODEScheduler",
        "FlowMatchSDEScheduler",
    ]

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        atol: float = 1e-6,
        rtol: float = 1e-3,
        path: FlowPath = "linear",
        prediction_type: FlowPrediction = "flow_prediction",
    ) -> None:
        self._check_config()
        if not (atol > 0 and rtol > 0):
            raise ValueError(f"atol and rtol are tolerances and must be positive; got {atol} and {rtol}.")
        self._forget()

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """One entry, the whole way; the number of steps is not asked for but found by `integrate`."""
        _, high = sigma_interval(self.config.path, self.config.prediction_type)
        self.num_inference_steps = 1
        self._lay([high], device)

    def step(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, **options: Any) -> NoReturn:
        """Refused: the solver calls the model as often as it needs; see `integrate`."""
        raise ValueError("FlowMatchAdaptiveScheduler finds its own steps: call integrate, or take another scheduler.")

    def integrate(self, predict: Callable[[Tensor, Tensor], Tensor], sample: Tensor) -> Tensor:
        """The data (B, C, h, w) that the noise `sample` flows to, in its dtype; computed in float32 or better.

        Args:
            predict: (x (B, C, h, w), noise levels (B,)) -> prediction (B, C, h, w).

        Raises:
            ImportError: torchode is not installed.
            ValueError: a solution that is not finite, or takes more than 10 000 steps.
        """
        torchode = _torchode()
        low, high = sigma_interval(self.config.path, self.config.prediction_type)
        dtype = torch.promote_types(sample.dtype, torch.float32)

        def slope(way: Tensor, flat: Tensor) -> Tensor:  # the solver goes forward: sigma = high - way
            x, sigmas = flat.view(sample.shape), high - way
            return -self._velocity(predict(x, sigmas).to(dtype), x, sigmas).flatten(1)

        term = torchode.ODETerm(slope)
        controller = torchode.IntegralController(atol=self.config.atol, rtol=self.config.rtol, term=term)
        solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term=term), controller, max_steps=MAX_STEPS)
        ends = torch.tensor([0.0, high - low], dtype=dtype, device=sample.device).expand(len(sample), 2)
        problem = torchode.InitialValueProblem(y0=sample.flatten(1).to(dtype), t_eval=ends)
        solution = solver.solve(problem)
        if bool((solution.status != torchode.Status.SUCCESS.value).any()):
            raise ValueError(
                "dopri5 did not come to an end: the velocity is not finite, or varies too fast for the tolerances. "
                "Check the transformer's weights and dtype, raise rtol, or sample by euler or heun."
            )
        return solution.ys[:, -1].view(sample.shape).to(sample.dtype)


def _torchode() -> Any:
    try:
        import torchode
    except ImportError as error:
        raise ImportError("dopri5 needs torchode: pip install 'diffusers_eqvae[ode]'.") from error
    return torchode
