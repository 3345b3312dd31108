"""What each regularizer asks for, measured of any autoencoder: a metric of its own for docs/results.md.

    eqvae evaluate-autoencoder --extension docs/results/regularizer_quantities.py --vae VAE --data_dir IMAGES \
        --resolution 64 --metrics regularizer_quantities --regularizer_quantities_anchor ANCHOR --output card.json
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from diffusers_eqvae.autoencoders import decode, encode, load_autoencoder
from diffusers_eqvae.metrics.base import Figure, PerImageMetric, register_metric
from diffusers_eqvae.metrics.reconstruction import psnr
from diffusers_eqvae.regularizers.latent_masking import FOLDER, MaskToken
from diffusers_eqvae.regularizers.local_correlation import local_correlation

# All autoencoders and images meet the same noise, and the same hidden cells.
NOISE_SHARE, HIDDEN_SHARE, PREFIX, SEED = 0.5, 0.25, 2, 0
BETTER = {"psnr_noisy": "higher", "psnr_prefix": "higher", "psnr_masked": "higher"}


@dataclass
class RegularizerQuantitiesArguments:
    """Whose latents the distance is taken to."""

    regularizer_quantities_anchor: str = field(
        default="", metadata={"reads": True, "help": "The autoencoder that all were fine-tuned from."}
    )


@register_metric("regularizer_quantities")
class RegularizerQuantities(PerImageMetric):
    """PSNR of what is decoded from latents with noise, with channels or cells left out; and three figures of latents.

    psnr_noisy: half noise of the standard deviation of each channel (`noise`). psnr_prefix: the first two channels
    (`channel_prefix`). psnr_masked: a quarter of the cells replaced by the token, without one by the channels' means
    (`latent_masking`). neighbour_correlation: of latents of mean 0 and std 1 per channel (`local_correlation`).
    posterior_width: its std by that of the means (`variance_expansion`). anchor_distance: squared, by the variance of
    the anchor's latents (`latent_anchor`). Mean and std are those of the autoencoder's config.
    """

    needs = frozenset({"images", "posteriors", "autoencoder"})
    Arguments = RegularizerQuantitiesArguments

    @classmethod
    def from_arguments(cls, arguments=None, **others):
        return cls(load_autoencoder(arguments.regularizer_quantities_anchor))

    def __init__(self, anchor):
        super().__init__()
        self.anchor = anchor

    def rows(self, batch):
        vae, images, posterior = (batch[name] for name in ("autoencoder", "images", "posteriors"))
        raw = posterior.mode()
        mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(1, -1, 1, 1) for name in ("mean", "std"))
        generator = torch.Generator().manual_seed(SEED)
        noise = torch.randn(raw.shape[1:], generator=generator)
        cells = torch.rand(raw.shape[-2:], generator=generator)
        hidden = cells <= cells.flatten().kthvalue(round(HIDDEN_SHARE * cells.numel())).values
        token = MaskToken.saved_beside(vae, FOLDER, latent_channels=raw.shape[1])
        stand_in = mean if token is None else token.token.detach().view(1, -1, 1, 1)
        kept = (torch.arange(raw.shape[1]) < PREFIX).view(1, -1, 1, 1)
        edited = {
            "psnr_noisy": (1 - NOISE_SHARE) * raw + NOISE_SHARE * std * noise,
            "psnr_prefix": raw * kept,
            "psnr_masked": torch.where(hidden, stand_in, raw),
        }
        rows = {name: psnr(decode(vae, latents), images) for name, latents in edited.items()}
        latents = (raw - mean) / std
        rows["neighbour_correlation"] = torch.stack([local_correlation(each[None]) for each in latents])
        rows["posterior_width"] = (posterior.logvar.exp() / std.square()).mean((1, 2, 3)).sqrt()
        anchored = encode(self.anchor, images).mean
        variance = torch.tensor(self.anchor.config["latents_std"]).square().view(1, -1, 1, 1)
        rows["anchor_distance"] = ((raw - anchored).square() / variance).mean((1, 2, 3))
        return rows

    def compute(self):
        return {name: Figure.mean(values, better=BETTER.get(name)) for name, values in self.joined().items()}
