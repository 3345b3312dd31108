"""Losses: functions of tensors, and LPIPS with a gradient."""

from .._lazy import face

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "adversarial": ["adaptive_weight", "discriminator_loss", "generator_loss"],
        "alignment": ["alignment_loss"],
        "diffusion": ["flow_matching_loss"],
        "masked_tokens": ["mask_probability", "masked_token_loss"],
        "perceptual": ["LPIPS"],
        "reconstruction": ["kl_loss", "reconstruction_loss"],
    },
)
