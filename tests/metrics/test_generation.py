"""Generation metrics from images to numbers: one pass, invariances, references, caveats, and what is refused."""

from __future__ import annotations

import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from diffusers_eqvae.metrics.base import Measurement, build_metrics, measure
from diffusers_eqvae.metrics.distances import FeatureStatistics, frechet_distance, inception_score, precision_recall
from diffusers_eqvae.metrics.feature_networks import FeatureNetwork, ModuleFeatures
from diffusers_eqvae.metrics.generation import (
    OFFERS,
    Reference,
    evaluate_generation,
    evaluate_reconstruction,
    feature_statistics,
    load_reference,
    sample_batches,
)
from diffusers_eqvae.metrics.image_sets import Features, ImageSet, extract, image_digests
from diffusers_eqvae.provenance import weights_hash

ALL = {"fid", "sfid", "inception_score", "inception_score_std", "precision", "recall", "kid", "kid_std"}


class TinyInception(FeatureNetwork):
    """Stands for FID's Inception: features, spatial features and logits of one small convolution; counts its calls."""

    name, input_rule = "tiny", "none"

    def __init__(self, *, genuine: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.network = nn.Conv2d(3, 8, 4, stride=4).requires_grad_(False)
        self.weights_hash = weights_hash(self.network)
        self.suffix = None if genuine else "tiny"
        self.calls = 0

    def extract(self, images):
        self.calls += 1
        maps = self.network(images.float() / 127.5 - 1).relu()
        features = maps.mean((2, 3))
        return {"features": features, "spatial": maps[:, :2].flatten(1), "logits": features * 3}


def images_uint8(count: int, seed: int = 0, low: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, 256, (count, 8, 8, 3)).astype(np.uint8)


def in_batches(array: np.ndarray, size: int) -> list[np.ndarray]:
    return [array[start : start + size] for start in range(0, len(array), size)]


def reference_of(network: FeatureNetwork, count: int = 60, seed: int = 1) -> Reference:
    return load_reference(ImageSet(images_uint8(count, seed, low=10), name="reference"), network)


def test_one_pass_gives_every_number():
    network = TinyInception()
    samples = extract(network, in_batches(images_uint8(50), 7))
    assert network.calls == 8
    reference = reference_of(network)
    calls = network.calls
    result = evaluate_generation(samples, reference, network)
    metrics = result.values()
    assert set(metrics) == ALL and not result.card_parts()["caveats"] and network.calls == calls
    own = feature_statistics(samples.outputs["features"])
    by_hand = frechet_distance(own.mean, own.covariance, reference.mean, reference.covariance)
    assert metrics["fid"] == by_hand > 0
    assert metrics["inception_score"] == inception_score(samples.outputs["logits"])[0]
    named = evaluate_generation(samples, reference, TinyInception(genuine=False))
    assert {name.removesuffix("_tiny") for name in named.figures} == {
        {"fid": "fd", "sfid": "sfd", "kid": "kd", "kid_std": "kd_std"}.get(name, name) for name in ALL
    }


def test_kid_has_no_deviation_where_all_subsets_are_one():
    network = TinyInception()
    samples = extract(network, [images_uint8(50)])
    assert set(evaluate_generation(samples, reference_of(network, 50), network).figures) == ALL - {"kid_std"}


def test_the_protocols_constants():
    """Three neighbours; precision, recall and KID of the first 10 000 images of the reference, FID of all."""
    network = TinyInception()
    samples, reference = extract(network, [images_uint8(50)]), reference_of(network, 60)
    metrics = evaluate_generation(samples, reference, network).values()
    by_hand = {k: precision_recall(samples.outputs["features"], reference.features, neighbours=k) for k in (3, 4)}
    assert (metrics["precision"], metrics["recall"]) == by_hand[3] != by_hand[4]
    features = torch.rand(10_003, 2, generator=torch.Generator().manual_seed(0))
    digests = torch.zeros(10_003, 32, dtype=torch.uint8)
    many = Reference.of(Features({"features": features}, digests), name="x", evaluator={})
    assert torch.equal(many.features, features[:10_000]) and many.count == 10_003
    torch.testing.assert_close(many.mean, features.double().mean(0))


def test_the_inception_score_is_of_splits_of_5000_in_order():
    """Two classes one after the other: a split of one class scores 1, one of both in equal parts scores 2."""
    network = TinyInception()
    classes = torch.arange(12_500) // 2_500 % 2  # 2500 of each in the first two splits, one class in the third
    logits = 50 * torch.nn.functional.one_hot(classes, 8).float()
    samples = Features({"features": torch.zeros(12_500, 8), "logits": logits}, torch.zeros(12_500, 32).byte())
    metrics = evaluate_generation(samples, reference_of(network), network, metrics=["inception_score"]).values()
    assert metrics["inception_score"] == pytest.approx((2 + 2 + 1) / 3)
    assert metrics["inception_score_std"] == pytest.approx(np.std([2, 2, 1]))


def test_statistics_are_fed_in_blocks_and_keep_every_bit(monkeypatch):
    """20 000 features of Inception at once would take 800 MB beside themselves."""
    features = torch.randn(5000, 3)
    whole = FeatureStatistics(3)
    whole.update(features)
    fed, update = [], FeatureStatistics.update

    def recorded(self, rows):
        fed.append(len(rows))
        update(self, rows)

    monkeypatch.setattr(FeatureStatistics, "update", recorded)
    blocks = feature_statistics(features)
    assert max(fed) <= 1024 and blocks.count == 5000
    assert torch.equal(blocks.mean, whole.mean) and torch.equal(blocks.covariance, whole.covariance)


@pytest.mark.parametrize("batch_size", [1, 7, 32, 128])
def test_numbers_do_not_depend_on_the_batch_size(batch_size):
    network = TinyInception()
    reference = reference_of(network)
    results = [
        (each, evaluate_generation(each, reference, network).values())
        for each in (extract(network, in_batches(images_uint8(50), size)) for size in (batch_size, 50))
    ]
    assert results[0][0].hash == results[1][0].hash
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)


@pytest.mark.parametrize("world_size", [2, 3, 9])
def test_the_number_of_processes_changes_no_bit(world_size):
    """Nine processes share seven batches: two have nothing to do, and metrics are merged in any order."""
    network, images = TinyInception(), ImageSet(images_uint8(50), name="samples")
    reference = reference_of(network)
    names = ("fid", "inception_score", "precision_recall", "kid")

    def saw(processes):
        metrics = build_metrics(names, offers=OFFERS, network=network, reference=reference)
        measure(metrics, sample_batches(images.batches(8, processes), [network]))
        return metrics

    ranks = [SimpleNamespace(process_index=rank, num_processes=world_size) for rank in range(world_size)]
    first, *others = (saw(rank) for rank in ranks)
    for other in reversed(others):
        for mine, theirs in zip(first, pickle.loads(pickle.dumps(other)), strict=True):
            mine.merge(theirs)
    assert Measurement(first).figures == Measurement(saw(None)).figures
    assert set(Measurement(first).figures) == ALL
    at_once = evaluate_generation(extract(network, images, batch_size=8), reference, network)
    assert at_once.figures == Measurement(first).figures


def test_metrics_of_one_network_share_its_features():
    """In memory, and on the way to another process."""
    network = TinyInception()
    reference, batches = reference_of(network), ImageSet(images_uint8(200), name="samples").batches(200)
    metrics = build_metrics(("fid", "precision_recall", "kid"), offers=OFFERS, network=network, reference=reference)
    measure(metrics, sample_batches(batches, [network]))
    assert len(pickle.dumps(metrics)) < 1.2 * len(pickle.dumps(metrics[:1]))


def test_a_reference_survives_its_file(tmp_path):
    network = TinyInception()
    reference, samples = reference_of(network), extract(network, [images_uint8(50)])
    reference.save(tmp_path / "reference.npz")
    loaded = load_reference(tmp_path / "reference.npz", network)
    assert (loaded.hash, loaded.count, loaded.name) == (reference.hash, 60, "reference")
    results = [evaluate_generation(samples, each, network) for each in (loaded, reference)]
    assert results[0].figures == results[1].figures
    other = ModuleFeatures(nn.Conv2d(3, 8, 1), name="other")
    with pytest.raises(ValueError, match="Compute the reference again"):
        load_reference(tmp_path / "reference.npz", other)
    with pytest.raises(ValueError, match=r"network's weights of the reference .* Compute the reference again"):
        evaluate_generation(samples, reference, other)


@pytest.mark.parametrize(
    ("version", "complaint"), [(None, "format_version None, older than 2"), (9, "format_version 9, newer than 2")]
)
def test_saved_statistics_of_another_format_are_refused(version, complaint, tmp_path):
    reference_of(TinyInception()).save(tmp_path / "reference.npz")
    with np.load(tmp_path / "reference.npz") as archive:
        arrays = {name: archive[name] for name in archive if name != "format_version"}
    np.savez(tmp_path / "reference.npz", **arrays, **({} if version is None else {"format_version": version}))
    with pytest.raises(ValueError, match=complaint):
        load_reference(tmp_path / "reference.npz", TinyInception())


def test_adm_reference_files(tmp_path):
    network, images = TinyInception(), images_uint8(60, 1, low=10)
    collected = extract(network, [images])
    own = feature_statistics(collected.outputs["features"])
    arrays = {"mu": own.mean, "sigma": own.covariance}
    spatial = feature_statistics(collected.outputs["spatial"])
    arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    arrays = {key: value.numpy() for key, value in arrays.items()}
    np.savez(tmp_path / "both.npz", arr_0=images, **arrays)
    np.savez(tmp_path / "numbers.npz", **arrays)
    np.savez(tmp_path / "images.npz", images)
    samples = extract(network, [images_uint8(50)])
    both, numbers, plain = (
        evaluate_generation(samples, load_reference(tmp_path / f"{name}.npz", network), network).values()
        for name in ("both", "numbers", "images")
    )
    assert both == pytest.approx(plain, rel=1e-9) and set(both) == ALL
    assert set(numbers) == ALL - {"precision", "recall", "kid", "kid_std"}
    assert numbers["fid"] == both["fid"]
    # Inception's statistics mean nothing to another network: it looks at the images, or refuses.
    other = TinyInception(genuine=False)
    assert load_reference(tmp_path / "both.npz", other).count == 60
    with pytest.raises(ValueError, match="can use mu and sigma"):
        load_reference(tmp_path / "numbers.npz", other)


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        ({"mu": np.zeros(8)}, "sigma beside mu"),
        ({"mu": np.zeros(8), "sigma": np.eye(7)}, r"\(D,\) and \(D, D\)"),
        ({"mu": np.zeros(8, int), "sigma": np.eye(8)}, "must be float"),
        ({"samples": np.zeros(8)}, "it holds samples"),
    ],
)
def test_bad_reference_files_are_named(arrays, complaint, tmp_path):
    np.savez(tmp_path / "reference.npz", **arrays)
    with pytest.raises(ValueError, match=complaint):
        load_reference(tmp_path / "reference.npz", TinyInception())


def test_too_few_samples_have_a_caveat(caplog):
    network = TinyInception()
    result = evaluate_generation(extract(network, [images_uint8(8)]), reference_of(network), network)
    reason = "too few images: 8 samples for 8 dimensions"
    assert result.card_parts()["caveats"] == {"fid": reason, "sfid": reason}
    assert (
        "fid" in caplog.text and "not comparable" in caplog.text and np.isfinite(list(result.values().values())).all()
    )
    few = evaluate_generation(extract(network, [images_uint8(50)]), reference_of(network, 5), network)
    assert few.figures["fid"].caveat == "too few images: 5 reference images for 8 dimensions"


def test_repeated_samples_have_a_caveat():
    network = TinyInception()
    repeated = np.concatenate([images_uint8(30), images_uint8(10)])
    result = evaluate_generation(extract(network, [repeated]), reference_of(network), network)
    caveats = result.card_parts()["caveats"]
    assert caveats["kid"] == "only 30 of 40 samples are unique" and set(caveats) == ALL
    twice = extract(network, [np.concatenate([images_uint8(4), images_uint8(4)])])
    figures = evaluate_generation(twice, reference_of(network), network).figures
    assert figures["fid"].caveat == "too few images: 8 samples for 8 dimensions; only 4 of 8 samples are unique"


def test_reconstructions_are_measured_against_their_images(caplog):
    network, images = TinyInception(), images_uint8(50)
    blurred = images // 2 + 64
    ours, reference = (extract(network, in_batches(array, 8)) for array in (blurred, images))
    result = evaluate_reconstruction(ours, reference, network)
    assert set(result.figures) == {"rfid", "rsfid"} and not result.card_parts()["caveats"]
    as_samples = evaluate_generation(ours, load_reference(ImageSet(images, name="x"), network), network)
    assert result.values()["rfid"] == pytest.approx(as_samples.values()["fid"], rel=1e-5)
    itself = evaluate_reconstruction(reference, reference, network)
    assert itself.values() == pytest.approx({"rfid": 0, "rsfid": 0}, abs=1e-9)
    other = TinyInception(genuine=False)
    doubled = extract(other, [np.concatenate([images, images])])
    repeated = evaluate_reconstruction(extract(other, [np.concatenate([blurred, blurred])]), doubled, other)
    caveats = repeated.card_parts()["caveats"]
    assert caveats == dict.fromkeys(("rfd_tiny", "rsfd_tiny"), "only 50 of 100 images are unique")
    assert "rfd_tiny" in caplog.text


def test_bad_batches_are_refused():
    network = TinyInception()
    with pytest.raises(ValueError, match="at least one"):
        extract(network, [])
    with pytest.raises(ValueError, match="uint8"):
        extract(network, [images_uint8(2).astype(np.float32)])
    with pytest.raises(ValueError, match="must have one size; got 8x8 and 8x4 px"):
        extract(network, [images_uint8(2), images_uint8(2)[:, :4]])


def test_the_hash_sees_every_pixel_and_the_order():
    network = TinyInception()
    images = images_uint8(5)
    changed = images.copy()
    changed[4, 7, 7, 2] ^= 1
    hashes = {extract(network, [each]).hash for each in (images, changed, images[::-1])}
    assert len(hashes) == 3
    # The same bytes in another shape are another image.
    assert not torch.equal(image_digests(images), image_digests(images.reshape(5, 4, 16, 3)))


def test_mind_of_shifted_features_and_of_sets_of_two_sizes():
    """3 |s|^2 up to what 1000 directions leave of it; a larger set is cut to the smaller."""
    network = TinyInception()
    samples, reference = extract(network, [images_uint8(50)]), reference_of(network, 50, seed=0)
    shift = torch.linspace(0.1, 0.8, 8)
    features = samples.outputs["features"].double()
    moved = replace(reference, features=features + shift)
    figure = evaluate_generation(samples, moved, network, metrics=["mind"]).figures["mind"]
    assert figure.value == pytest.approx(3 * float(shift.square().sum()), rel=0.15)
    assert figure.error < 1e-6 and figure.n == 50 and figure.better == "lower"  # a shift is the same without any image
    same = evaluate_generation(samples, replace(reference, features=features), network, metrics=["mind"]).figures
    assert same["mind"].value == pytest.approx(0, abs=1e-9)
    doubled = replace(reference, features=torch.cat([features + shift, features + shift]))
    cut = evaluate_generation(samples, doubled, network, metrics=["mind"]).figures["mind"]
    assert cut.n == 50 and figure.value * 0.5 < cut.value != figure.value


def test_the_error_of_mind_is_the_spread_over_other_samples():
    network, generator = TinyInception(), torch.Generator().manual_seed(1)
    samples, reference = extract(network, [images_uint8(120)]), reference_of(network, 120, seed=0)
    values, errors = [], []
    for _ in range(16):
        drawn, other = (torch.randn(120, 8, generator=generator, dtype=torch.float64) for _ in range(2))
        samples.outputs["features"] = drawn + 1
        figure = evaluate_generation(samples, replace(reference, features=other), network, metrics=["mind"]).figures
        values.append(figure["mind"].value)
        errors.append(figure["mind"].error)
    assert 0.6 < np.mean(errors) / np.std(values, ddof=1) < 1.7


@pytest.mark.parametrize("metric", ["kid", "precision_recall", "mind"])
def test_what_a_reference_of_statistics_cannot_tell_is_said(metric, caplog):
    network = TinyInception()
    reference = replace(reference_of(network, 50, seed=0), features=None)
    assert not evaluate_generation(extract(network, [images_uint8(50)]), reference, network, metrics=[metric]).figures
    assert "is not measured against the reference" in caplog.text and "statistics only" in caplog.text
