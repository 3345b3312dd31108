"""What each product minimises: the one wrapped forward around a model and its regularizers."""

from .._lazy import face

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "base": ["OBJECTIVES", "LatentObjective", "Objective", "register_objective", "tie_idle"],
        "autoencoder": ["AutoencoderLossWeights", "AutoencoderObjective", "AutoencoderStep"],
        "denoising": ["DenoisingObjective"],
        "flow_matching": ["FlowMatchingArguments", "FlowMatchingObjective"],
        "masked_tokens": ["MaskedTokensArguments", "MaskedTokensObjective"],
    },
)
