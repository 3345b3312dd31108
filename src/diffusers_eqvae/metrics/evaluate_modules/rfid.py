"""What `evaluate.load` finds: `modules.RFID`."""

from diffusers_eqvae.metrics.evaluate_modules.modules import RFID

__all__ = ["RFID"]
