from __future__ import annotations

from ..base import Figure, PerImageMetric, register_metric
from ..equivariance import equivariance_per_image


@register_metric("equivariance")
class Equivariance(PerImageMetric):
    """What transforming latents costs against transforming images: `measure_equivariance`, and the gaps in dB.

    `gap_rotated` and `gap_halved` are the dB that decoding tau(E(x)) loses against decoding E(tau(x)); an equivariant
    decoder has 0. The latents are the posterior mean.
    """

    needs = frozenset({"images", "posteriors", "autoencoder"})

    def rows(self, batch):
        return equivariance_per_image(batch["autoencoder"], batch["images"], batch["posteriors"].mode())

    def compute(self):
        rows = self.joined()
        figures = {
            name: Figure.mean(values, unit="dB", better="higher")
            if name.startswith("psnr")
            else Figure.mean(values, better="lower")
            for name, values in rows.items()
        }
        for name in ("rotated", "halved") if "psnr_halved_latent" in rows else ("rotated",):
            bound, reached = f"psnr_{name}_pixels", f"psnr_{name}_latent"
            error = Figure.mean(rows[bound].double() - rows[reached].double()).error
            gap = figures[bound].value - figures[reached].value
            figures[f"gap_{name}"] = Figure(gap, error, figures[bound].n, "dB", "lower")
        return figures
