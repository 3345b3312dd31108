"""Networks as diffusers models: autoencoders, the transformer, and what is trained beside them."""

from .._lazy import face

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "alignment_network": ["AlignmentNetwork"],
        "autoencoder_kl_eq": ["AutoencoderKLEQ"],
        "autoencoder_vq_eq": ["VQModelEQ"],
        "backbone": ["Backbone", "BackboneOutput", "backbone_class", "backbones", "register_backbone"],
        "discriminator": ["PatchDiscriminator"],
        "feature_projector": ["FeatureProjector"],
        "feature_teacher": ["FeatureTeacher"],
        "transformer_maskgit": ["MaskGITTransformer2DModel"],
        "transformer_sit": ["SiTTransformer2DModel"],
    },
)
