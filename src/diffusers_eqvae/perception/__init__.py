"""What latents show without training: features, clusters, label and depth transfer, published linear heads."""

from .._lazy import face

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "clusters": ["cluster_cells", "kmeans"],
        "features": ["Standardization", "latent_features", "pooled_features", "to_size"],
        "heads": ["LinearDepthHead", "LinearSegmentationHead"],
        "probe": ["LinearProbe"],
        "transfer": ["CellTransfer", "cell_labels", "cell_values", "label_targets"],
        "visualize": ["perception_image"],
    },
)
