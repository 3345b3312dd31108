"""Samplers of flow matching: an ODE and an SDE, exchangeable by `from_config`."""

from .._lazy import face

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "scheduling_flow_match_ode": ["FlowMatchODEScheduler"],
        "scheduling_flow_match_sde": ["FlowMatchSDEScheduler"],
    },
)
