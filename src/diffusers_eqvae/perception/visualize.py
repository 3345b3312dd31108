"""Images of what latents show: components, clusters, classes and depths beside the decoded sample."""

from __future__ import annotations

import colorsys
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..autoencoders import Autoencoder, decode_upcast
from ..clusters import cluster_positions
from ..images import grid, latent_pca
from ..latents import LatentNormalization
from ..models.alignment_network import AlignmentNetwork
from .features import latent_features, to_size
from .heads import LinearDepthHead, LinearSegmentationHead

_GOLDEN_RATIO = 0.618033988749895
_VOID_LEVEL = -0.6


def label_colours(num_labels: int) -> Tensor:
    """Colours (K, 3) in [-1, 1], the same for a label whatever K: hues a golden ratio apart, in three lightnesses.

    Example:
        >>> label_colours(150).shape
        torch.Size([150, 3])
    """
    colours = [
        colorsys.hls_to_rgb((index * _GOLDEN_RATIO) % 1.0, (0.55, 0.4, 0.7)[index % 3], 0.75)
        for index in range(num_labels)
    ]
    return torch.tensor(colours).view(-1, 3) * 2 - 1


def draw_labels(labels: Tensor, *, ignore_index: int | None = None) -> Tensor:
    """Labels (..., H, W) as pixels (..., 3, H, W) in [-1, 1]; what is ignored is dark grey.

    Example:
        >>> draw_labels(torch.tensor([[0, 2, 255]]), ignore_index=255).shape
        torch.Size([3, 1, 3])
    """
    void = torch.zeros_like(labels, dtype=torch.bool) if ignore_index is None else labels == ignore_index
    shown = labels.masked_fill(void, 0).cpu()
    pixels = label_colours(int(shown.max()) + 1)[shown]
    pixels[void.cpu()] = _VOID_LEVEL
    return pixels.movedim(-1, -3)


def draw_depth(depth: Tensor, limits: tuple[float, float]) -> Tensor:
    """Depth (..., H, W) as grey pixels (..., 3, H, W) in [-1, 1]: white at limits[0], black at limits[1]; NaN is blue.

    Example:
        >>> draw_depth(torch.tensor([[1.0, 3.0]]), (1.0, 3.0))[0]
        tensor([[ 1., -1.]])
    """
    near, far = limits
    pixels = (1 - 2 * (depth.float().cpu() - near) / (far - near)).clamp(-1, 1)
    pixels = pixels.unsqueeze(-1).repeat(*[1] * depth.ndim, 3)
    pixels[depth.isnan().cpu()] = torch.tensor([-0.8, -0.8, 0.2])
    return pixels.movedim(-1, -3)


@torch.no_grad()
def perception_columns(
    vae: Autoencoder,
    latents: Tensor,
    *,
    alignment_network: AlignmentNetwork | None = None,
    segmentation_head: LinearSegmentationHead | None = None,
    depth_head: LinearDepthHead | None = None,
    num_clusters: int = 6,
    seed: int = 0,
    pixels: Tensor | None = None,
) -> dict[str, Tensor]:
    """What a generator's latents show before they are decoded: name of each view -> pixels (B, 3, H, W) in [-1, 1].

    Views are sample, PCA and clusters. Components and clusters are common to all samples, so the same colour is the
    same thing. Classes and depths (near is white) follow where heads are given, which read the features of an
    alignment network.

    Args:
        vae: the autoencoder of the latents, `pipe.vae`.
        latents: normalised, (B, C, h, w): `pipe(..., output_type="latent").images`.
        alignment_network: trained with the autoencoder; without it the latents are their own features.
        segmentation_head, depth_head: fitted to the network's teacher; any other is refused.
        num_clusters: of k-means, which `seed` starts.
        pixels: the samples (B, 3, H, W) in [-1, 1] where they are decoded already (`pipe.decode_latents(latents)`).

    Example:
        >>> list(perception_columns(pipe.vae, latents))
        ['sample', 'PCA', 'clusters']
    """
    for head in (segmentation_head, depth_head):
        if head is not None:
            head.check_network(alignment_network)
    normalization = LatentNormalization.from_vae(vae)
    features = latent_features(latents, alignment_network, normalization=normalization)
    if pixels is None:
        pixels = decode_upcast(vae, normalization.denormalize(latents.float()))
    size = (int(pixels.shape[-2]), int(pixels.shape[-1]))
    clusters = draw_labels(cluster_positions(features.patch, num_clusters, seed=seed))
    columns = {"sample": pixels.float().cpu(), "PCA": latent_pca(features.patch)[0].cpu(), "clusters": clusters}
    if segmentation_head is not None:
        columns["classes"] = draw_labels(to_size(segmentation_head.read(features), size).argmax(1))
    if depth_head is not None:
        depth = to_size(depth_head.read(features), size)[:, 0]
        limits = (float(depth.min()), max(float(depth.max()), float(depth.min()) + 1e-6))
        columns["depth"] = draw_depth(depth, limits)
    fitted = [c if c.shape[-2:] == size else F.interpolate(c, size, mode="nearest-exact") for c in columns.values()]
    return dict(zip(columns, fitted, strict=True))


def perception_image(vae: Autoencoder, latents: Tensor, **options: Any) -> Image.Image:
    """The views of `perception_columns`, which `options` go to, side by side: one row per sample.

    Example:
        >>> latents = pipe([207, 360], output_type="latent").images
        >>> perception_image(pipe.vae, latents, alignment_network=pipe.alignment_network).save("perception.png")
    """
    columns = perception_columns(vae, latents, **options)
    return grid([list(row) for row in zip(*columns.values(), strict=True)], tuple(columns))
