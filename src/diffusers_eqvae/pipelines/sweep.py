"""The same noise under several guidances: what scale and interval do to a sample, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .pipeline_class_conditional import ClassConditionalPipeline, ClassConditionalPipelineOutput
from .sampling import sample_generators


def guidance_sweep(
    pipeline: ClassConditionalPipeline,
    class_labels: Any,
    *,
    guidance_scales: Sequence[float],
    interval_ends: Sequence[float],
    seed: int = 0,
    **options: Any,
) -> list[list[ClassConditionalPipelineOutput]]:
    """One output for every guidance scale (rows) and every end hi of the interval [0, hi] (columns).

    Image n has the same initial noise in all of them, that of image n of a set with this seed (`sample_generators`).

    Args:
        class_labels: class id, name, or nested lists of them: the images of every output.
        guidance_scales: 1 = no guidance.
        interval_ends: in noise level sigma, 1 = noise.
        options: of the pipeline's call, e.g. `num_inference_steps`.

    Example:
        >>> sweep = guidance_sweep(pipeline, "otter", guidance_scales=[1, 2], interval_ends=[0.5, 1.0])
        >>> sweep[1][0].nfe < sweep[1][1].nfe
        True
    """
    label_ids = pipeline.resolve_class_labels(class_labels)

    def sampled(scale: float, end: float) -> Any:
        generator = sample_generators(seed, range(len(label_ids)))
        interval = (0.0, float(end))
        return pipeline(
            label_ids, guidance_scale=float(scale), guidance_interval=interval, generator=generator, **options
        )

    return [[sampled(scale, end) for end in interval_ends] for scale in guidance_scales]
