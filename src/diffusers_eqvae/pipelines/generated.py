"""Images of a pipeline as batches in memory, for measuring without files in between."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..images import UINT8_RULE
from .sampling import identities, plan_blocks, sample_block, sampled_classes, scheduler_settings


class GeneratedImages:
    """Batches of samples uint8 (B, H, W, 3), made while they are read; image n is a function of (seed, n).

    Args:
        pipeline: a class-conditional pipeline.
        num_samples: of the whole set.
        batch_size: images per call of the pipeline.
        seed, label_policy: as `sampling.sample_block` takes them.
        rank, world_size: this process makes a consecutive stretch of the blocks.
        options: passed to the pipeline (guidance_scale, guidance_interval, num_inference_steps ...).

    Attributes:
        settings: of the sampler, for a result card; `nfe` is there once a batch has been made.
        classes: of the whole set, by names and counts.
        protocol: label policy and uint8 rule, for a result card.

    Example:
        >>> for images_uint8 in GeneratedImages(pipeline, 1000, batch_size=50, guidance_scale=1.8):
        ...     collector.add(images_uint8)
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
        self.pipeline, self.options = pipeline, {"seed": seed, "label_policy": label_policy, **options}
        blocks = plan_blocks(num_samples, batch_size)
        if world_size > len(blocks):
            raise ValueError(
                f"{num_samples} images in batches of {batch_size} are {len(blocks)} calls, too few for {world_size} "
                "processes. Take smaller batches or fewer processes."
            )
        self.blocks = blocks[rank * len(blocks) // world_size : (rank + 1) * len(blocks) // world_size]
        self.classes = sampled_classes(pipeline, num_samples, pipeline.class_ids, seed=seed, policy=label_policy)
        self.protocol = {"label_policy": label_policy, "uint8_rule": UINT8_RULE}
        self.settings: dict[str, Any] = {
            **options,
            "seed": seed,
            "scheduler": scheduler_settings(pipeline.scheduler),
            **identities(pipeline),
            "dtype": str(next(pipeline.transformer.parameters()).dtype).removeprefix("torch."),
        }

    def __iter__(self) -> Iterator[np.ndarray]:
        class_ids = self.pipeline.class_ids
        for block in self.blocks:
            made = sample_block(self.pipeline, block, class_ids, **self.options)
            self.settings["nfe"] = made["nfe"]
            yield made["arr_0"]
