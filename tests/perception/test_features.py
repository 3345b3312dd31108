"""Features and components: what each must find in latents that were made to hold it."""

from __future__ import annotations

import pytest
import torch

from diffusers_eqvae import AlignmentNetwork, LatentNormalization
from diffusers_eqvae.clusters import to_rows
from diffusers_eqvae.images import latent_pca
from diffusers_eqvae.perception import latent_features


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def network() -> AlignmentNetwork:
    torch.manual_seed(0)
    network = AlignmentNetwork(latent_channels=4, hidden_size=8, feature_size=3)
    network.norm_weight.copy_(torch.tensor([1.0, 2.0, -3.0]))
    network.norm_bias.copy_(torch.tensor([0.5, 0.0, 1.0]))
    return network


def test_without_a_network_latents_are_their_features(latents):
    features = latent_features(latents.to(torch.bfloat16))
    assert features.cls is None and features.before_norm is None
    assert torch.equal(features.patch, latents.to(torch.bfloat16).float())


def test_a_network_sees_raw_latents_whatever_came_and_gives_both_kinds_of_features(latents, network):
    predicted = network(latents)
    norm = torch.nn.LayerNorm(3, eps=1e-6)
    norm.weight.data, norm.bias.data = network.norm_weight, network.norm_bias
    expected = norm(predicted.patch.movedim(1, -1)).movedim(-1, 1)
    normalization = LatentNormalization(mean=(0.1, 0.2, 0.3, 0.4), std=(1.0, 2.0, 3.0, 4.0))
    for came, options in ((latents, {}), (normalization.normalize(latents), {"normalization": normalization})):
        features = latent_features(came, network, **options)
        assert torch.allclose(features.before_norm.patch, predicted.patch, atol=1e-5)
        assert torch.allclose(features.before_norm.cls, predicted.cls, atol=1e-5)
        assert torch.allclose(features.patch, expected, atol=1e-3)
        assert torch.allclose(features.cls, norm(predicted.cls), atol=1e-3)
        assert not features.patch.requires_grad


def test_a_window_holds_the_positions_around(latents):
    patch = latent_features(latents, window=3).patch.view(2, 4, 9, 5, 6)
    assert torch.equal(patch[:, :, 4], latents)
    assert torch.equal(patch[:, :, 0, 1:, 1:], latents[:, :, :-1, :-1])
    assert torch.equal(patch[:, :, 8, :-1, :-1], latents[:, :, 1:, 1:])
    assert torch.equal(patch[:, :, 0, 0, 0], latents[:, :, 0, 0])  # the border is repeated


def test_a_window_without_a_middle_is_refused(latents):
    with pytest.raises(ValueError, match="must be odd, so that it has a middle; got 2"):
        latent_features(latents, window=2)


def test_three_components_hold_all_of_rank_three_features():
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(2, 3, 6, 6, generator=generator) * torch.tensor([4.0, 2.0, 1.0]).view(1, 3, 1, 1)
    mixing, _ = torch.linalg.qr(torch.randn(10, 3, generator=generator))
    features = torch.einsum("dk,bkhw->bdhw", mixing, factors)
    _, basis = latent_pca(features)
    assert torch.allclose(basis.T @ basis, torch.eye(3), atol=1e-5)
    assert torch.allclose(basis @ basis.T, mixing @ mixing.T, atol=1e-4)  # the same space: a rotation within it
    centred = to_rows(features) - to_rows(features).mean(0)
    assert torch.allclose(centred @ basis @ basis.T, centred, atol=1e-4)
