"""The health card of an autoencoder: what its latents are like, property by property."""

from .._lazy import face

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "health": ["Finding", "Inspection", "inspect_autoencoder"],
        "latent_edits": ["EditedLatents", "LatentEdit", "edit_latents"],
        "run": ["run_inspection"],
    },
)
