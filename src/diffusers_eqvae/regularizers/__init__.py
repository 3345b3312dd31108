"""Methods that make a latent space easier to generate; `--regularizers NAME ...` composes them."""

from .._lazy import face, registered

__getattr__, __dir__, __all__ = face(
    __name__,
    registered(__path__[0])
    | {
        "base": [
            "REGULARIZERS",
            "AutoencoderRegularizer",
            "AutoencoderState",
            "GeneratorRegularizer",
            "GeneratorState",
            "Regularizer",
            "build_regularizers",
            "register_regularizer",
            "require_compatible",
            "require_reach",
        ],
    },
)
