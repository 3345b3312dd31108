"""Features, components, clusters and probes: what each must find in latents that were made to hold it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusers_eqvae import AlignmentNetwork, LatentNormalization
from diffusers_eqvae.images import latent_pca
from diffusers_eqvae.perception import (
    LinearProbe,
    Standardization,
    cluster_cells,
    kmeans,
    latent_features,
    pooled_features,
)
from diffusers_eqvae.perception.clusters import _lloyd
from diffusers_eqvae.perception.features import load_alignment_network, to_rows


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def network() -> AlignmentNetwork:
    torch.manual_seed(0)
    return AlignmentNetwork(latent_channels=4, hidden_size=8, feature_size=3)


def test_without_a_network_latents_are_their_features(latents):
    features = latent_features(latents.to(torch.bfloat16))
    assert features.cls is None and torch.equal(features.patch, latents.to(torch.bfloat16).float())


def test_a_network_sees_raw_latents_whatever_came(latents, network):
    expected = network(latents)
    normalization = LatentNormalization(mean=(0.1, 0.2, 0.3, 0.4), std=(1.0, 2.0, 3.0, 4.0))
    for came, options in ((latents, {}), (normalization.normalize(latents), {"normalization": normalization})):
        features = latent_features(came, network, **options)
        assert torch.allclose(features.patch, expected.patch, atol=1e-5)
        assert torch.allclose(features.cls, expected.cls, atol=1e-5)
        assert not features.patch.requires_grad


def test_a_window_holds_the_cells_around(latents):
    patch = latent_features(latents, window=3).patch.view(2, 4, 9, 5, 6)
    assert torch.equal(patch[:, :, 4], latents)
    assert torch.equal(patch[:, :, 0, 1:, 1:], latents[:, :, :-1, :-1])
    assert torch.equal(patch[:, :, 8, :-1, :-1], latents[:, :, 1:, 1:])
    assert torch.equal(patch[:, :, 0, 0, 0], latents[:, :, 0, 0])  # the border is repeated


def test_features_refuse_what_they_cannot_read(latents, network):
    with pytest.raises(ValueError, match="odd"):
        latent_features(latents, window=2)
    with pytest.raises(ValueError, match=r"\(B, C, h, w\)"):
        latent_features(latents[0])
    with pytest.raises(ValueError, match="reads latents"):
        latent_features(latents[:, :3], network)


def test_a_network_is_found_beside_its_autoencoder(tmp_path, network, tiny_autoencoder_kl):
    tiny_autoencoder_kl.save_pretrained(tmp_path / "run")
    network.save_pretrained(tmp_path / "run" / "alignment_network")
    for name in (tmp_path / "run", tmp_path / "run" / "alignment_network"):
        loaded = load_alignment_network(str(name))
        assert not loaded.training and all(map(torch.equal, loaded.parameters(), network.parameters()))


def test_a_directory_without_a_network_is_named_without_asking_the_hub(tmp_path, tiny_autoencoder_kl):
    (tmp_path / "empty").mkdir()
    tiny_autoencoder_kl.save_pretrained(tmp_path / "run")
    pipeline = tmp_path / "pipeline"
    tiny_autoencoder_kl.save_pretrained(pipeline / "vae")
    (pipeline / "model_index.json").write_text("{}")
    for folder, holds, missing in (
        ("empty", "no model", "config.json"),
        ("run", "a AutoencoderKL and no alignment network", "alignment_network/config.json"),
        ("pipeline", "a AutoencoderKL and no alignment network", "vae/alignment_network/config.json"),
    ):
        with pytest.raises(ValueError) as refused:
            load_alignment_network(str(tmp_path / folder))
        said = f"{tmp_path / folder} holds {holds}: there is no {tmp_path / folder / missing}. Name another, or train"
        assert str(refused.value).startswith(said)


def test_pooled_features_are_the_mean_and_the_cls(latents, network):
    assert torch.allclose(pooled_features(latent_features(latents)), latents.mean((2, 3)))
    features = latent_features(latents, network)
    assert torch.equal(pooled_features(features)[:, 3:], features.cls)


def test_standardised_features_have_unit_variance_and_constants_stay_finite():
    rows = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 9.0, 0.0]) + 2
    standard = Standardization.of(rows)(rows)
    assert torch.allclose(standard.mean(0), torch.zeros(3), atol=1e-6)
    assert torch.allclose(standard.std(0, correction=0), torch.tensor([1.0, 1.0, 0.0]), atol=1e-5)


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


def blobs(count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points in `count` heaps, well apart, heap k with `size` + k of them; and their heaps."""
    generator = torch.Generator().manual_seed(1)
    heaps = torch.arange(count).repeat_interleave(torch.arange(size, size + count))
    centres = torch.randn(count, 5, generator=generator) * 20
    return centres[heaps] + 0.1 * torch.randn(len(heaps), 5, generator=generator), heaps


def test_kmeans_finds_separate_heaps_in_any_order():
    points, heaps = blobs(6, 10)
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(2))
    for seed in range(5):
        labels, centres = kmeans(points[order], 6, seed=seed)
        assert torch.equal(labels, 5 - heaps[order])  # numbered by falling size
        assert torch.allclose(centres[0], points[heaps == 5].mean(0), atol=1e-5)


def test_kmeans_is_a_function_of_points_and_seed_and_ends_in_a_fixed_point():
    points = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    labels, centres = kmeans(points, 7, seed=3)
    again = kmeans(points, 7, seed=3)
    assert torch.equal(labels, again[0]) and torch.equal(centres, again[1])
    assert torch.equal(labels, torch.cdist(points, centres).argmin(1))
    for cluster in range(7):
        assert torch.allclose(centres[cluster], points[labels == cluster].mean(0), atol=1e-5)


def spread_within(points: torch.Tensor, result: tuple[torch.Tensor, torch.Tensor]) -> float:
    return (points - result[1][result[0]]).square().sum().item()


def test_kmeans_keeps_the_best_of_its_starts():
    points = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    single = [spread_within(points, kmeans(points, 8, seed=seed, restarts=1)) for seed in range(6)]
    best = [spread_within(points, kmeans(points, 8, seed=seed, restarts=8)) for seed in range(6)]
    assert all(several <= one for several, one in zip(best, single, strict=True))
    assert sum(best) < sum(single)


def test_a_cluster_without_points_moves_to_the_furthest():
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [50.0, 0.0], [51.0, 0.0], [0.0, 90.0]])
    starts = torch.tensor([[20.0, 10.0], [-900.0, 0.0], [-950.0, 0.0]])
    _, labels, centres = _lloyd(points, starts, 100)
    assert len(_lloyd(points, starts, 1)[1].unique()) == 3  # two such clusters do not move to one point
    assert labels[4] not in labels[:4] and len(labels.unique()) == 3
    assert sorted(centres[:, 0].tolist()) == [0.0, 0.5, 50.5]


def test_kmeans_bears_equal_points_and_refuses_the_impossible():
    labels, centres = kmeans(torch.ones(6, 2), 3)
    assert labels.unique().tolist() == [0] and centres.isfinite().all()
    for points, clusters, message in (
        (torch.ones(2, 2), 3, r"1\.\.2"),
        (torch.ones(2, 2), 0, r"1\.\.2"),
        (torch.full((2, 2), torch.nan), 1, "finite"),
        (torch.ones(2), 1, "finite points"),
    ):
        with pytest.raises(ValueError, match=message):
            kmeans(points, clusters)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_kmeans_computes_in_float32_or_more(dtype):
    points, heaps = blobs(6, 10)
    labels, centres = kmeans(points.to(dtype), 6)
    assert torch.equal(labels, 5 - heaps) and centres.dtype == torch.float32
    assert kmeans(points.double(), 6)[1].dtype == torch.float64


def test_channels_weigh_the_same_in_clusters():
    """Halves that differ by a little in two channels, beside noise a hundred times larger in a third."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 3, 8, 8, generator=generator) * torch.tensor([0.01, 0.01, 30.0]).view(1, 3, 1, 1)
    features[:, :2, :, 4:] += 1.0
    labels = cluster_cells(features, 2)
    assert len(labels[..., :4].unique()) == len(labels[..., 4:].unique()) == 1 and len(labels.unique()) == 2


def test_clusters_turn_with_the_image():
    features = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    features[:, 0, :3] += 30
    features[:, 1, :2, :2] += 30
    plain = cluster_cells(features, 3)
    turned = cluster_cells(torch.rot90(features, 1, (2, 3)), 3)
    assert torch.equal(turned, torch.rot90(plain, 1, (1, 2)))
    assert plain.unique(return_counts=True)[1].tolist() == [18, 14, 4]


def test_the_probe_is_ridge_regression():
    generator = np.random.default_rng(0)
    x, labels = generator.normal(size=(30, 4)) * [1, 5, 0.1, 2], generator.integers(0, 3, 30)
    probe = LinearProbe.fit(torch.tensor(x), torch.tensor(labels), ridge=0.1)
    standard = (x - x.mean(0)) / x.std(0)
    # Ridge as least squares with sqrt(ridge N) I below the data, and an offset that it does not reach.
    rows = np.vstack([np.c_[standard, np.ones(30)], np.c_[np.sqrt(0.1 * 30) * np.eye(4), np.zeros(4)]])
    solution = np.linalg.lstsq(rows, np.vstack([np.eye(3)[labels], np.zeros((4, 3))]), rcond=None)[0]
    assert np.allclose(probe.weight, solution[:-1], atol=1e-12)
    assert np.allclose(probe(torch.tensor(x)), np.c_[standard, np.ones(30)] @ solution, atol=1e-12)


def test_the_probe_separates_heaps_and_does_not_care_about_scales():
    points, heaps = blobs(4, 20)
    probe = LinearProbe.fit(points[::2], heaps[::2])
    assert probe.accuracy(points[1::2], heaps[1::2]) == 1.0
    scaled = LinearProbe.fit(points[::2] * 1000 + 5, heaps[::2])
    assert torch.allclose(scaled(points * 1000 + 5), probe(points), atol=1e-3)
    with pytest.raises(ValueError, match="as many class ids"):
        LinearProbe.fit(points, heaps[:3])
    for dtype in (torch.int32, torch.uint8):
        assert torch.equal(LinearProbe.fit(points[::2], heaps[::2].to(dtype)).weight, probe.weight)
    with pytest.raises(ValueError, match="integers"):
        LinearProbe.fit(points, heaps.float())
    with pytest.raises(ValueError, match="start at 0; got -1"):
        LinearProbe.fit(points, heaps - 1)
    with pytest.raises(ValueError, match="ridge"):
        LinearProbe.fit(points, heaps, ridge=0.0)
