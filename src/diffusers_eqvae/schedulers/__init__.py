"""Samplers: an ODE and an SDE of flow matching, exchangeable by `from_config`; MaskGIT's; diffusers' own by name."""

from .._lazy import face

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "choices": ["SAMPLERS", "choose_scheduler"],
        "scheduling_flow_match_adaptive": ["FlowMatchAdaptiveScheduler"],
        "scheduling_flow_match_ode": ["FlowMatchODEScheduler"],
        "scheduling_flow_match_sde": ["FlowMatchSDEScheduler"],
        "scheduling_maskgit": ["MaskGITScheduler"],
    },
)
