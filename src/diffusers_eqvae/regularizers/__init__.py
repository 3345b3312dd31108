"""Methods that make a latent space easier to generate; `--regularizers NAME ...` composes them."""

from .._lazy import face

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "base": [
            "REGULARIZERS",
            "AutoencoderRegularizer",
            "AutoencoderState",
            "GeneratorRegularizer",
            "GeneratorState",
            "Regularizer",
            "build_regularizers",
            "register_regularizer",
        ],
        "alignment": ["AlignmentRegularizer"],
        "contrastive_flow": ["ContrastiveFlowRegularizer"],
        "equivariance": ["EquivarianceDraw", "EquivarianceRegularizer"],
        "repa": ["REPARegularizer"],
        "vae_repa": ["VAEREPARegularizer"],
        "velocity_direction": ["VelocityDirectionRegularizer"],
    },
)
