"""ReaLS' semantic regularization: latents must predict the features of a vision foundation model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch.nn.functional as F
from diffusers import ModelMixin
from torch import Tensor, nn

from ..autoencoders import latent_channels
from ..data.image_features import feature_name, global_name
from ..data.latent_format import FeatureSettings, feature_tensor
from ..data.teachers import load_teacher
from ..losses.alignment import alignment_loss, spatial_norm
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
            "help": "What latents are aligned with: a vision model, by its Hub name or directory, or "
            "NAME[=WEIGHTS] of a feature network that has a feature map, such as squeezenet.",
        },
    )
    alignment_weight: float = field(
        default=1.0, metadata={"help": "Weight of the alignment loss.", "range": "[0, inf)"}
    )
    alignment_adaptive: bool = field(
        default=True,
        metadata={"help": "Multiply it by |grad nll| / |grad alignment| at the encoder's last layer."},
    )
    alignment_patch_weight: float = field(
        default=1.0, metadata={"help": "Share of the patch features; 0: the global one alone.", "range": "[0, inf)"}
    )
    alignment_global_weight: float = field(
        default=1.0, metadata={"help": "Share of the global feature; 0: patch features alone.", "range": "[0, inf)"}
    )
    alignment_cosine_weight: float = field(
        default=0.9, metadata={"help": "Of 1 - cosine of normalised features.", "range": "[0, inf)"}
    )
    alignment_smooth_l1_weight: float = field(
        default=0.1, metadata={"help": "Of the smooth L1 distance of features.", "range": "[0, inf)"}
    )
    alignment_projector: Literal["mlp", "conv"] = field(
        default="mlp",
        metadata={
            "help": "The alignment network: an mlp at each position, or iREPA's 3x3 conv (patch features alone)."
        },
    )
    alignment_hidden_size: int = field(default=2048, metadata={"help": "Width of the mlp.", "range": "(0, inf)"})
    alignment_depth: int = field(default=2, metadata={"help": "Hidden layers of the mlp.", "range": "(0, inf)"})
    alignment_spatial_norm: float | None = field(
        default=None,
        metadata={
            "help": "iREPA's target: subtract this multiple of the normalised features' mean over the positions and "
            "divide by their deviation over them; unset, features as they are, which heads read.",
            "range": "[0, 1]",
        },
    )
    alignment_image_size: int = field(
        default=448, metadata={"help": "Side in pixels of the images shown to the teacher.", "range": "(0, inf)"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.alignment_patch_weight or self.alignment_global_weight):
            raise ValueError("alignment_patch_weight and alignment_global_weight are both 0: nothing is aligned.")
        if not (self.alignment_cosine_weight or self.alignment_smooth_l1_weight):
            raise ValueError("alignment_cosine_weight and alignment_smooth_l1_weight are both 0: nothing is compared.")
        if self.alignment_spatial_norm is not None and not self.alignment_patch_weight:
            raise ValueError(
                "alignment_spatial_norm is of patch features, and alignment_patch_weight is 0; leave one out."
            )
        if self.alignment_projector == "conv":
            if self.alignment_global_weight:
                raise ValueError("alignment_projector conv gives no global feature; set alignment_global_weight to 0.")
            if (self.alignment_hidden_size, self.alignment_depth) != (2048, 2):
                raise ValueError(
                    "alignment_hidden_size and alignment_depth are of the mlp; alignment_projector is conv."
                )

    @property
    def network(self) -> dict[str, Any]:
        """What these say of the `AlignmentNetwork`."""
        mlp = self.alignment_projector == "mlp"
        return {
            "patch_feature": self.alignment_patch_weight > 0,
            "global_feature": self.alignment_global_weight > 0,
            "projector": self.alignment_projector,
            "spatial_norm": self.alignment_spatial_norm,
            **({"hidden_size": self.alignment_hidden_size, "num_hidden_layers": self.alignment_depth} if mlp else {}),
        }


@register_regularizer("alignment")
class AlignmentRegularizer(AutoencoderRegularizer):
    """Adds a L(patch) + b L(cls) between predicted and teacher features, as ReaLS (arXiv 2502.00359) proposes.

    L is `losses.alignment.alignment_loss`, with the teacher's last LayerNorm; the prediction is the alignment
    network's, of the raw posterior sample; the teacher sees the images that were encoded, or its features of them are
    read from a store. Gradients reach the network and the encoder. Where the teacher's tokens and the latent positions
    differ in number, the teacher's features are resampled to the latent grid before the LayerNorm (bilinear, with
    antialiasing so that a coarser grid averages). A network with `spatial_norm` meets the normalised features, in
    iREPA's spatial normalisation.

    Own choice: the network, the loss and its weights, and the adaptive weight; the repository of ReaLS says no more
    than that an MLP aligns latents with DINOv2's patch and global features.

    Args:
        network: trained along with the autoencoder; `AlignmentNetwork.for_teacher` builds it. Its config says which
            features take part.
        teacher: frozen, with `final_norm=False`; `hold` keeps it. Or the name of stored features that take its place.
        weight: factor of the penalty; without `adaptive` it means the same for summed and for mean reconstruction.
        adaptive: scale the penalty to the reconstruction's gradient at the encoder's last layer first.
        patch_weight, global_weight: a and b.
        cosine_weight, smooth_l1_weight: of the two parts of L.

    Example:
        >>> teacher = FeatureTeacher.from_pretrained("facebook/dinov2-base", final_norm=False)
        >>> AlignmentRegularizer(AlignmentNetwork.for_teacher(teacher, latent_channels=4), teacher)
    """

    paper = ("ReaLS", "2502.00359")
    Arguments = AlignmentArguments
    reaches = frozenset({"encoder", "component"})
    mean_over_elements = True
    reads_pixels = True

    def __init__(
        self,
        network: AlignmentNetwork,
        teacher: FeatureTeacher | str,
        *,
        weight: float = 1.0,
        adaptive: bool = True,
        patch_weight: float = 1.0,
        global_weight: float = 1.0,
        cosine_weight: float = 0.9,
        smooth_l1_weight: float = 0.1,
    ) -> None:
        super().__init__()
        if isinstance(teacher, str):
            names = (teacher, global_name(teacher)) if network.config.global_feature else (teacher,)
            self.features, self.reads_pixels = names, False
        else:
            _require_before_norm(teacher.final_norm)
            _require_global(network, teacher)
            network.check_teacher(teacher)
            self.hold(teacher)
        self.network = network
        self.weight = weight
        self.adaptive = adaptive
        self.patch_weight, self.global_weight = patch_weight, global_weight
        self.parts = {"cosine_weight": cosine_weight, "smooth_l1_weight": smooth_l1_weight}
        self._resampling_logged = False

    @classmethod
    def features_of(cls, arguments: AlignmentArguments) -> tuple[str, ...]:
        name = feature_name(arguments.alignment_teacher)
        return (name, global_name(name)) if arguments.alignment_global_weight else (name,)

    @classmethod
    def from_arguments(
        cls, arguments: AlignmentArguments, model: nn.Module, *, features: Mapping[str, FeatureSettings] | None = None
    ) -> Self:
        """With the network saved beside the autoencoder that `model` was loaded from, or a new one.

        Features stored of all that it reads take the teacher's place, which is looked at then and not kept.
        """
        teacher = load_teacher(
            arguments.alignment_teacher, image_size=arguments.alignment_image_size, final_norm=False
        )
        network = AlignmentNetwork.beside(model)
        if network is None:
            channels = latent_channels(model)
            network = AlignmentNetwork.for_teacher(teacher, latent_channels=channels, **arguments.network)
        else:
            logger.info("Alignment continues with the network saved beside the autoencoder.")
            _require_same_network(network, arguments.network)
        names = cls.features_of(arguments)
        stored = [(features or {})[name] for name in names if name in (features or {})]
        if complete := len(stored) == len(names):
            _require_stored(stored[0], teacher)
            network.check_teacher(teacher)
        return cls(
            network.train(),
            names[0] if complete else teacher,
            weight=arguments.alignment_weight,
            adaptive=arguments.alignment_adaptive,
            patch_weight=arguments.alignment_patch_weight,
            global_weight=arguments.alignment_global_weight,
            cosine_weight=arguments.alignment_cosine_weight,
            smooth_l1_weight=arguments.alignment_smooth_l1_weight,
        )

    @property
    def teacher(self) -> nn.Module:
        return self.frozen_modules()[0]

    def penalty(self, state: AutoencoderState, batch: Mapping[str, Tensor], draw: Any) -> Tensor:
        if not self.features:
            return self.loss(state.raw_latents, state.pixels)
        patch, *cls = (batch[feature_tensor(name)].float() for name in self.features)
        return self._compare(state.raw_latents, patch, cls[0] if cls else None)

    def loss(self, raw_latents: Tensor, pixels: Tensor) -> Tensor:
        """The penalty, without its weight, in a training loop of your own: raw latents (B, C, h, w) of the pixels."""
        return self._compare(raw_latents, *self.teacher(pixels))

    def _compare(self, raw_latents: Tensor, patch: Tensor, cls: Tensor | None) -> Tensor:
        config: Any = self.network.config
        predicted = self.network(raw_latents)
        loss = predicted.patch.new_zeros(())
        if config.patch_feature:
            patch = self._on_latent_grid(patch, raw_latents)
            ours, theirs = (self.network.normalize(AlignmentOutput(each)).patch for each in (predicted.patch, patch))
            if config.spatial_norm is not None:
                patch = theirs = spatial_norm(self.network.layer_norm(patch), config.spatial_norm)
            loss = loss + self.patch_weight * self._loss(predicted.patch, patch, (ours, theirs))
        if predicted.cls is not None and cls is not None:
            normed = self.network.layer_norm(predicted.cls), self.network.layer_norm(cls)
            loss = loss + self.global_weight * self._loss(predicted.cls, cls, normed)
        return loss

    def _loss(self, prediction: Tensor, feature: Tensor, normalized: tuple[Tensor, Tensor]) -> Tensor:
        return alignment_loss(prediction, feature, normalized=normalized, **self.parts)

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


def _require_before_norm(final_norm: bool | None) -> None:
    """Refuses features that an alignment network, which predicts them before the LayerNorm, cannot meet."""
    if final_norm:
        raise ValueError(
            "Alignment needs the features before the last LayerNorm: a teacher, or stored features, with "
            "final_norm=False."
        )


def _require_global(network: AlignmentNetwork, teacher: FeatureTeacher) -> None:
    """Refuses a network that would predict a feature which the teacher does not have."""
    if network.config.global_feature and not teacher.has_global:
        raise ValueError(
            f"A {teacher.model.config.model_type} has no global feature to align with; align patch features alone "
            "(alignment_global_weight 0)."
        )


def _require_same_network(network: AlignmentNetwork, wanted: Mapping[str, Any]) -> None:
    """Refuses a saved network that is not what the arguments ask for."""
    own: Any = network.config
    if differing := [f"{key}={own[key]}, not {value}" for key, value in wanted.items() if own[key] != value]:
        raise ValueError(
            f"The alignment network beside the autoencoder has {'; '.join(differing)}; ask for what it has, or start "
            "without the saved network."
        )


def _require_stored(features: FeatureSettings, teacher: FeatureTeacher) -> None:
    """Refuses stored features of another teacher, of images of another size, or from after its last LayerNorm."""
    _require_before_norm(features.identity["final_norm"])
    given = {key: value for key, value in teacher.metadata.items() if key != "teacher"}
    if differing := [key for key, value in given.items() if features.identity.get(key) != value]:
        words = [f"{key} {features.identity.get(key)}, not {given[key]}" for key in differing]
        raise ValueError(
            f"The stored features are not those of the teacher {teacher.metadata['teacher']}: {'; '.join(words)}. "
            "Name the teacher and the size of its images that made them, or store these."
        )
