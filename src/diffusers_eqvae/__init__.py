"""Autoencoders whose latents are easy to generate, and class-conditional generators trained on them."""

# diffusers looks these three up on the library of a saved component: they must be here, under these names.
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

from ._registration import register
from .equivariance import Tau, TauDistribution
from .guidance import IntervalGuidance
from .latents import LatentNormalization
from .models.alignment_network import AlignmentNetwork
from .models.autoencoder_kl_eq import AutoencoderKLEQ
from .models.discriminator import PatchDiscriminator
from .models.transformer_sit import SiTTransformer2DModel
from .pipelines.pipeline_class_conditional import ClassConditionalPipeline, ClassConditionalPipelineOutput
from .schedulers.scheduling_flow_match_ode import FlowMatchODEScheduler
from .schedulers.scheduling_flow_match_sde import FlowMatchSDEScheduler

__version__ = "0.1.0"

register(
    [
        AlignmentNetwork,
        AutoencoderKLEQ,
        PatchDiscriminator,
        SiTTransformer2DModel,
        FlowMatchODEScheduler,
        FlowMatchSDEScheduler,
        ClassConditionalPipeline,
    ]
)

__all__ = [
    "AlignmentNetwork",
    "AutoencoderKLEQ",
    "ClassConditionalPipeline",
    "ClassConditionalPipelineOutput",
    "DiffusionPipeline",
    "FlowMatchODEScheduler",
    "FlowMatchSDEScheduler",
    "IntervalGuidance",
    "LatentNormalization",
    "ModelMixin",
    "PatchDiscriminator",
    "SchedulerMixin",
    "SiTTransformer2DModel",
    "Tau",
    "TauDistribution",
]
