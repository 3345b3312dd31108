"""A tiny pipeline of every kind of generator, random in every layer."""

from __future__ import annotations

import torch

from diffusers_eqvae.models.transformer_maskgit import MaskGITTransformer2DModel
from diffusers_eqvae.models.transformer_sit import SiTTransformer2DModel
from diffusers_eqvae.objectives import OBJECTIVES
from diffusers_eqvae.pipelines import ClassConditionalPipeline, MaskGITPipeline

SIZES = {"sample_size": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_classes": 3}
KINDS = {
    "SiT": (SiTTransformer2DModel, {}),
    "DiT": (SiTTransformer2DModel, {"objective": "denoising", "prediction_type": "epsilon", "learn_sigma": True}),
    "LightningDiT": (SiTTransformer2DModel, {"norm": "rms_norm", "feed_forward": "swiglu", "rotary": True}),
    "MaskGIT": (MaskGITTransformer2DModel, {"codebook_size": 16}),
}


def make_pipeline(kind: str, autoencoder, vq_model) -> ClassConditionalPipeline:
    """With the scheduler that its objective trains for."""
    model_class, options = KINDS[kind]
    torch.manual_seed(0)
    model = model_class(**SIZES, **options).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1 or not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    scheduler = OBJECTIVES[model.config.objective](model).scheduler()
    id2label = {0: "otter", 1: "swan"}
    if kind == "MaskGIT":
        return MaskGITPipeline(model, vq_model, scheduler, id2label=id2label)
    return ClassConditionalPipeline(model, autoencoder, scheduler, id2label=id2label)
