"""What a scheduler, of this package or of diffusers, does with a model's prediction."""

from __future__ import annotations

from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin


def integrates_velocity(scheduler: SchedulerMixin) -> bool:
    """True where `step` moves along the velocity of a flow.

    Of this package's schedulers, which have a path; of those set to prediction_type "flow_prediction", or without a
    choice of prediction and without a table of noise variances (diffusers' FlowMatch* schedulers).
    """
    if "path" in scheduler.config:
        return True
    prediction_type = scheduler.config.get("prediction_type")
    if prediction_type is not None:
        return prediction_type == "flow_prediction"
    return not hasattr(scheduler, "alphas_cumprod")


def takes_variance(scheduler: SchedulerMixin) -> bool:
    """True for ancestral DDPM sampling with a learned variance; other schedulers keep the option and want only eps."""
    learned = scheduler.config.get("variance_type") in ("learned", "learned_range")
    return learned and isinstance(scheduler, DDPMScheduler)


def noise_levels(scheduler: SchedulerMixin) -> list[float]:
    """sigma in [0, 1] of every model call, after `set_timesteps`; a diffusion chain's is timestep / 1000."""
    if scheduler.config.get("use_flow_sigmas"):  # its timesteps are whole numbers
        return scheduler.sigmas[: len(scheduler.timesteps)].tolist()
    return [timestep / scheduler.config.num_train_timesteps for timestep in scheduler.timesteps.tolist()]
