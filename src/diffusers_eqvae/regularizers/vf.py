"""VA-VAE's vision foundation model loss: projected latents resemble a teacher's features, and relate as they do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..autoencoders import latent_channels
from ..data.teachers import load_teacher
from ..losses._checks import full_precision, require_equal_shapes
from ..models.component import ComponentMixin
from ..options import Checked
from .base import AutoencoderRegularizer, AutoencoderState, register_regularizer

FOLDER = "vf_projection"


class VFProjection(ComponentMixin, ConfigMixin):
    """A linear map of every cell, raw latents (B, C, h, w) -> (B, D, h, w).

    Args:
        latent_channels: C of the autoencoder.
        feature_size: D of the teacher.
        teacher: its name.
        teacher_hash: first 16 hex digits of the sha256 of its weights.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 4,
        feature_size: int = 1024,
        teacher: str | None = None,
        teacher_hash: str | None = None,
    ) -> None:
        super().__init__()
        self.projection = nn.Conv2d(latent_channels, feature_size, 1, bias=False)

    def forward(self, raw_latents: Tensor) -> Tensor:
        return self.projection(raw_latents)


@dataclass
class VFArguments(Checked):
    """The teacher, and what is asked of the latents."""

    vf_teacher: str = field(
        default="facebook/dinov2-with-registers-large",
        metadata={
            "reads": True,
            "help": "What latents are compared with: a vision model, by its Hub name or directory, or "
            "NAME[=WEIGHTS] of a feature network that has a feature map, such as squeezenet.",
        },
    )
    vf_image_size: int = field(
        default=224,
        metadata={
            "help": "Side in pixels of the images shown to the teacher: its patch size (DINOv2: 14, squeezenet: 16) "
            "for every latent position along one side.",
            "range": "(0, inf)",
        },
    )
    vf_weight: float = field(default=0.1, metadata={"help": "Weight of the loss.", "range": "[0, inf)"})
    vf_adaptive: bool = field(
        default=True, metadata={"help": "Multiply it by |grad nll| / |grad vf| at the encoder's last layer."}
    )
    vf_cosine_margin: float = field(
        default=0.5, metadata={"help": "How far a cosine may stay below 1.", "range": "[0, 2]"}
    )
    vf_distance_margin: float = field(
        default=0.25, metadata={"help": "How far two cells' similarity may be from the teacher's.", "range": "[0, 2]"}
    )


@register_regularizer("vf")
class VFRegularizer(AutoencoderRegularizer):
    """mean relu(1 - m1 - cos(p_i, f_i)) + mean relu(|cos(p_i, p_j) - cos(f_i, f_j)| - m2)     (VA-VAE, 2501.01423)

    over cells i and pairs of cells of one image; f are the teacher's features, p = W z projected raw latents. By
    default scaled so that its gradient at the encoder's last layer is `weight` times that of the reconstruction. It
    moves the encoder and the projection, which is saved in vf_projection/ and goes on with a run that starts there.
    Where the teacher's tokens and the latent positions differ in number, features are resampled (bilinear, with
    antialiasing).

    A step costs the teacher's forward, and memory for two (h w)^2 matrices per image: 8 MB for 32x32 latents.

    Differs from the reference: the teacher sees images of ImageNet's mean and std.

    Args:
        projection: trained along.
        teacher: frozen; `hold` keeps it.
        weight, adaptive, cosine_margin, distance_margin: see `VFArguments`.

    Example:
        >>> teacher = FeatureTeacher.from_pretrained("facebook/dinov2-large", image_size=224)
        >>> VFRegularizer(VFProjection(latent_channels=32, feature_size=1024), teacher)
    """

    Arguments = VFArguments
    paper = ("VA-VAE", "2501.01423")
    reaches = frozenset({"encoder", "component"})
    mean_over_elements = True

    def __init__(
        self,
        projection: VFProjection,
        teacher: nn.Module,
        *,
        weight: float = 0.1,
        adaptive: bool = True,
        cosine_margin: float = 0.5,
        distance_margin: float = 0.25,
    ) -> None:
        super().__init__()
        self.projection = projection.train()
        self.hold(teacher)
        self.weight, self.adaptive = weight, adaptive
        self.cosine_margin, self.distance_margin = cosine_margin, distance_margin

    @classmethod
    def from_arguments(cls, arguments: VFArguments, model: nn.Module) -> Self:
        teacher = load_teacher(arguments.vf_teacher, image_size=arguments.vf_image_size)
        needed = {"latent_channels": latent_channels(model), "feature_size": teacher.feature_size}
        needed["teacher_hash"] = teacher.metadata["teacher_hash"]
        return cls(
            VFProjection.saved_beside(model, FOLDER, **needed)
            or VFProjection(**needed, teacher=teacher.metadata["teacher"]),
            teacher,
            weight=arguments.vf_weight,
            adaptive=arguments.vf_adaptive,
            cosine_margin=arguments.vf_cosine_margin,
            distance_margin=arguments.vf_distance_margin,
        )

    def penalty(self, state: AutoencoderState, batch: Mapping[str, Tensor], draw: Any) -> Tensor:
        features, _ = self.frozen_modules()[0](state.pixels)
        grid = state.raw_latents.shape[-2:]
        if features.shape[-2:] != grid:
            features = F.interpolate(features, size=grid, mode="bilinear", align_corners=False, antialias=True)
        return vf_loss(
            self.projection(state.raw_latents),
            features,
            cosine_margin=self.cosine_margin,
            distance_margin=self.distance_margin,
        )

    def components(self) -> dict[str, ModelMixin]:
        return {FOLDER: self.projection}


def vf_loss(projected: Tensor, features: Tensor, *, cosine_margin: float, distance_margin: float) -> Tensor:
    """The two terms of VA-VAE's loss (arXiv 2501.01423, equations 2 and 3) of (B, D, h, w) and (B, D, h, w), float32.

    Example:
        >>> vf_loss(features, features, cosine_margin=0.5, distance_margin=0.25)
        tensor(0.)
    """
    require_equal_shapes(projected, features, ("The projected latents", "the teacher's features"))
    ours, theirs = (F.normalize(full_precision(each).flatten(2), dim=1) for each in (projected, features))
    marginal = F.relu(1 - cosine_margin - (ours * theirs).sum(1)).mean()
    between = [torch.einsum("bdi,bdj->bij", each, each) for each in (ours, theirs)]
    return marginal + F.relu((between[0] - between[1]).abs() - distance_margin).mean()
