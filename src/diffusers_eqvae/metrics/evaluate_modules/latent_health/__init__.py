"""The metric module latent_health."""
