"""What latents show without training: features, clusters, label and depth transfer, published linear heads."""

from .clusters import cluster_cells, kmeans
from .features import Standardization, latent_features, pooled_features, to_size
from .heads import LinearDepthHead, LinearSegmentationHead
from .probe import LinearProbe
from .transfer import CellTransfer, cell_labels, cell_values, label_targets
from .visualize import perception_image

__all__ = [
    "CellTransfer",
    "LinearDepthHead",
    "LinearProbe",
    "LinearSegmentationHead",
    "Standardization",
    "cell_labels",
    "cell_values",
    "cluster_cells",
    "kmeans",
    "label_targets",
    "latent_features",
    "perception_image",
    "pooled_features",
    "to_size",
]
