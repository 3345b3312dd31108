"""From latents to a feature of every latent position: through an alignment network, or the latents themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..latents import LatentNormalization
from ..models.alignment_network import AlignmentNetwork, AlignmentOutput


@dataclass
class LatentFeatures:
    """What latents say about each of their positions.

    Attributes:
        patch: (B, D, h, w) float32: the teacher's features after its last LayerNorm, or the latents themselves.
        cls: (B, D), the teacher's global feature after its last LayerNorm; None without a network that predicts it.
        before_norm: both before that LayerNorm; None without a network.

    Example:
        >>> features = latent_features(raw_latents, network)
        >>> classes, metres = segmentation_head.read(features), depth_head.read(features)
    """

    patch: Tensor
    cls: Tensor | None = None
    before_norm: AlignmentOutput | None = None


@torch.no_grad()
def latent_features(
    latents: Tensor,
    alignment_network: AlignmentNetwork | None = None,
    *,
    normalization: LatentNormalization | None = None,
    window: int = 1,
) -> LatentFeatures:
    """Features of every position of latents (B, C, h, w), in float32.

    With a network (as in ReaLS, arXiv 2502.00359) they are the teacher's features that it predicts from the raw
    latents; without one the latents are their own features, D = C.

    Args:
        latents: raw, or normalised by `normalization`.
        alignment_network: trained with the autoencoder that the latents come from.
        normalization: of `latents` (`LatentNormalization.from_vae(pipe.vae)` for what a pipeline gives as "latent");
            None for raw latents. A network's input is denormalised by it; without a network nothing is.
        window: odd; each position's `patch` is that of the window x window positions around it, border positions
            repeated: D * window^2 channels. It gives latents that know only their own place a neighbourhood.

    Example:
        >>> latent_features(torch.zeros(1, 4, 32, 32), window=5).patch.shape
        torch.Size([1, 100, 32, 32])
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"The window of latent positions must be odd, so that it has a middle; got {window}.")
    if alignment_network is not None and not alignment_network.config.patch_feature:
        raise ValueError(
            "This alignment network was trained to predict the global feature of an image alone, and its positions "
            "say nothing; align patch features too, or leave the network out."
        )
    if alignment_network is None:
        features = LatentFeatures(latents.float())
    else:
        raw_latents = latents if normalization is None else normalization.denormalize(latents)
        predicted = alignment_network(raw_latents.to(alignment_network.dtype))
        predicted = AlignmentOutput(predicted.patch.float(), None if predicted.cls is None else predicted.cls.float())
        normalized = alignment_network.normalize(predicted)
        features = LatentFeatures(normalized.patch, normalized.cls, predicted)
    if window > 1:
        padded = F.pad(features.patch, [window // 2] * 4, mode="replicate")
        features.patch = F.unfold(padded, window).unflatten(2, latents.shape[-2:])
    return features


def to_size(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, K, h, w) resized to (B, K, H, W): bilinear, corners not aligned, as segmentation logits are.

    Example:
        >>> classes = to_size(logits, (256, 256)).argmax(1)
    """
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
