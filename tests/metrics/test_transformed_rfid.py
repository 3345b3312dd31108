"""rFID between tau(x) and D(tau(E(x))): transcribed for one scale, and zero where the decoder follows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffusers_eqvae.autoencoders import decode, encode
from diffusers_eqvae.images import to_uint8
from diffusers_eqvae.metrics.autoencoder import OFFERS, reconstruct
from diffusers_eqvae.metrics.base import build_metrics, measure
from diffusers_eqvae.metrics.distances import frechet_distance
from diffusers_eqvae.metrics.feature_networks import ModuleFeatures


def test_the_distance_is_that_of_transformed_images(tiny_autoencoder_kl):
    network = ModuleFeatures(nn.AdaptiveAvgPool2d(1), name="colours")
    pixels = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    (metric,) = build_metrics(["transformed_rfid"], offers=OFFERS, network=network)
    digests = torch.arange(24, dtype=torch.uint8)[:, None]
    figures = measure([metric], [(range(24), reconstruct(tiny_autoencoder_kl, pixels) | {"digests": digests})]).figures
    assert set(figures) == {"rfd_colours_at_0.25", "rfd_colours_at_0.5", "rfd_colours_at_0.75"}

    def shrunk(values: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(values, scale_factor=0.5, mode="bilinear", align_corners=False)

    expected = []
    with torch.no_grad():
        for turns in (1, 2, 3):
            latents = torch.rot90(shrunk(encode(tiny_autoencoder_kl, pixels).mode()), turns, (2, 3))
            pair = decode(tiny_autoencoder_kl, latents), torch.rot90(shrunk(pixels), turns, (2, 3))
            features = [network(to_uint8(each))["features"].double() for each in pair]
            moments = [part for each in features for part in (each.mean(0), each.T.cov())]
            expected.append(frechet_distance(*moments))
    figure = figures["rfd_colours_at_0.5"]
    assert figure.value == pytest.approx(sum(expected) / 3, rel=1e-6) and figure.error > 0 and figure.n == 24
