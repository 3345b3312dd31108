"""Images of a pipeline as batches in memory, for measuring without files in between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..images import UINT8_RULE
from .sampling import identities, plan_blocks, require_finite, sample_generators, sample_labels, scheduler_facts


class GeneratedImages:
    """Batches of samples uint8 (B, H, W, 3), made while they are read; image n is a function of (seed, n).

    Args:
        pipeline: a class-conditional pipeline.
        num_samples: of the whole set.
        batch_size: images per call of the pipeline.
        seed, label_policy: as `pipelines/sample.py` takes them.
        rank, world_size: this process makes a consecutive stretch of the blocks.
        options: passed to the pipeline (guidance_scale, guidance_interval, num_inference_steps ...).

    Raises:
        ValueError: fewer batches than processes; while they are read: latents that are not finite, which 8 bits
            would turn into a image like any other.

    Attributes:
        facts: settings of the sampler for a result card; `nfe` is there once a batch has been made.
        rules: label policy and uint8 rule, for its protocol.
    """

    def __init__(
        self,
        pipeline: Any,
        num_samples: int,
        *,
        batch_size: int,
        seed: int = 0,
        label_policy: str = "random",
        rank: int = 0,
        world_size: int = 1,
        **options: Any,
    ) -> None:
        self.pipeline = pipeline
        self.seed = seed
        self.label_policy = label_policy
        self.options = options
        self.class_ids: Sequence[int] = range(pipeline.transformer.config.num_classes)
        blocks = plan_blocks(num_samples, batch_size)
        if world_size > len(blocks):
            raise ValueError(
                f"{num_samples} images in batches of {batch_size} are {len(blocks)} calls, too few for {world_size} "
                "processes. Take smaller batches or fewer processes."
            )
        self.blocks = blocks[rank * len(blocks) // world_size : (rank + 1) * len(blocks) // world_size]
        self.rules = {"label_policy": label_policy, "uint8_rule": UINT8_RULE}
        self.facts: dict[str, Any] = {
            **options,
            "seed": seed,
            "scheduler": scheduler_facts(pipeline.scheduler),
            **identities(pipeline),
            "dtype": str(next(pipeline.transformer.parameters()).dtype).removeprefix("torch."),
        }

    def __iter__(self) -> Iterator[np.ndarray]:
        for block in self.blocks:
            labels = sample_labels(self.class_ids, block, seed=self.seed, policy=self.label_policy)
            generators = sample_generators(self.seed, block)
            output = self.pipeline(labels, generator=generators, callback_on_step_end=require_finite, **self.options)
            self.facts["nfe"] = output.nfe
            yield np.stack([np.asarray(image) for image in output.images])
