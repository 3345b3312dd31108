"""What `evaluate.load` finds: `modules.EquivarianceError`."""

from diffusers_eqvae.metrics.evaluate_modules.modules import EquivarianceError

__all__ = ["EquivarianceError"]
