"""The health of latents as a metric module of Hugging Face `evaluate`."""

# evaluate reads the imports of a metric module line by line: one module to a line.
import datasets
import evaluate
import numpy as np
import torch

from diffusers_eqvae.metrics.latent_statistics import (
    channel_statistics,
    high_frequency_share,
    intrinsic_dimension_if_defined,
)

_DESCRIPTION = """
What latents look like to a generator: mean, standard deviation and excess kurtosis per channel, the share of their
variance above a quarter cycle per cell, and their intrinsic dimension (TwoNN, Facco et al. 2017).
"""
_INPUTS = """
Args:
    predictions: latents (C, h, w) of images, all of one shape.
Returns:
    mean, std, kurtosis: lists per channel.
    high_frequency: mean over images, 0 (smooth) to 1; white noise has .80.
    intrinsic_dimension: of the flattened latents; None below 10 different ones.
    num_samples: images.
"""
_CITATION = "Facco et al., Estimating the intrinsic dimension of datasets by a minimal neighborhood information, 2017"


class LatentHealth(evaluate.Metric):
    """See `_DESCRIPTION`; `add_batch` takes latents (B, C, h, w) as an array or nested lists."""

    def _info(self) -> evaluate.MetricInfo:
        latents = datasets.Sequence(datasets.Sequence(datasets.Sequence(datasets.Value("float32"))))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": latents}),
        )

    def _compute(self, predictions: list) -> dict:
        latents = torch.from_numpy(np.array(predictions, dtype=np.float32))
        return {
            **channel_statistics(latents),
            "high_frequency": high_frequency_share(latents).double().mean().item(),
            "intrinsic_dimension": intrinsic_dimension_if_defined(latents.flatten(1)),
            "num_samples": len(latents),
        }
