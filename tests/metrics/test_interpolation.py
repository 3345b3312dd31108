"""Similar latents and the arc between two, against formulas written out; iFID against its own transcription."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from diffusers_eqvae.autoencoders import decode, encode
from diffusers_eqvae.images import to_uint8
from diffusers_eqvae.metrics.autoencoder import OFFERS, reconstruct
from diffusers_eqvae.metrics.base import METRICS, build_metrics, measure
from diffusers_eqvae.metrics.distances import frechet_distance
from diffusers_eqvae.metrics.feature_networks import ModuleFeatures
from diffusers_eqvae.metrics.interpolation import draw_neighbours, most_similar, slerp

COUNT = 24


def rows(count: int, dimension: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block_size", [1, 4, 100])
def test_the_most_similar_rows_are_those_of_the_largest_cosine(block_size):
    given = rows(17, 5).double().numpy()
    cosines = np.array([[a @ b / math.sqrt(a @ a * (b @ b)) for b in given] for a in given])
    np.fill_diagonal(cosines, -2)
    expected = np.argsort(-cosines, axis=1)[:, :3]
    assert most_similar(torch.from_numpy(given), 3, block_size=block_size).tolist() == expected.tolist()
    with pytest.raises(ValueError, match="17 other rows need at least 18; got 17"):
        most_similar(torch.from_numpy(given), 17)


def test_neighbours_are_drawn_by_their_distance():
    """Two candidates, at mean squares of 0 and log 3: three draws of four are the first."""
    first = torch.tensor([1.0, 0.0])
    far = first + torch.tensor([math.sqrt(2 * math.log(3)), 0.0])  # the same direction, and so as similar
    drawn = [draw_neighbours(torch.stack([first, first, far]), 2, seed=seed)[0].item() for seed in range(400)]
    assert drawn.count(1) / 400 == pytest.approx(0.75, abs=0.07)
    given = rows(9, 6)
    assert torch.equal(draw_neighbours(given, 3, seed=5), draw_neighbours(given, 3, seed=5))
    assert (draw_neighbours(given, 3, seed=5)[:, None] == most_similar(given, 3)).any(1).all()


def test_the_arc_between_two_latents():
    first, second = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]])
    assert torch.allclose(slerp(first, second, 0.5), torch.full((1, 1, 2), math.sqrt(2)))  # keeps the length
    third = slerp(first, second, 1 / 3)[0, 0]
    assert torch.atan2(third[1], third[0]).item() == pytest.approx(math.pi / 6)
    for share, end in ((0.0, first), (1.0, second)):
        assert torch.allclose(slerp(first, second, share), end, atol=1e-6)
    assert torch.allclose(slerp(first, 3 * first, 0.5), 2 * first)  # no angle: a straight line
    assert torch.equal(slerp(first, first, 0.5), first)


def measured(vae, pixels, network, **options):
    arguments = METRICS["ifid"].Arguments(**options)
    metrics = build_metrics(["ifid", "rfid"], {"ifid": arguments}, offers=OFFERS, network=network)
    batch = reconstruct(vae, pixels) | {"digests": torch.arange(len(pixels), dtype=torch.uint8)[:, None]}
    for name, key in (("features", "images"), ("reconstructed_features", "reconstructions")):
        batch[name] = {network.name: network(to_uint8(batch[key]))}
    return measure(metrics, [(range(len(pixels)), batch)]).figures


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(COUNT, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def network() -> ModuleFeatures:
    return ModuleFeatures(nn.AdaptiveAvgPool2d(1), name="colours")


def test_ifid_is_the_distance_of_what_lies_half_way(tiny_autoencoder_kl, pixels, network):
    figure = measured(tiny_autoencoder_kl, pixels, network, ifid_neighbours=1)["ifd_colours"]
    with torch.no_grad():
        latents = encode(tiny_autoencoder_kl, pixels).mode().double().flatten(1)
        between = []
        for own in latents:  # the nearest, since one candidate leaves no choice
            cosines = [
                -2.0 if other is own else float(nn.functional.cosine_similarity(own, other, 0)) for other in latents
            ]
            cosines = [-2.0 if torch.equal(other, own) else each for each, other in zip(cosines, latents, strict=True)]
            other, angle = latents[int(np.argmax(cosines))], math.acos(max(cosines))
            between.append((math.sin(angle / 2) * own + math.sin(angle / 2) * other) / math.sin(angle))
        images = decode(tiny_autoencoder_kl, torch.stack(between).float().view(COUNT, 4, 8, 8))
        features = [network(to_uint8(each))["features"].double() for each in (images, pixels)]
    expected = frechet_distance(*(part for each in features for part in (each.mean(0), each.T.cov())))
    assert figure.value == pytest.approx(expected, rel=1e-4) and figure.n == COUNT and figure.error > 0


def test_at_no_way_at_all_ifid_is_rfid(tiny_autoencoder_kl, pixels, network):
    figures = measured(tiny_autoencoder_kl, pixels, network, ifid_share=0.0)
    assert figures["ifd_colours"].value == pytest.approx(figures["rfd_colours"].value, rel=1e-3, abs=1e-6)
    half = measured(tiny_autoencoder_kl, pixels, network)
    assert half["ifd_colours"].value != pytest.approx(half["rfd_colours"].value, rel=1e-2)


def test_of_equal_images_ifid_is_rfid_with_a_caveat(tiny_autoencoder_kl, pixels, network):
    figures = measured(tiny_autoencoder_kl, pixels[:1].expand(COUNT, -1, -1, -1), network)
    assert figures["ifd_colours"].value == pytest.approx(figures["rfd_colours"].value, rel=1e-3, abs=1e-6)
    few = measured(tiny_autoencoder_kl, pixels[:10], network)["ifd_colours"]
    assert math.isnan(few.value) and few.caveat == "undefined: 10 similar latents need more images than 10"
