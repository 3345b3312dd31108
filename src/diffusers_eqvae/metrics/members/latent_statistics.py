from __future__ import annotations

import torch

from ..base import Figure, PerImageMetric, register_metric
from ..latent_statistics import HIGH_FREQUENCY, channel_statistics, high_frequency_share, radial_power_spectrum


@register_metric("latent_statistics")
class LatentStatistics(PerImageMetric):
    """`high_frequency`: share of the latents' variance above a quarter cycle per position, the mean over images.

    As details: `spectrum` {frequency in cycles per position, power relative to its mean, so that the scale of the
    latents does not matter}, and `channels` {mean, std, kurtosis}. The latents are the posterior mean.
    """

    needs = frozenset({"posteriors"})

    def rows(self, batch):
        raw_latents = batch["posteriors"].mode()
        return {
            "high_frequency": high_frequency_share(raw_latents),
            "spectrum": radial_power_spectrum(raw_latents),
            "raw_latents": raw_latents,
        }

    def compute(self):
        return {"high_frequency": Figure.mean(self.joined()["high_frequency"], better="lower")}

    def details(self):
        rows = self.joined()
        spectrum, side = rows["spectrum"].double().mean(0), min(rows["raw_latents"].shape[-2:])
        relative = spectrum / spectrum[1:].mean().clamp_min(torch.finfo(spectrum.dtype).tiny)
        return {
            "spectrum": {
                "frequency": [k / side for k in range(1, len(spectrum))],
                "power": relative[1:].tolist(),
            },
            "high_frequency_above": HIGH_FREQUENCY,
            "channels": channel_statistics(rows["raw_latents"]),
        }
