"""Autoencoders whose latents are easy to generate, and class-conditional generators trained on them.

Importing this package makes its models, schedulers and pipelines loadable by diffusers. The names below are what most
programs need; every subpackage has a face of its own (`diffusers_eqvae.metrics`, `diffusers_eqvae.data`, ...).
"""

from ._lazy import face
from ._registration import REMEDY as _REMEDY
from ._registration import register_rooms as _register_rooms

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "_registration": ["BaseGuidance", "DiffusionPipeline", "ModelMixin", "SchedulerMixin"],
        "models": [
            "AlignmentNetwork",
            "AutoencoderKLEQ",
            "FeatureTeacher",
            "PatchDiscriminator",
            "SiTTransformer2DModel",
            "VQModelEQ",
        ],
        "schedulers": ["FlowMatchODEScheduler", "FlowMatchSDEScheduler"],
        "pipelines": ["ClassConditionalPipeline", "ClassConditionalPipelineOutput", "load_pipeline"],
        "autoencoders": ["Posterior", "load_autoencoder"],
        "equivariance": ["Tau", "TauDistribution", "equivariance_error"],
        "guidance": ["IntervalGuidance"],
        "latents": ["LatentNormalization", "LatentStatistics"],
        "extensions": ["load_extension"],
        "regularizers": ["AlignmentRegularizer", "EquivarianceRegularizer"],
        "objectives": ["AutoencoderObjective", "AutoencoderStep"],
        "losses": ["LPIPS", "flow_matching_loss"],
        "data": ["LatentStore", "load_image_dataset"],
        "metrics": ["ResultCard", "evaluate_generation", "measure_equivariance", "psnr", "ssim"],
        "conversion": ["from_published", "to_published"],
        "hub": ["push_run"],
    },
    hint=_REMEDY,
)

_register_rooms()
