"""Images in, latents kept: image data sets, the latent store, and the order in which examples are drawn."""

from .._lazy import face

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "image_datasets": ["ImageSource", "PixelDataset", "load_image_dataset"],
        "latent_data": ["LatentData"],
        "latent_format": ["FeatureSettings", "StoreSettings"],
        "latent_store": ["LatentStore"],
        "latent_writer": ["LatentStoreWriter"],
    },
)
