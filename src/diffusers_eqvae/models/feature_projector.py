"""From a transformer's hidden states to features of the images: the head that REPA trains along."""

from __future__ import annotations

from typing import Literal

from diffusers import ConfigMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from .component import ComponentMixin


class FeatureProjector(ComponentMixin, ConfigMixin):
    """(B, N, D) hidden states of an h x w grid of tokens -> (B, F, h, w) features.

        mlp:   Linear(D, P) SiLU Linear(P, P) SiLU Linear(P, F) at every token      REPA, arXiv 2410.06940
        conv:  one 3x3 convolution D -> F, padding 1, which sees neighbours         iREPA, arXiv 2512.10794

    It serves training alone and is saved as a component of its own.

    Args:
        hidden_size: D of the transformer.
        feature_size: F.
        kind: "mlp" or "conv".
        projector_size: P of the mlp.

    Example:
        >>> projector = FeatureProjector(hidden_size=384, feature_size=768)
        >>> projector(torch.zeros(2, 256, 384), grid=(16, 16)).shape
        torch.Size([2, 768, 16, 16])
    """

    @register_to_config
    def __init__(
        self,
        hidden_size: int = 1152,
        feature_size: int = 768,
        kind: Literal["mlp", "conv"] = "mlp",
        projector_size: int = 2048,
    ) -> None:
        super().__init__()
        if kind == "conv":
            self.layers = nn.Sequential(nn.Conv2d(hidden_size, feature_size, kernel_size=3, padding=1))
        elif kind == "mlp":
            self.layers = nn.Sequential(
                nn.Linear(hidden_size, projector_size),
                nn.SiLU(),
                nn.Linear(projector_size, projector_size),
                nn.SiLU(),
                nn.Linear(projector_size, feature_size),
            )
        else:
            raise ValueError(f"The kind of a projector must be mlp or conv; got {kind!r}.")

    def forward(self, hidden_states: Tensor, *, grid: tuple[int, int]) -> Tensor:
        """Features (B, F, h, w) of hidden states (B, h w, D), row by row over the grid (h, w)."""
        if self.config.kind == "conv":
            return self.layers(hidden_states.transpose(1, 2).unflatten(2, grid))
        return self.layers(hidden_states).transpose(1, 2).unflatten(2, grid)
