"""Training data of a generator: latents or tokens with labels, from a store or from images encoded on the way."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from diffusers import ModelMixin
from torch import Tensor

from ..autoencoders import Posterior, downsampling_factor, encode, encoder_features, last_encoder_layer
from ..classes import ClassTable
from ..latents import LatentNormalization, LatentStatistics
from ..randomness import StepRandomness
from ..stated_normalization import scale_complaint
from ..tokens import codebook, encode_tokens
from .image_datasets import PixelDataset
from .latent_store import LatentStore

logger = logging.getLogger(__name__)

CHECKED_IMAGES = 64
Reads = Literal["latents", "tokens"]


@dataclass
class LatentData:
    """Training data of a transformer: latents or tokens with labels, and the autoencoder that they belong to.

    Args:
        dataset: a `LatentStore` ("moments" or "tokens") or a `PixelDataset` ("pixel_values").
        vae: float32 and frozen.
        classes: names and counts by class id; a single one for data without labels.
        latent_shape: (C, h, w), or (h, w) of tokens.
        name: of the data, for the model card.
        wanted: what `read` gives besides: "pixel_values", or "features.NAME" of one in `features`.
        scale_remedy: what is said where normalised latents have a standard deviation far from 1, besides that.

    Example:
        >>> batch = latents.read(stored, run.randomness)
    """

    dataset: LatentStore | PixelDataset
    vae: ModelMixin
    classes: ClassTable
    latent_shape: tuple[int, ...]
    name: str | None
    wanted: frozenset[str] = field(default=frozenset())
    scale_remedy: str = "Check the normalisation in the config of the autoencoder."
    _statistics: LatentStatistics | None = field(default_factory=LatentStatistics, init=False, repr=False)

    @property
    def features(self) -> dict[str, int]:
        """Features of the images that `read` can give: name -> number of channels."""
        return {} if self.stored else {"vae_encoder": last_encoder_layer(self.vae).in_channels}

    @property
    def reads(self) -> Reads:
        """What an objective must read to be trained on these data."""
        return "tokens" if len(self.latent_shape) == 2 else "latents"

    @property
    def model_config(self) -> dict[str, Any]:
        """What the data leave no choice of in a backbone's config."""
        height, width = self.latent_shape[-2:]
        size: dict[str, Any] = {"sample_size": height if height == width else [height, width]}
        if self.reads == "tokens":
            return size | {"codebook_size": len(codebook(self.vae))}
        return size | {"in_channels": self.latent_shape[0]}

    @property
    def resolution_px(self) -> int:
        """Shorter side of the images behind the latents."""
        return min(self.latent_shape[-2:]) * downsampling_factor(self.vae)

    @cached_property
    def normalization(self) -> LatentNormalization:
        """Of the autoencoder, as its config says."""
        return LatentNormalization.from_vae(self.vae)

    @property
    def report(self) -> dict[str, Any]:
        """What was left out of the images, enlarged or replaced; see `DataReport.to_json`."""
        if isinstance(self.dataset, LatentStore):
            return self.dataset.manifest.get("report", {})
        return self.dataset.source.report.to_json()

    @property
    def stored(self) -> bool:
        return isinstance(self.dataset, LatentStore)

    @torch.no_grad()
    def read(self, batch: Mapping[str, Tensor], randomness: StepRandomness) -> dict[str, Tensor]:
        """What an objective trains on, of a batch on the device, in float32.

        Returns:
            "latents" (B, C, h, w): a sample of the posterior that was stored, or is encoded now, normalised; or
            "tokens" (B, h, w) int64; and whatever else the batch holds (features); "class_labels" are all 0 where the
            data have none.
        """
        with encoder_features(self.vae) as seen:
            values = self._tokens(batch) if self.reads == "tokens" else self._latents(batch, randomness)
        rest = {key: value for key, value in batch.items() if key not in ("moments", "tokens", "pixel_values")}
        rest.setdefault("class_labels", torch.zeros(len(values), dtype=torch.int64, device=values.device))
        more = {"pixel_values": batch.get("pixel_values"), "features.vae_encoder": seen[0] if seen else None}
        rest |= {name: value for name, value in more.items() if name in self.wanted and value is not None}
        return {self.reads: values, **rest}

    def _check_scale(self, posterior: Posterior) -> None:
        """Warns once, after the first images or by a store's statistics, where normalised latents have another std."""
        statistics = self._statistics
        assert statistics is not None
        if isinstance(self.dataset, LatentStore):
            statistics = self.dataset.statistics()
        else:
            statistics.update(posterior.mean, posterior.logvar)
        if statistics.num_samples >= min(CHECKED_IMAGES, len(self.dataset)):
            self._statistics = None
            if complaint := scale_complaint(self.normalization, statistics):
                logger.warning("%s %s", complaint, self.scale_remedy)

    def _tokens(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["tokens"].long() if self.stored else encode_tokens(self.vae, batch["pixel_values"])

    def _latents(self, batch: Mapping[str, Tensor], randomness: StepRandomness) -> Tensor:
        posterior = self._posterior(batch)
        if self._statistics is not None:
            self._check_scale(posterior)
        raw_latents = posterior.sample(randomness.randn(posterior.mean.shape, device=posterior.mean.device))
        return self.normalization.normalize(raw_latents)

    def _posterior(self, batch: Mapping[str, Tensor]) -> Posterior:
        if isinstance(self.dataset, LatentStore):
            return self.dataset.posterior(batch["moments"].float())
        return encode(self.vae, batch["pixel_values"])
