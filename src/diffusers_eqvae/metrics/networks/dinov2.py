"""DINOv2's global feature, which FD-DINOv2 compares."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

from ...models.feature_teacher import load_vision_model
from ..feature_networks import ModuleFeatures, register_feature_network

LARGE = "facebook/dinov2-large"


@register_feature_network("dinov2")
class DINOv2Features(ModuleFeatures):
    """DINOv2's global feature through transformers: FD-DINOv2 (Stein et al., arXiv 2306.04675) with the large model.

    Differs from the reference: images are resized as floats, without rounding to 8 bits in between.

    Example:
        >>> DINOv2Features.from_file("facebook/dinov2-large").name
        'dinov2-large'
    """

    @classmethod
    def from_file(cls, weights: str | os.PathLike[str] | None, *, image_size: int = 224) -> Self:
        """Of a directory or Hub name; None is the large model."""
        name = LARGE if weights is None else weights
        model = load_vision_model(name)
        config: Any = model.config
        if config.model_type not in ("dinov2", "dinov2_with_registers"):
            raise ValueError(f"FD-DINOv2 needs a DINOv2 model; {name} is of type {config.model_type!r}.")
        if image_size % config.patch_size:
            raise ValueError(f"image_size must be a multiple of the patch size {config.patch_size}; got {image_size}.")
        return cls(
            model,
            name=Path(name).name,
            image_size=image_size,
            select=lambda output: output.last_hidden_state[:, 0],
        )
