"""ReaLS' semantic regularization: latents must predict the features of a vision foundation model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import torch.nn.functional as F
from diffusers import ModelMixin
from torch import Tensor, nn

from ..autoencoders import latent_channels
from ..losses.alignment import alignment_loss
from ..models.alignment_network import AlignmentNetwork
from ..models.autoencoder_kl_aligned import ALIGNMENT_SUBFOLDER
from ..models.feature_teacher import FeatureTeacher
from .base import AutoencoderRegularizer, AutoencoderState, register_regularizer

logger = logging.getLogger(__name__)


class _Shared:
    """Keeps a module out of nn.Module's registration, and one for all copies: an EMA needs no second teacher."""

    def __init__(self, module: FeatureTeacher) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


@dataclass
class AlignmentArguments:
    """ReaLS' teacher and the network that predicts its features."""

    alignment_teacher: str = field(
        default="facebook/dinov2-with-registers-large",
        metadata={"help": "Feature network of the alignment regularizer: a transformers name or directory."},
    )
    alignment_weight: float = field(default=1.0, metadata={"help": "Weight of the alignment loss."})
    alignment_adaptive: bool = field(
        default=True,
        metadata={"help": "Multiply it by |grad nll| / |grad alignment| at the encoder's last layer."},
    )
    alignment_hidden_size: int = field(default=2048, metadata={"help": "Width of the alignment network."})
    alignment_image_size: int = field(
        default=448, metadata={"help": "Side in pixels of the images shown to the teacher."}
    )
    alignment_final_norm: bool = field(
        default=True,
        metadata={
            "help": "Align with the teacher's features after its last LayerNorm (what DINOv2's segmentation heads "
            "read), or with --no_alignment_final_norm before it (what its depth heads read)."
        },
    )


@register_regularizer("alignment")
class AlignmentRegularizer(AutoencoderRegularizer):
    """Adds L(patch) + L(cls) between predicted and teacher features (ReaLS, arXiv 2502.00359, section 3).

    L = 0.9 (1 - cos) + 0.1 SmoothL1 (`losses.alignment`); the prediction is the alignment network's, of the raw
    posterior sample; the teacher sees the images that were encoded. Gradients reach the network and the encoder.
    Where tokens and latent cells differ in number, the features are resampled to the latent grid (bilinear, with
    antialiasing so that a coarser grid averages).

    The teacher is not a submodule: it moves with the module but is in no state dict, no parameter list and no
    data-parallel wrapper.

    Args:
        network: trained along with the autoencoder.
        teacher: frozen; its `feature_size` must be the network's.
        weight: factor of the penalty.
        adaptive: scale the penalty to the reconstruction's gradient at the encoder's last layer first.

    Raises:
        ValueError: where teacher and network differ in feature size.
    """

    Arguments = AlignmentArguments

    def __init__(
        self, network: AlignmentNetwork, teacher: FeatureTeacher, *, weight: float = 1.0, adaptive: bool = True
    ) -> None:
        super().__init__()
        if network.config.feature_size != teacher.feature_size:
            raise ValueError(
                f"The alignment network predicts features of size {network.config.feature_size}, but the teacher's "
                f"have {teacher.feature_size}; build the network with feature_size={teacher.feature_size}."
            )
        self.network = network
        self._teacher = _Shared(teacher)
        self.weight = weight
        self.adaptive = adaptive
        self._told_about_grids = False

    @classmethod
    def from_arguments(cls, arguments: AlignmentArguments, model: nn.Module) -> Self:
        teacher = FeatureTeacher.from_pretrained(
            arguments.alignment_teacher,
            image_size=arguments.alignment_image_size,
            final_norm=arguments.alignment_final_norm,
        )
        # An autoencoder that was aligned before goes on with the network that it was aligned by.
        network = getattr(model, "alignment_network", None)
        if network is None:
            network = AlignmentNetwork(
                latent_channels=latent_channels(model),
                hidden_size=arguments.alignment_hidden_size,
                feature_size=teacher.feature_size,
            )
        elif network.config.feature_size != teacher.feature_size:
            raise ValueError(
                f"The autoencoder was aligned with features of size {network.config.feature_size}, and "
                f"{arguments.alignment_teacher} gives {teacher.feature_size}; name its own teacher with "
                "--alignment_teacher, or take its alignment_network/ away to start a new one."
            )
        return cls(network, teacher, weight=arguments.alignment_weight, adaptive=arguments.alignment_adaptive)

    @property
    def teacher(self) -> FeatureTeacher:
        return self._teacher.module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AlignmentRegularizer:
        self.teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def penalty(self, state: AutoencoderState, batch: dict[str, Tensor], draw: Any) -> Tensor:
        patch, cls = self.teacher(state.pixels)
        predicted = self.network(state.raw_latents)
        loss = alignment_loss(predicted.patch, self._on_latent_grid(patch, state.raw_latents))
        if predicted.cls is not None:
            loss = loss + alignment_loss(predicted.cls, cls)
        return loss

    def _on_latent_grid(self, patch: Tensor, latents: Tensor) -> Tensor:
        grid = latents.shape[-2:]
        if patch.shape[-2:] == grid:
            return patch
        if not self._told_about_grids:
            logger.info(
                "The teacher's %dx%d features are resampled to the %dx%d latent cells; said once.",
                *patch.shape[-2:],
                *grid,
            )
            self._told_about_grids = True
        return F.interpolate(patch, size=grid, mode="bilinear", align_corners=False, antialias=True)

    def frozen_modules(self) -> list[nn.Module]:
        return [self.teacher]

    def components(self) -> dict[str, ModelMixin]:
        return {ALIGNMENT_SUBFOLDER: self.network}
