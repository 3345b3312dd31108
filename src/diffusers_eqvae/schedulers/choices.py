"""Samplers by name, for what a saved scheduler says the model was trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .capabilities import integrates_velocity
from .scheduling_flow_match_adaptive import FlowMatchAdaptiveScheduler
from .scheduling_flow_match_ode import FlowMatchODEScheduler
from .scheduling_flow_match_sde import FlowMatchSDEScheduler
from .scheduling_maskgit import MaskGITScheduler

SDE_OPTIONS = ("diffusion_form", "diffusion_norm", "last_step", "last_step_size")
ADAPTIVE_OPTIONS = ("atol", "rtol")
OPTIONS = ("shift", *SDE_OPTIONS, *ADAPTIVE_OPTIONS)


def choose_scheduler(name: str, saved: SchedulerMixin, **options: Any) -> SchedulerMixin:
    """The sampler `name` for the model that `saved` samples.

    | name        | flow                                  | diffusion                                   |
    |-------------|---------------------------------------|---------------------------------------------|
    | saved       | `saved` itself                        | `saved` itself                              |
    | euler, heun | ODE of order 1, 2                     |                                             |
    | dopri5      | ODE of order 5, steps per sample      |                                             |
    | sde         | reverse SDE, Euler-Maruyama           |                                             |
    | sde_heun    | reverse SDE, Heun, 2N - 1 model calls |                                             |
    | ddpm        |                                       | ancestral, N steps from first to last (ADM) |
    | ddim        |                                       | deterministic, every (1000 // N)-th step    |
    | dpmsolver++ | diffusers' DPM-Solver++ of order 2    | the same                                    |
    | unipc       | diffusers' UniPC of order 2           | the same                                    |

    Args:
        name: one of `SAMPLERS`.
        saved: a pipeline's scheduler.
        options: over the saved ones. Of sde and sde_heun diffusion_form, diffusion_norm, last_step and last_step_size;
            of dopri5 atol and rtol; of any other flow sampler, and these two, `shift`.

    Raises:
        ValueError: an unknown name, a sampler of the other kind of model, one that does not know the model's path or
            prediction, or an option that it does not have.

    Example:
        >>> pipeline.scheduler = choose_scheduler("sde", pipeline.scheduler, diffusion_form="constant")
    """
    if name not in SAMPLERS:
        raise ValueError(f"The sampler must be one of {', '.join(SAMPLERS)}; got {name!r}.")
    flow = integrates_velocity(saved)
    kind, makers = ("flow-matching", _FLOW) if flow else ("diffusion", _DIFFUSION)
    if isinstance(saved, MaskGITScheduler):
        kind, makers = "masked-token", {}
    if name != "saved" and name not in makers:
        raise ValueError(
            f"The sampler {name} does not sample a {kind} model; it is sampled by {', '.join(['saved', *makers])}."
        )
    of_sde = ("shift", *SDE_OPTIONS)
    by_name = {"sde": of_sde, "sde_heun": of_sde, "dopri5": ADAPTIVE_OPTIONS}
    known = by_name.get(name, ("shift",) if flow else ())
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ValueError(f"The sampler {name} of this model has no {unknown[0]}; it has {', '.join(known) or 'none'}.")
    if name == "saved":
        return type(saved).from_config(saved.config, **options) if options else saved
    return makers[name](saved.config, options)


def _flow_solver(cls: Any) -> Callable[[Mapping[str, Any], dict[str, Any]], SchedulerMixin]:
    """One of diffusers' multistep solvers; they know the linear path and the velocity alone."""

    def make(config: Mapping[str, Any], options: dict[str, Any]) -> SchedulerMixin:
        path, prediction = config.get("path", "linear"), config.get("prediction_type", "flow_prediction")
        if (path, prediction) != ("linear", "flow_prediction"):
            raise ValueError(
                f"{cls.__name__} samples a velocity on the linear path alone; this model predicts {prediction} on the "
                f"{path} path. Use euler, heun or sde."
            )
        return cls(
            num_train_timesteps=config["num_train_timesteps"],
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=options.get("shift", config.get("shift", 1.0)),
        )

    return make


_FLOW: dict[str, Callable[[Mapping[str, Any], dict[str, Any]], SchedulerMixin]] = {
    "euler": lambda config, options: FlowMatchODEScheduler.from_config(config, solver="euler", **options),
    "heun": lambda config, options: FlowMatchODEScheduler.from_config(config, solver="heun", **options),
    "dopri5": lambda config, options: FlowMatchAdaptiveScheduler.from_config(config, **options),
    "sde": lambda config, options: FlowMatchSDEScheduler.from_config(config, sde_solver="euler_maruyama", **options),
    "sde_heun": lambda config, options: FlowMatchSDEScheduler.from_config(config, sde_solver="heun", **options),
    "dpmsolver++": _flow_solver(DPMSolverMultistepScheduler),
    "unipc": _flow_solver(UniPCMultistepScheduler),
}
_DIFFUSION: dict[str, Callable[[Mapping[str, Any], dict[str, Any]], SchedulerMixin]] = {
    "ddpm": lambda config, options: DDPMScheduler.from_config(config, timestep_spacing="linspace"),
    # As in ADM; the last step ends at the data itself.
    "ddim": lambda config, options: DDIMScheduler.from_config(
        config, timestep_spacing="leading", set_alpha_to_one=True
    ),
    # A learned variance is dropped before the step; told of one, this solver would cut the latents to 3 channels.
    "dpmsolver++": lambda config, options: DPMSolverMultistepScheduler.from_config(
        config, timestep_spacing="linspace", variance_type=None
    ),
    "unipc": lambda config, options: UniPCMultistepScheduler.from_config(config, timestep_spacing="linspace"),
}
SAMPLERS = tuple(dict.fromkeys(["saved", *_FLOW, *_DIFFUSION]))
