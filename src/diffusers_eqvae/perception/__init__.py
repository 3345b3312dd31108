"""What latents show without training: features, clusters, label and depth transfer, published linear heads."""

from .._lazy import face

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        ".clusters": ["Standardization", "cluster_positions"],
        "features": ["LatentFeatures", "latent_features", "to_size"],
        "heads": ["LinearDepthHead", "LinearSegmentationHead"],
        "transfer": ["NearestTransfer", "label_targets", "position_labels", "position_values"],
        "visualize": ["perception_columns", "perception_image"],
    },
)
