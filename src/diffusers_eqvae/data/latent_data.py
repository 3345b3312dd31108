"""Training data of a generator: latents or tokens with labels, from a store or from images encoded on the way."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from diffusers import ModelMixin
from torch import Tensor

from ..autoencoders import Posterior, downsampling_factor, encode, encoder_features
from ..classes import ClassTable
from ..latents import LatentNormalization, LatentStatistics
from ..randomness import StepRandomness
from ..stated_normalization import scale_complaint
from ..tokens import codebook, encode_tokens
from .image_datasets import PixelDataset
from .image_features import ENCODER, EncoderFeatures
from .latent_format import FeatureSettings, feature_tensor
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
        scale_remedy: what is said where normalised latents have a standard deviation far from 1, besides that.

    Example:
        >>> batch = latents.read(stored, run.randomness)
    """

    dataset: LatentStore | PixelDataset
    vae: ModelMixin
    classes: ClassTable
    latent_shape: tuple[int, ...]
    name: str | None
    wanted: frozenset[str] = field(default=frozenset(), init=False)
    scale_remedy: str = "Check the normalisation in the config of the autoencoder."
    _statistics: LatentStatistics | None = field(default_factory=LatentStatistics, init=False, repr=False)

    @property
    def features(self) -> dict[str, FeatureSettings]:
        """Features of the images that `read` can give, by name."""
        if isinstance(self.dataset, LatentStore):
            return self.dataset.settings.features
        grid = (self.latent_shape[-2], self.latent_shape[-1])
        return EncoderFeatures(self.vae, grid, dtype="float32").features

    def want(self, features: Iterable[str], *, pixels: bool = False) -> None:
        """Makes `read` give these features as well, as "features.NAME", and the images as "pixel_values"."""
        names = tuple(dict.fromkeys(features))
        self.wanted = frozenset(map(feature_tensor, names)) | ({"pixel_values"} if pixels else set())
        if isinstance(self.dataset, LatentStore):
            self.dataset.read_features(*names)

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
            "tokens" (B, h, w) int64; what `want` asked for, in float32; "class_labels" are all 0 where the data have
            none.
        """
        with encoder_features(self.vae) as seen:
            values = self._tokens(batch) if self.reads == "tokens" else self._latents(batch, randomness)
        given = {feature_tensor(ENCODER): seen[0], **batch} if seen else batch
        rest = {name: given[name].float() for name in sorted(self.wanted)}
        labels = batch.get("class_labels")
        none = torch.zeros(len(values), dtype=torch.int64, device=values.device)
        return {self.reads: values, "class_labels": none if labels is None else labels, **rest}

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
