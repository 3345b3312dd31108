"""What latents show without training: features, clusters, label and depth transfer, published linear heads."""

from .clusters import cluster_positions
from .features import LatentFeatures, Standardization, latent_features, to_size
from .heads import LinearDepthHead, LinearSegmentationHead
from .transfer import NearestTransfer, label_targets, position_labels, position_values
from .visualize import perception_image

__all__ = [
    "LatentFeatures",
    "LinearDepthHead",
    "LinearSegmentationHead",
    "NearestTransfer",
    "Standardization",
    "cluster_positions",
    "label_targets",
    "latent_features",
    "perception_image",
    "position_labels",
    "position_values",
    "to_size",
]
