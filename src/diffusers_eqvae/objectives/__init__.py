"""What each product minimises: the one wrapped forward around a model and its regularizers."""

from .._lazy import face

__getattr__, __dir__, __all__ = face(
    __name__,
    {"autoencoder": ["AutoencoderLossWeights", "AutoencoderObjective", "AutoencoderStep"]},
)
