"""The alignment network of ReaLS: from latent positions to the features of a vision foundation model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from ..autoencoders import Autoencoder, latent_channels
from ..pretrained import looking_for
from .component import ComponentMixin
from .feature_teacher import FeatureTeacher

ALIGNMENT_FOLDER = "alignment_network"


@dataclass
class AlignmentOutput(BaseOutput):
    """Features of images: `patch` (B, D, h, w) of every latent position, `cls` (B, D) of the image or None."""

    patch: Tensor
    cls: Tensor | None = None


class AlignmentNetwork(ComponentMixin, ConfigMixin):
    """Predicts a teacher's patch and global features from raw latents, as ReaLS (arXiv 2502.00359) proposes.

        patch = W3 silu(W2 silu(W1 z)) at each latent position,  cls = W4 mean_positions(silu(W2 silu(W1 z)))

    (of two hidden layers) are the teacher's tokens *before* its last LayerNorm, which depth heads read; `normalize`
    applies that LayerNorm, a copy of which the network carries, and gives what segmentation heads read. Positions do
    not see each other, so what the network finds in one is in that position's latent.

    Own choice: everything but "an MLP from latents to patch and global features", that is depth, width, activation,
    the head of the global feature, and that the features are those before the LayerNorm.

    Args:
        latent_channels: C of the autoencoder.
        hidden_size: width of the hidden layers.
        feature_size: D of the teacher: 768 for DINOv2-B, 1024 for DINOv2-L.
        global_feature: whether to predict the global (CLS) feature too.
        patch_feature: whether it was trained to predict patch features; without, it knows the global one alone.
        num_hidden_layers: of the MLP.
        projector: "mlp"; or "conv", one 3x3 convolution C -> D, padding 1, which sees neighbours (iREPA, arXiv
            2512.10794), without a global feature.
        spatial_norm: gamma where the patch features are the teacher's normalised ones with iREPA's spatial
            normalisation (`losses.alignment.spatial_norm`), which no published head reads; None = as above.
        norm_eps: of the teacher's last LayerNorm; None where it has none: then features stay as they are.
        teacher: its Hub name, or the name of its directory or network.
        teacher_type: its transformers type, e.g. "dinov2" or "dinov2_with_registers"; else the network's name.
        teacher_hash: first 16 hex digits of the sha256 of its weights.
        teacher_layers: blocks, counted from 1, whose output is predicted; None of a convolutional network's map.
        teacher_image_size: side in pixels of the squares that it sees.

    Example:
        >>> network = AlignmentNetwork(latent_channels=4, hidden_size=8, feature_size=6)
        >>> features = network(torch.zeros(1, 4, 16, 16))
        >>> features.patch.shape, network.normalize(features).cls.shape
        (torch.Size([1, 6, 16, 16]), torch.Size([1, 6]))
    """

    norm_weight: Tensor
    norm_bias: Tensor

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 4,
        hidden_size: int = 2048,
        feature_size: int = 1024,
        global_feature: bool = True,
        norm_eps: float | None = 1e-6,
        teacher: str | None = None,
        teacher_type: str | None = None,
        teacher_hash: str | None = None,
        teacher_layers: Sequence[int] | None = None,
        teacher_image_size: int | None = None,
        patch_feature: bool = True,
        num_hidden_layers: int = 2,
        projector: Literal["mlp", "conv"] = "mlp",
        spatial_norm: float | None = None,
    ):
        super().__init__()
        if projector not in ("mlp", "conv") or (projector == "conv" and global_feature) or num_hidden_layers < 1:
            raise ValueError(
                "The projector must be mlp, of at least one hidden layer, or conv, which gives no global feature; got "
                f"{projector!r} with {num_hidden_layers} layers and global_feature={global_feature}."
            )
        if not (patch_feature or global_feature):
            raise ValueError("An alignment network must predict patch features, the global one, or both.")
        self.hidden: nn.Module
        self.patch_head: nn.Module
        if projector == "conv":
            self.hidden, self.patch_head = nn.Identity(), nn.Conv2d(latent_channels, feature_size, 3, padding=1)
        else:
            widths = [latent_channels, *[hidden_size] * num_hidden_layers]
            layers = [each for pair in pairwise(widths) for each in (nn.Linear(*pair), nn.SiLU())]
            self.hidden, self.patch_head = nn.Sequential(*layers), nn.Linear(hidden_size, feature_size)
        self.cls_head = nn.Linear(hidden_size, feature_size) if global_feature else None
        self.register_buffer("norm_weight", torch.ones(feature_size))
        self.register_buffer("norm_bias", torch.zeros(feature_size))

    @classmethod
    def for_teacher(cls, teacher: FeatureTeacher, **options: Any) -> Self:
        """A new network that predicts the features of `teacher`; `options` are the other constructor arguments."""
        network = cls(**teacher.metadata, **options)
        if teacher.last_norm is not None:
            network.norm_weight.copy_(teacher.last_norm.weight)
            network.norm_bias.copy_(teacher.last_norm.bias)
        return network

    @classmethod
    def find(
        cls, name: str | os.PathLike[str], *, subfolder: str | None = None, revision: str | None = None
    ) -> Self | None:
        """The network in a directory or Hub repository, or None where there is none.

        It is looked for in `name` itself, in the folder alignment_network/ beside an autoencoder (in `subfolder`), and
        in that of a pipeline.
        """
        beside = "/".join(filter(None, (subfolder, ALIGNMENT_FOLDER)))
        for folder in dict.fromkeys(("", beside, ALIGNMENT_FOLDER)):
            if cls.lies_in(name, folder, revision):
                with looking_for(name, "an alignment network") as options:
                    return cls.from_pretrained(name, subfolder=folder or None, revision=revision, **options)
        return None

    @classmethod
    def beside(cls, vae: Autoencoder) -> Self | None:
        """The network saved beside an autoencoder, where that was loaded from; None where there is none.

        An autoencoder keeps the name it was loaded by (`config._name_or_path`). What its loader was told beside it
        (subfolder and revision) is read from an attribute `location`, where it has one.
        """
        name = vae.config.get("_name_or_path")
        network = cls.find(name, **getattr(vae, "location", {})) if name else None
        if network is not None:
            network.check_autoencoder(vae)
        return network

    def check_autoencoder(self, vae: Autoencoder) -> None:
        """Raises ValueError where an autoencoder has another number of latent channels."""
        if self.config.latent_channels != latent_channels(vae):
            raise ValueError(
                f"The alignment network reads {self.config.latent_channels} latent channels, but the "
                f"{type(vae).__name__} has {latent_channels(vae)}; use the network that was trained with it."
            )

    def check_teacher(self, teacher: FeatureTeacher) -> None:
        """Raises ValueError where this network predicts the features of another teacher, or of images of another size.

        The teacher's name may differ: a copy is known by its weights.
        """
        for key, given in teacher.metadata.items():
            own = self.config[key]
            if key != "teacher" and own != given:
                raise ValueError(
                    f"The alignment network predicts features with {key}={own} (teacher {self.config.teacher}), "
                    f"but this teacher ({teacher.metadata['teacher']}) has {key}={given}; give the same teacher and "
                    "image size, or start without the saved network."
                )

    def forward(self, raw_latents: Tensor) -> AlignmentOutput:
        """Features before the teacher's last LayerNorm, of raw (not normalised) latents (B, C, h, w)."""
        if self.config.projector == "conv":
            return AlignmentOutput(self.patch_head(raw_latents))
        hidden = self.hidden(raw_latents.movedim(1, -1))
        patch = self.patch_head(hidden).movedim(-1, 1)
        return AlignmentOutput(patch, None if self.cls_head is None else self.cls_head(hidden.mean((1, 2))))

    def normalize(self, features: AlignmentOutput) -> AlignmentOutput:
        """The teacher's last LayerNorm of features before it, predicted or its own; computed in float32.

        n = (f - mean_D(f)) / sqrt(var_D(f) + norm_eps) * norm_weight + norm_bias

        Patch features with `spatial_norm` are normalised already and stay.
        """
        spatial = self.config.spatial_norm is not None
        patch = features.patch if spatial else self.layer_norm(features.patch)
        return AlignmentOutput(patch, None if features.cls is None else self.layer_norm(features.cls))

    def layer_norm(self, features: Tensor) -> Tensor:
        """The teacher's last LayerNorm over dimension 1; features themselves, where it has none."""
        if self.config.norm_eps is None:
            return features.float()
        rows = features.movedim(1, -1).float()
        rows = F.layer_norm(
            rows, rows.shape[-1:], self.norm_weight.float(), self.norm_bias.float(), self.config.norm_eps
        )
        return rows.movedim(-1, 1)
