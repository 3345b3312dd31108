"""From class labels to images: the pipeline, its labels, and sampling many images reproducibly."""

from .._lazy import face

__getattr__, __dir__, __all__ = face(
    __name__,
    {
        "generated": ["GeneratedImages"],
        "guider_sigma_interval": ["SigmaIntervalGuidance"],
        "labels": ["parse_id2label", "resolve_class_labels"],
        "modular_class_conditional": ["ClassConditionalBlocks"],
        "pipeline_class_conditional": ["ClassConditionalPipeline", "ClassConditionalPipelineOutput"],
        "pipeline_maskgit": ["MaskGITPipeline"],
        "sampling": ["load_guide", "load_pipeline", "sample_generators", "sample_labels"],
        "sweep": ["guidance_sweep"],
    },
)
