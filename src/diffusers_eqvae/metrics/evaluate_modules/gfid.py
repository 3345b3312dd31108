"""What `evaluate.load` finds: `modules.GFID`."""

from diffusers_eqvae.metrics.evaluate_modules.modules import GFID

__all__ = ["GFID"]
