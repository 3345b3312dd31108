"""The health card of an autoencoder: are its latents easy to generate?"""

from .._lazy import face

__getattr__, __dir__, __all__ = face(
    __name__,
    {"health": ["Inspection", "Verdict", "inspect_autoencoder"], "run": ["run_inspection"]},
)
