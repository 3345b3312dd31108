"""ReaLS' semantic regularization: latents must predict the features of a vision foundation model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch.nn.functional as F
from diffusers import ModelMixin
from torch import Tensor, nn

from ..autoencoders import latent_channels
from ..losses.alignment import alignment_loss
from ..models.alignment_network import ALIGNMENT_FOLDER, AlignmentNetwork, AlignmentOutput
from ..models.feature_teacher import FeatureTeacher
from ..options import Checked
from .base import AutoencoderRegularizer, AutoencoderState, register_regularizer

logger = logging.getLogger(__name__)


@dataclass
class AlignmentArguments(Checked):
    """ReaLS' teacher and the network that predicts its features."""

    alignment_teacher: str = field(
        default="facebook/dinov2-with-registers-large",
        metadata={
            "reads": True,
            "help": "Feature network of the alignment regularizer: a transformers name or directory.",
        },
    )
    alignment_weight: float = field(
        default=1.0, metadata={"help": "Weight of the alignment loss.", "range": "[0, inf)"}
    )
    alignment_adaptive: bool = field(
        default=True,
        metadata={"help": "Multiply it by |grad nll| / |grad alignment| at the encoder's last layer."},
    )
    alignment_hidden_size: int = field(
        default=2048, metadata={"help": "Width of the alignment network.", "range": "(0, inf)"}
    )
    alignment_image_size: int = field(
        default=448, metadata={"help": "Side in pixels of the images shown to the teacher.", "range": "(0, inf)"}
    )


@register_regularizer("alignment")
class AlignmentRegularizer(AutoencoderRegularizer):
    """Adds L(patch) + L(cls) between predicted and teacher features, as ReaLS (arXiv 2502.00359) proposes.

    L is `losses.alignment.alignment_loss`, with the teacher's last LayerNorm; the prediction is the alignment
    network's, of the raw posterior sample; the teacher sees the images that were encoded. Gradients reach the network
    and the encoder. Where the teacher's tokens and the latent positions differ in number, the teacher's features are
    resampled to the latent grid before the LayerNorm (bilinear, with antialiasing so that a coarser grid averages).

    Own choice: the network, the loss and its weights, and the adaptive weight; the repository of ReaLS says no more
    than that an MLP aligns latents with DINOv2's patch and global features.

    Args:
        network: trained along with the autoencoder; `AlignmentNetwork.for_teacher` builds it.
        teacher: frozen, with `final_norm=False`; `hold` keeps it.
        weight: factor of the penalty; without `adaptive` it means the same for summed and for mean reconstruction.
        adaptive: scale the penalty to the reconstruction's gradient at the encoder's last layer first.

    Example:
        >>> teacher = FeatureTeacher.from_pretrained("facebook/dinov2-base", final_norm=False)
        >>> AlignmentRegularizer(AlignmentNetwork.for_teacher(teacher, latent_channels=4), teacher)
    """

    paper = ("ReaLS", "2502.00359")
    Arguments = AlignmentArguments
    reaches = frozenset({"encoder", "component"})
    mean_over_elements = True

    def __init__(
        self, network: AlignmentNetwork, teacher: FeatureTeacher, *, weight: float = 1.0, adaptive: bool = True
    ) -> None:
        super().__init__()
        if teacher.final_norm:
            raise ValueError(
                "Alignment needs the features before the last LayerNorm: a teacher with final_norm=False."
            )
        network.check_teacher(teacher)
        self.network = network
        self.hold(teacher)
        self.weight = weight
        self.adaptive = adaptive
        self._resampling_logged = False

    @classmethod
    def from_arguments(cls, arguments: AlignmentArguments, model: nn.Module) -> Self:
        """With the network saved beside the autoencoder that `model` was loaded from, or a new one."""
        teacher = FeatureTeacher.from_pretrained(
            arguments.alignment_teacher, image_size=arguments.alignment_image_size, final_norm=False
        )
        network = AlignmentNetwork.beside(model)
        if network is None:
            network = AlignmentNetwork.for_teacher(
                teacher, latent_channels=latent_channels(model), hidden_size=arguments.alignment_hidden_size
            )
        else:
            logger.info("Alignment continues with the network saved beside the autoencoder.")
        return cls(network.train(), teacher, weight=arguments.alignment_weight, adaptive=arguments.alignment_adaptive)

    @property
    def teacher(self) -> nn.Module:
        return self.frozen_modules()[0]

    def penalty(self, state: AutoencoderState, batch: Mapping[str, Tensor], draw: Any) -> Tensor:
        return self.loss(state.raw_latents, state.pixels)

    def loss(self, raw_latents: Tensor, pixels: Tensor) -> Tensor:
        """The penalty, without its weight, in a training loop of your own: raw latents (B, C, h, w) of the pixels."""
        patch, cls = self.teacher(pixels)
        features = AlignmentOutput(self._on_latent_grid(patch, raw_latents), cls)
        predicted = self.network(raw_latents)
        ours, theirs = self.network.normalize(predicted), self.network.normalize(features)
        loss = alignment_loss(predicted.patch, features.patch, normalized=(ours.patch, theirs.patch))
        if predicted.cls is not None and ours.cls is not None and theirs.cls is not None:
            loss = loss + alignment_loss(predicted.cls, cls, normalized=(ours.cls, theirs.cls))
        return loss

    def _on_latent_grid(self, patch: Tensor, raw_latents: Tensor) -> Tensor:
        grid = raw_latents.shape[-2:]
        if patch.shape[-2:] == grid:
            return patch
        if not self._resampling_logged:
            sizes = (*patch.shape[-2:], *grid)
            logger.info("The teacher's %dx%d features are resampled to the %dx%d latent positions.", *sizes)
            self._resampling_logged = True
        return F.interpolate(patch, size=grid, mode="bilinear", align_corners=False, antialias=True)

    def components(self) -> dict[str, ModelMixin]:
        return {ALIGNMENT_FOLDER: self.network}
