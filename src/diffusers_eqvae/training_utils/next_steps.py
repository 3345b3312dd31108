"""What to do after each verdict on two autoencoders (`inspection.compatibility`), in the commands of this package."""

from __future__ import annotations

NEXT = {
    "drop-in": "Put NEW in the place of BASE; generators, latent stores and adapters stay as they are.",
    "decoder-only swap": "Decode by NEW what the old generator draws, and go on encoding by BASE: only the decoder of "
    "pipe.vae (with post_quant_conv) is NEW's.",
    "affine fit suffices": "Map NEW's latents onto BASE's by the fit that eqvae compat NEW BASE --data_dir IMAGES "
    "--output CARD.json writes (details.affine). Per channel it is a latents_mean and latents_std of NEW's config, "
    "which is printed; over all channels a 1x1 convolution.",
    "needs adaptation": "Encode the data again and go on training the generator: eqvae encode-latents --vae NEW "
    "--train_data_dir DATA --output_dir LATENTS, then eqvae train-transformer --model OLD --latents_dir LATENTS. A "
    "UNet of SD or SDXL is trained by its own trainer, with NEW as its --vae.",
}
