"""The alignment network of ReaLS: from latent cells to the features of a vision foundation model."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers import ConfigMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from .component import ComponentMixin


@dataclass
class AlignmentOutput(BaseOutput):
    """Predicted features: `patch` (B, D, h, w) of every latent cell, `cls` (B, D) of the image or None."""

    patch: Tensor
    cls: Tensor | None = None


class AlignmentNetwork(ComponentMixin, ConfigMixin):
    """Predicts a teacher's patch and global features from raw latents (ReaLS, arXiv 2502.00359, section 3).

    patch = W3 silu(W2 silu(W1 z)) per latent cell; cls = W4 mean_cells(silu(W2 silu(W1 z))).

    ReaLS says "MLP" and no more: depth, activation and the head of the global feature are this package's choice.
    Cells do not see each other, so what the network finds in a cell is in that cell's latent.

    Args:
        latent_channels: C of the autoencoder.
        hidden_size: width of both hidden layers.
        feature_size: D of the teacher: 768 for DINOv2-B, 1024 for DINOv2-L.
        global_feature: whether to predict the global (CLS) feature too.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 4,
        hidden_size: int = 2048,
        feature_size: int = 1024,
        global_feature: bool = True,
    ):
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Linear(latent_channels, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size), nn.SiLU()
        )
        self.patch_head = nn.Linear(hidden_size, feature_size)
        self.cls_head = nn.Linear(hidden_size, feature_size) if global_feature else None

    def forward(self, latents: Tensor) -> AlignmentOutput:
        """Features of raw (sampled, not normalised) latents (B, C, h, w).

        Raises:
            ValueError: on latents of another channel count.
        """
        if latents.ndim != 4 or latents.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"The alignment network reads latents (B, {self.config.latent_channels}, h, w); got "
                f"{tuple(latents.shape)}. Build it with latent_channels of the autoencoder."
            )
        hidden = self.hidden(latents.movedim(1, -1))
        patch = self.patch_head(hidden).movedim(-1, 1)
        return AlignmentOutput(patch, None if self.cls_head is None else self.cls_head(hidden.mean((1, 2))))
