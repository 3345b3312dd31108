"""The equivariance error of EQ-VAE as a metric module of Hugging Face `evaluate`."""

# evaluate reads the imports of a metric module line by line: one module to a line.
import datasets
import evaluate
import numpy as np
import torch

from diffusers_eqvae.equivariance import equivariance_error

_DESCRIPTION = """
Relative squared error |tau(E(x)) - E(tau(x))|^2 / |E(tau(x))|^2 of latents under a transform tau (EQ-VAE, arXiv
2502.09509, table 1), averaged over images; and the same with |E(tau(x))|^2 taken around the channel means.
"""
_INPUTS = """
Args:
    predictions: transformed latents tau(E(x)), (C, h, w) each.
    references: latents of transformed images E(tau(x)), of the same shapes; shapes may differ between images.
Returns:
    equivariance_error: mean over images, 0 = equivariant.
    equivariance_error_centred: the same, which an offset of the latents cannot flatter.
"""
_CITATION = (
    "Kouzelis et al., EQ-VAE: Equivariance Regularized Latent Space for Improved Generative Image Modeling, 2025"
)


class EquivarianceError(evaluate.Metric):
    """See `_DESCRIPTION`; `add_batch` takes latents (B, C, h, w) as arrays or nested lists."""

    def _info(self) -> evaluate.MetricInfo:
        latents = datasets.Sequence(datasets.Sequence(datasets.Sequence(datasets.Value("float32"))))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": latents, "references": latents}),
        )

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        plain: list[float] = []
        centred: list[float] = []
        for prediction, reference in zip(predictions, references, strict=True):
            transformed, encoded = (
                torch.from_numpy(np.array(latents, dtype=np.float64))[None] for latents in (prediction, reference)
            )
            plain.append(equivariance_error(encoded, transformed).item())
            centred.append(equivariance_error(encoded, transformed, centred=True).item())
        return {
            "equivariance_error": float(np.mean(plain)),
            "equivariance_error_centred": float(np.mean(centred)),
        }
