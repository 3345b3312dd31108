"""`eqvae inspect`: is this autoencoder's latent space easy to generate in? A health card with a verdict."""
