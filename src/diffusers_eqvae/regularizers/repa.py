"""REPA (arXiv 2410.06940): hidden states align with a vision model's features of the clean image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Self

import torch.nn.functional as F
from torch import Tensor, nn

from ..data.image_features import feature_name
from ..data.latent_format import FeatureSettings, feature_tensor
from ..data.teachers import identity_of, load_teacher
from ..losses.alignment import spatial_norm
from ..models.backbone import Backbone
from ..models.feature_projector import FeatureProjector
from ..models.feature_teacher import FeatureTeacher, teacher_difference
from ..options import Checked
from ._hidden_alignment import HiddenAlignment, require_grid
from .base import register_regularizer

FOLDER = "repa_projector"


@dataclass
class REPAArguments(Checked):
    """The teacher, where its features are met, and how they are compared.

    Example:
        >>> REPARegularizer.from_arguments(REPAArguments(repa_teacher="facebook/dinov2-base"), transformer)
    """

    repa_teacher: str = field(
        default="facebook/dinov2-base",
        metadata={
            "reads": True,
            "help": "A vision model, by its Hub name or directory, or "
            "NAME[=WEIGHTS] of a feature network that has a feature map, such as squeezenet.",
        },
    )
    repa_weight: float = field(default=0.5, metadata={"help": "Weight of the alignment.", "range": "[0, inf)"})
    repa_layer: int = field(
        default=8, metadata={"help": "Block, counted from 1, after which features are predicted.", "range": "(0, inf)"}
    )
    repa_projector: Literal["mlp", "conv"] = field(
        default="mlp", metadata={"help": "Head on the hidden states: REPA's mlp, or iREPA's 3x3 conv."}
    )
    repa_projector_size: int = field(default=2048, metadata={"help": "Width of the mlp.", "range": "(0, inf)"})
    repa_spatial_norm: float | None = field(
        default=None,
        metadata={
            "help": "iREPA: subtract this multiple of the features' mean over the tokens and divide by their "
            "deviation over them; unset, features as they are.",
            "range": "[0, 1]",
        },
    )
    repa_stop_at: int | None = field(
        default=None,
        metadata={"help": "Optimizer step from which on the alignment is off; unset, never.", "range": "[0, inf)"},
    )


@register_regularizer("repa")
class REPARegularizer(HiddenAlignment):
    """-mean cos(projector(hidden states after block n), teacher's patch features) over tokens and samples.

    Its features are those after the last LayerNorm: read from a store that holds them, or those of the clean images,
    resized so that the teacher's patches are the transformer's tokens. Gradients reach the projector and the blocks up
    to n. REPA's weight is .5, n = 8; it clips gradients at 1 (`max_grad_norm`).

    Options of iREPA (arXiv 2512.10794): a convolution as projector, and features f as (f - gamma mean) / std, mean and
    deviation over the tokens of an image.

    Args:
        projector: trained along.
        teacher: frozen, and `hold` keeps it; or the name of the stored features that take its place.
        grid: tokens along height and width.
        layer, weight, stop_at: see `REPAArguments`.
        spatial_norm: gamma, or None.
    """

    Arguments = REPAArguments
    reads_pixels = True

    def __init__(
        self,
        projector: FeatureProjector,
        teacher: FeatureTeacher | str,
        *,
        grid: tuple[int, int],
        layer: int = 8,
        weight: float = 0.5,
        stop_at: int | None = None,
        spatial_norm: float | None = None,
    ) -> None:
        super().__init__(projector, grid, layer=layer, weight=weight, stop_at=stop_at, folder=FOLDER)
        if isinstance(teacher, str):
            self.features, self.reads_pixels = (teacher,), False
        else:
            self.hold(teacher)
        self.spatial_norm = spatial_norm

    @classmethod
    def features_of(cls, arguments: REPAArguments) -> tuple[str, ...]:
        return (feature_name(arguments.repa_teacher),)

    @classmethod
    def from_arguments(
        cls, arguments: REPAArguments, model: nn.Module, *, features: Mapping[str, FeatureSettings] | None = None
    ) -> Self:
        assert isinstance(model, Backbone)
        name = feature_name(arguments.repa_teacher)
        teacher: FeatureTeacher | str = name
        if stored := (features or {}).get(name):
            _require_teacher(stored, arguments.repa_teacher)
            require_grid(name, stored, model.token_grid)
            size = stored.shape[0]
        else:
            teacher = load_teacher(arguments.repa_teacher, grid=model.token_grid)
            size = teacher.feature_size
        projector = FeatureProjector(
            hidden_size=model.hidden_size,
            feature_size=size,
            kind=arguments.repa_projector,
            projector_size=arguments.repa_projector_size,
        )
        return cls(
            projector,
            teacher,
            grid=model.token_grid,
            layer=arguments.repa_layer,
            weight=arguments.repa_weight,
            stop_at=arguments.repa_stop_at,
            spatial_norm=arguments.repa_spatial_norm,
        )

    def target(self, batch: Mapping[str, Tensor]) -> Tensor:
        if self.features:
            patch = batch[feature_tensor(self.features[0])]
        else:
            patch, _ = self.frozen_modules()[0](batch["pixel_values"])
        return patch if self.spatial_norm is None else spatial_norm(patch, self.spatial_norm)

    def compare(self, predicted: Tensor, target: Tensor) -> Tensor:
        return -F.cosine_similarity(predicted, target, dim=1).mean()


def _require_teacher(stored: FeatureSettings, teacher: str) -> None:
    """Refuses stored features of another vision model, or of another of its layers."""
    if difference := teacher_difference(stored.identity, identity_of(teacher)):
        raise ValueError(
            f"The stored features are those of another teacher: {difference}; name the one that made them, or store "
            "features of this one under a name of their own."
        )
    if stored.identity["final_norm"] is False:
        raise ValueError(
            f"REPA compares with features after the teacher's last LayerNorm, and the stored ones of {teacher} are "
            "those before it, as alignment reads them; store them after it."
        )
