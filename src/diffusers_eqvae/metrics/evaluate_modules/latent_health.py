"""What `evaluate.load` finds: `modules.LatentHealth`."""

from diffusers_eqvae.metrics.evaluate_modules.modules import LatentHealth

__all__ = ["LatentHealth"]
