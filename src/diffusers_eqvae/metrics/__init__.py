"""Measurements of reconstructions, latents and generated images, and the result cards that carry them."""

from .._lazy import face

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "autoencoder": ["measure_autoencoder"],
        "diffusability": ["linear_predictor_loss", "velocity_irreducible_variance"],
        "distances": ["frechet_distance", "inception_score", "kernel_distance", "precision_recall"],
        "equivariance": ["measure_equivariance"],
        "feature_networks": [
            "FEATURE_NETWORKS",
            "FeatureNetwork",
            "ModuleFeatures",
            "load_feature_network",
            "register_feature_network",
        ],
        "generation": ["evaluate_generation", "evaluate_reconstruction"],
        "latent_statistics": ["channel_statistics", "intrinsic_dimension", "radial_power_spectrum"],
        "networks.dinov2": ["DINOv2Features"],
        "networks.inception": ["InceptionFID"],
        "perception": ["SegmentationConfusion", "depth_errors"],
        "reconstruction": ["psnr", "ssim"],
        "result_card": ["ResultCard", "compare_cards"],
    },
)
