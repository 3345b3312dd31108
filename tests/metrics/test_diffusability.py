"""Diffusability: covariances that are known, predictors that are solved, latents whose figures can be counted."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from diffusers_eqvae.autoencoders import Posterior
from diffusers_eqvae.metrics.base import METRICS, measure
from diffusers_eqvae.metrics.diffusability import (
    channel_normalized,
    kronecker_covariance,
    linear_predictor_loss,
    local_similarity,
    nearest_class_share,
    region_similarity,
    spectral_energy,
    velocity_irreducible_variance,
    velocity_residual,
)

CHANNELS, SIDE = 3, 4
POSITIONS = SIDE * SIDE


def factors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    channel, spatial = (torch.randn(n, n, generator=generator, dtype=torch.float64) for n in (CHANNELS, POSITIONS))
    return channel, spatial @ torch.diag(torch.linspace(0.1, 2, POSITIONS, dtype=torch.float64))


def draw(count: int, seed: int, mean: float = 0.0) -> torch.Tensor:
    channel, spatial = factors()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, CHANNELS, POSITIONS, generator=generator, dtype=torch.float64)
    return (channel @ noise @ spatial.T).view(count, CHANNELS, SIDE, SIDE) + mean


def eigenvalues() -> torch.Tensor:
    channel, spatial = factors()
    return torch.linalg.eigvalsh(torch.kron(channel @ channel.T, spatial @ spatial.T)).clamp_min(0)


def test_viv_of_a_known_covariance_and_its_error():
    """Exact within Monte-Carlo error, which is what the figure says of itself."""
    exact = math.pi / 2 * eigenvalues().sqrt().sum().item()
    found = [velocity_irreducible_variance(draw(800, seed), torch.zeros(800)) for seed in range(24)]
    values = torch.tensor([each.value for each in found])
    errors = torch.tensor([each.error for each in found])
    assert abs(values.mean().item() - exact) < 4 * values.std().item() / math.sqrt(24)
    assert errors.mean().item() == pytest.approx(values.std().item(), rel=0.35)
    assert found[0].n == 800 and found[0].caveat is None


def test_viv_is_the_mean_over_classes_around_their_means():
    """Classes of different scale and mean; a wrong mean or a pooled covariance gives another number."""
    near, far = draw(600, 1), 3 * draw(300, 2, mean=50.0)
    labels = torch.cat([torch.zeros(600), torch.ones(300)])
    apart = [velocity_irreducible_variance(each, torch.zeros(len(each))).value for each in (near, far)]
    together = velocity_irreducible_variance(torch.cat([near, far]), labels)
    assert together.value == pytest.approx(sum(apart) / 2, rel=1e-9)


def test_the_covariance_is_the_likeliest_of_its_form():
    """At the maximum the whitened second moments of rows and of columns are the identity."""
    rows = torch.randn(60, 2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64) ** 3
    rows = (rows - rows.mean(0)) @ torch.randn(3, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    fitted = kronecker_covariance(rows)
    white = fitted.coordinates(rows) / fitted.variances.sqrt()
    moments = (
        torch.einsum("ncp,ndp->cd", white, white) / (59 * 3),
        torch.einsum("ncp,ncq->pq", white, white) / (59 * 2),
    )
    for moment in moments:
        assert torch.allclose(moment, torch.eye(len(moment), dtype=torch.float64), atol=1e-4)
    assert fitted.channel[0].mean().item() == pytest.approx(1)


def solved_loss(latents: torch.Tensor, labels: torch.Tensor | None, sigmas: torch.Tensor) -> float:
    """Mean over sigmas of the loss of the least-squares predictor of the velocity, solved for d x d weights."""
    flat = latents.flatten(1)
    means = flat.mean(0) if labels is None else torch.stack([flat[labels == k].mean(0) for k in (0, 1)])[labels]
    flat = flat - means
    covariance, identity = flat.T @ flat / len(flat), torch.eye(flat.shape[1], dtype=torch.float64)
    losses = []
    for sigma in sigmas.tolist():
        noisy = (1 - sigma) ** 2 * covariance + sigma**2 * identity
        cross = sigma * identity - (1 - sigma) * covariance
        weights = torch.linalg.solve(noisy, cross.T).T
        losses.append((covariance + identity - weights @ cross.T).trace().item() / flat.shape[1])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("labelled", [False, True])
def test_the_line_is_the_loss_of_the_solved_linear_predictor(labelled):
    latents = draw(6000, 5) * 0.3
    labels = torch.arange(6000) % 2 if labelled else None
    if labels is not None:
        latents += 2.0 * labels[:, None, None, None]
    middles = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    solved = solved_loss(latents, labels, middles)
    assert linear_predictor_loss(latents, labels).value == pytest.approx(solved, rel=0.01)
    shifted = 3 * middles / (1 + 2 * middles)
    value = linear_predictor_loss(latents, labels, sigmas=shifted).value
    assert value == pytest.approx(solved_loss(latents, labels, shifted), rel=0.01)
    assert value != pytest.approx(solved, rel=0.05)


def test_the_line_is_never_below_the_best_linear_predictor():
    """Of latents whose covariance has no Kronecker form, where VIV's own sum may be."""
    generator = torch.Generator().manual_seed(6)
    scale = torch.rand(2, 2, 2, generator=generator, dtype=torch.float64) * 3
    latents = torch.randn(5000, 2, 2, 2, generator=generator, dtype=torch.float64) * scale
    mixed = (
        latents.flatten(1) @ torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))[0]
    ).view(5000, 2, 2, 2)
    flat = mixed.flatten(1) - mixed.flatten(1).mean(0)
    best = velocity_residual(torch.linalg.eigvalsh(flat.T @ flat / 4999)).mean().item()
    assert linear_predictor_loss(mixed).value > 1.01 * best


def test_the_residual_in_closed_form_is_the_integral():
    variances = torch.tensor([1e-4, 0.3, 1.0, 20.0], dtype=torch.float64)
    middles = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    sampled = torch.stack([(v / ((1 - middles) ** 2 * v + middles**2)).mean() for v in variances])
    assert torch.allclose(velocity_residual(variances), sampled, rtol=1e-4)
    assert torch.allclose(velocity_residual(variances, middles[20::40]), sampled, rtol=0.01)


def test_too_few_latents_have_no_covariance():
    """16 positions of 3 channels: rows must be more than positions."""
    assert kronecker_covariance(draw(6, 0).flatten(2)) is None
    assert kronecker_covariance(draw(7, 0).flatten(2)) is not None
    few = velocity_irreducible_variance(draw(9, 0), torch.tensor([0] * 7 + [1] * 2))
    assert math.isfinite(few.value) and "1 of 2 classes left out, which have fewer than 7 latents" in few.caveat
    assert "low by up to about 11%, from 7 latents" in few.caveat
    none = velocity_irreducible_variance(draw(4, 0), torch.tensor([0, 0, 1, 1]), what="clusters")
    assert math.isnan(none.value) and none.caveat.startswith("undefined: 2 of 2 clusters left out")
    assert "fewer than 7 latents" in linear_predictor_loss(draw(5, 0)).caveat
    dead = draw(50, 0)
    dead[:, 1] = 4.0
    assert "directions without variance" in linear_predictor_loss(channel_normalized(dead)).caveat


def test_channels_are_normalised_and_a_constant_one_is_zero():
    latents = torch.randn(9, 3, 4, 4) * torch.tensor([5.0, 0.1, 0.0]).view(3, 1, 1) + 7
    normalized = channel_normalized(latents)
    assert torch.allclose(normalized.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(normalized.square().mean((0, 2, 3)), torch.tensor([1, 1, 0.0], dtype=torch.float64))


def test_spectral_energy_of_noise_and_of_single_frequencies():
    noise = torch.randn(400, 2, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = sum(u + v > 6 for u in range(6) for v in range(8)) / 48
    assert spectral_energy(noise).mean().item() == pytest.approx(expected, abs=0.01)
    place = torch.arange(8) + 0.5

    def wave(u: int, v: int) -> torch.Tensor:
        return (torch.cos(math.pi / 8 * place * u)[:, None] * torch.cos(math.pi / 8 * place * v))[None, None].double()

    assert [round(spectral_energy(wave(u, v)).item(), 9) for u, v in ((0, 0), (3, 4), (4, 4), (7, 7))] == [0, 0, 1, 1]


def test_local_similarity_counts_every_pair_once():
    latents = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = []
    for one in latents:
        cells = {(y, x): one[:, y, x] / one[:, y, x].norm() for y in range(5) for x in range(7)}
        pairs = [(a, b, abs(a[0] - b[0]) + abs(a[1] - b[1])) for a in cells for b in cells if a < b]
        near = [float(cells[a] @ cells[b]) for a, b, distance in pairs if distance == 1]
        far = [float(cells[a] @ cells[b]) for a, b, distance in pairs if distance >= 6]
        expected.append(sum(near) / len(near) - sum(far) / len(far))
    assert local_similarity(latents).tolist() == pytest.approx(expected)
    assert local_similarity(torch.randn(1, 3, 4, 3)).isnan().all()


def test_region_similarity_of_one_vector_each():
    """Foreground cells agree, and are at a right angle to the background: 1 - 0."""
    regions = torch.tensor([[[1, 1, 0], [2, -1, 0]]])
    latents = torch.zeros(1, 2, 2, 3)
    latents[:, 0] = (regions > 0).float() * 3
    latents[:, 1] = (regions <= 0).float()
    assert region_similarity(latents, regions).tolist() == [1.0]
    assert region_similarity(latents, regions.clamp_min(1)).isnan().all()
    against = torch.where(regions[:, None] == 0, -latents[:, :1, :1, :1], torch.zeros(1, 1, 2, 3))
    latents[:, 1] = 0
    latents[:, :1] += against
    assert region_similarity(latents, regions).tolist() == [2.0]


def test_nearest_cells_are_those_of_other_images():
    """Two classes apart: all of a cell's neighbours are of its class; by chance half are."""
    images = torch.arange(12).repeat_interleave(5)
    classes = images % 2
    cells = torch.randn(60, 3, generator=torch.Generator().manual_seed(0)) * 0.1 + 9.0 * classes[:, None]
    assert nearest_class_share(cells, classes, images).tolist() == [1.0] * 12
    alone = torch.arange(60).repeat_interleave(1) // 30  # one image a class: its neighbours are of the other
    assert nearest_class_share(cells, alone, alone).tolist() == [0.0, 0.0]
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(4000) // 4
    assert nearest_class_share(noise, ids % 2, ids).mean().item() == pytest.approx(0.5, abs=0.02)
    with pytest.raises(ValueError, match="5 are left beside the largest image"):
        nearest_class_share(cells[:10], classes[:10], images[:10])


def test_regions_of_masks_are_their_most_frequent_labels_and_void_counts_for_nothing():
    """Cells of 2 px: one vector in the foreground, one at right angles to it behind, so that SRSS is 1 - 0."""
    masks = torch.zeros(3, 8, 8, dtype=torch.int64)
    masks[0, :, :4], masks[0, 0, 0], masks[0, :2, 6:] = 3, 0, 255  # one pixel of four; one cell of void
    masks[1] = 1  # no background
    latents = torch.zeros(3, 2, 4, 4)
    latents[:, 0, :, :2], latents[:, 1, :, 2:] = 1.0, 1.0
    latents -= latents.mean((0, 2, 3), keepdim=True)  # what normalising does; the two are then opposite
    latents[0, :, 0, 3] = latents[0, :, 0, 0]  # the void cell looks like the foreground
    metric = METRICS["diffusability"]()
    metric.update({"posteriors": Posterior(latents[:2], None), "masks": masks[:2]}, range(2))
    figure = measure([metric], []).figures["srss"]
    normalized = channel_normalized(latents[:2])[0]
    cells = F.normalize(normalized.flatten(1), dim=0)
    front, back = cells.view(2, 4, 4)[:, :, :2].flatten(1), cells.view(2, 4, 4)[:, :, 2:].flatten(1)
    back = back[:, [0, 2, 3, 4, 5, 6, 7]]  # without the void
    within = sum(float(front[:, i] @ front[:, j]) for i in range(8) for j in range(8) if i != j) / 56
    assert figure.value == pytest.approx(within - float((front.T @ back).mean()), abs=1e-5)
    assert figure.n == 1 and figure.caveat == "1 of 2 images left out, whose masks lack foreground or background"
    nothing = METRICS["diffusability"]()
    nothing.update({"posteriors": Posterior(latents, None), "masks": torch.ones(3, 8, 8, dtype=torch.int64)}, range(3))
    undefined = measure([nothing], []).figures["srss"]
    assert math.isnan(undefined.value) and "one of the background, which is 0" in undefined.caveat
    hashes = {each.protocol()["srss.masks_hash"] for each in (metric, nothing)}
    assert len(hashes) == 2


def measured(latents: torch.Tensor, labels: torch.Tensor | None, *, batches: list[list[int]]):
    metrics = [METRICS["diffusability"]() for _ in range(2)]
    for turn, index in enumerate(batches):
        posterior = Posterior(latents[index], None)
        batch = {"posteriors": posterior} | ({} if labels is None else {"labels": labels[index]})
        metrics[turn % 2].update(batch, index)
    metrics[1].merge(pickle.loads(pickle.dumps(metrics[0])))
    return measure([metrics[1]], [])


@pytest.mark.parametrize("labelled", [False, True])
def test_neither_order_nor_batches_nor_processes_change_a_bit(labelled):
    latents = torch.randn(40, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 2 if labelled else None
    plain = measured(latents, labels, batches=[[], list(range(40))][1:])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1)).tolist()
    other = measured(latents, labels, batches=[order[:7], order[7:30], order[30:]])
    assert {"viv", "viv_per_dimension", "linear_loss", "sec", "lds"} | ({"lnc"} if labelled else set()) == set(
        plain.figures
    )
    assert str(plain.figures) == str(other.figures) and plain.protocol == other.protocol
    assert plain.protocol["viv.groups"] == ("2 classes" if labelled else "1 k-means clusters")
    assert math.isnan(plain.figures["viv"].value) == labelled  # 20 latents of a class, where 34 are needed
    assert plain.figures["sec"].error > 0


def test_clusters_are_found_where_there_are_no_labels():
    """Two clouds: their common mean would add the distance between them to the variance."""
    latents = torch.cat([draw(200, 0), draw(200, 1, mean=40.0)])
    figures = measured(latents, None, batches=[list(range(400))]).figures
    normalized = channel_normalized(latents)
    groups = torch.arange(400) // 200
    exact = velocity_irreducible_variance(normalized, groups).value
    assert figures["viv"].value < 1.3 * exact < velocity_irreducible_variance(normalized, groups * 0).value
    assert figures["viv_per_dimension"].value == pytest.approx(figures["viv"].value / 48)
