"""Generation metrics from images to numbers: one pass, invariances, references, and what is refused or marked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from diffusers_eqvae.metrics.distances import FeatureStatistics, frechet_distance, inception_score, precision_recall
from diffusers_eqvae.metrics.feature_networks import FeatureExtractor, ModuleFeatures
from diffusers_eqvae.metrics.generation import (
    Reference,
    evaluate_generation,
    evaluate_reconstruction,
    feature_statistics,
    load_reference,
)
from diffusers_eqvae.metrics.image_sets import Collected, Collector, Processes, collect, image_digests, to_levels
from diffusers_eqvae.metrics.inputs import ImageSet
from diffusers_eqvae.provenance import weights_hash

ALL = {"fid", "sfid", "inception_score", "inception_score_std", "precision", "recall", "kid", "kid_std"}


class TinyInception(FeatureExtractor):
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


def levels(count: int, seed: int = 0, low: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, 256, (count, 8, 8, 3)).astype(np.uint8)


def in_batches(array: np.ndarray, size: int) -> list[np.ndarray]:
    return [array[start : start + size] for start in range(0, len(array), size)]


def reference_of(extractor: FeatureExtractor, count: int = 60, seed: int = 1) -> Reference:
    return load_reference(ImageSet(levels(count, seed, low=10), name="reference"), extractor)


def test_one_pass_gives_every_number():
    extractor = TinyInception()
    samples = collect(extractor, in_batches(levels(50), 7))
    assert extractor.calls == 8
    reference = reference_of(extractor)
    calls = extractor.calls
    result = evaluate_generation(samples, reference, extractor=extractor)
    assert set(result.metrics) == ALL and not result.marks and extractor.calls == calls
    own = feature_statistics(samples.features)
    by_hand = frechet_distance(own.mean, own.covariance, reference.mean, reference.covariance)
    assert result.metrics["fid"] == by_hand > 0
    assert result.metrics["inception_score"] == inception_score(samples.logits)[0]
    named = evaluate_generation(samples, reference, extractor=TinyInception(genuine=False))
    assert {name.removesuffix("_tiny") for name in named.metrics} == {
        {"fid": "fd", "sfid": "sfd", "kid": "kd", "kid_std": "kd_std"}.get(name, name) for name in ALL
    }


def test_kid_has_no_deviation_where_all_subsets_are_one():
    extractor = TinyInception()
    samples = collect(extractor, [levels(50)])
    assert set(evaluate_generation(samples, reference_of(extractor, 50), extractor=extractor).metrics) == ALL - {
        "kid_std"
    }


def test_the_protocols_constants():
    """Three neighbours; precision, recall and KID of the first 10 000 images of the reference, FID of all."""
    extractor = TinyInception()
    samples, reference = collect(extractor, [levels(50)]), reference_of(extractor, 60)
    metrics = evaluate_generation(samples, reference, extractor=extractor).metrics
    by_hand = {k: precision_recall(samples.features, reference.features, neighbours=k) for k in (3, 4)}
    assert (metrics["precision"], metrics["recall"]) == by_hand[3] != by_hand[4]
    features = torch.rand(10_003, 2, generator=torch.Generator().manual_seed(0))
    many = Reference.from_collected(Collected(features, None, None, []), name="x", weights_hash="x")
    assert torch.equal(many.features, features[:10_000]) and many.count == 10_003
    torch.testing.assert_close(many.mean, features.double().mean(0))


def test_the_inception_score_is_of_splits_of_5000_in_order():
    """Two classes one after the other: a split of one class scores 1, one of both in equal parts scores 2."""
    extractor = TinyInception()
    collected = collect(extractor, [levels(10)])
    classes = torch.arange(12_500) // 2_500 % 2  # 2500 of each in the first two splits, one class in the third
    logits = 50 * torch.nn.functional.one_hot(classes, 8).float()
    samples = Collected(collected.features, logits, None, collected.digests)
    metrics = evaluate_generation(samples, reference_of(extractor), extractor=extractor).metrics
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
    extractor = TinyInception()
    reference = reference_of(extractor)
    results = [
        (each, evaluate_generation(each, reference, extractor=extractor).metrics)
        for each in (collect(extractor, in_batches(levels(50), size)) for size in (batch_size, 50))
    ]
    assert results[0][0].hash == results[1][0].hash
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)


@pytest.mark.parametrize("world_size", [2, 3, 9])
def test_not_one_bit_depends_on_the_processes(world_size):
    """Nine processes share seven batches: two have nothing to do."""
    extractor, images = TinyInception(), ImageSet(levels(50), name="samples")
    stretches = [list(images.batches(8, rank=rank, world_size=world_size)) for rank in range(world_size)]
    shares = [collect(extractor, stretch) for stretch in stretches if stretch]
    together = Processes(0, world_size, lambda mine: shares).measure(extractor, images, batch_size=8)
    alone = Processes().measure(extractor, images, batch_size=8)
    assert together.hash == alone.hash and len(together.features) == 50
    reference = reference_of(extractor)
    numbers = [evaluate_generation(each, reference, extractor=extractor).metrics for each in (together, alone)]
    assert numbers[0] == numbers[1]


def test_a_reference_survives_its_file(tmp_path):
    extractor = TinyInception()
    reference, samples = reference_of(extractor), collect(extractor, [levels(50)])
    reference.save(tmp_path / "reference.npz")
    loaded = load_reference(tmp_path / "reference.npz", extractor)
    assert (loaded.hash, loaded.count, loaded.name) == (reference.hash, 60, "reference")
    results = [evaluate_generation(samples, each, extractor=extractor) for each in (loaded, reference)]
    assert results[0] == results[1]
    other = ModuleFeatures(nn.Conv2d(3, 8, 1), name="other")
    with pytest.raises(ValueError, match="Compute the reference again"):
        load_reference(tmp_path / "reference.npz", other)
    with pytest.raises(ValueError, match="with one network"):
        evaluate_generation(samples, reference, extractor=other)


def test_adm_reference_files(tmp_path):
    extractor, images = TinyInception(), levels(60, 1, low=10)
    collected = collect(extractor, [images])
    own = feature_statistics(collected.features)
    arrays = {"mu": own.mean, "sigma": own.covariance}
    spatial = feature_statistics(collected.spatial)
    arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
    arrays = {key: value.numpy() for key, value in arrays.items()}
    np.savez(tmp_path / "both.npz", arr_0=images, **arrays)
    np.savez(tmp_path / "numbers.npz", **arrays)
    np.savez(tmp_path / "images.npz", images)
    samples = collect(extractor, [levels(50)])
    both, numbers, plain = (
        evaluate_generation(samples, load_reference(tmp_path / f"{name}.npz", extractor), extractor=extractor).metrics
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


def test_too_few_samples_are_marked(caplog):
    extractor = TinyInception()
    result = evaluate_generation(collect(extractor, [levels(8)]), reference_of(extractor), extractor=extractor)
    reason = "too few images: 8 samples for 8 dimensions"
    assert result.marks == {"fid": reason, "sfid": reason}
    assert (
        "fid" in caplog.text and "not comparable" in caplog.text and np.isfinite(list(result.metrics.values())).all()
    )
    few = evaluate_generation(collect(extractor, [levels(50)]), reference_of(extractor, 5), extractor=extractor)
    assert few.marks["fid"] == "too few images: 5 reference images for 8 dimensions"


def test_repeated_samples_are_marked():
    extractor = TinyInception()
    repeated = np.concatenate([levels(30), levels(10)])
    result = evaluate_generation(collect(extractor, [repeated]), reference_of(extractor), extractor=extractor)
    assert result.marks["kid"] == "only 30 of 40 samples are unique" and set(result.marks) == ALL
    twice = collect(extractor, [np.concatenate([levels(4), levels(4)])])
    marks = evaluate_generation(twice, reference_of(extractor), extractor=extractor).marks
    assert marks["fid"] == "too few images: 8 samples for 8 dimensions; only 4 of 8 samples are unique"


def test_reconstructions_are_measured_against_their_images(caplog):
    extractor, images = TinyInception(), levels(50)
    blurred = images // 2 + 64
    collected = [Collector(extractor) for _ in range(2)]
    for start in range(0, 50, 8):
        for collector, array in zip(collected, (blurred, images), strict=True):
            collector.add(array[start : start + 8])
    ours, reference = (collector.collected() for collector in collected)
    result = evaluate_reconstruction(ours, reference, extractor=extractor)
    assert set(result.metrics) == {"rfid", "rsfid"} and not result.marks
    as_samples = evaluate_generation(ours, load_reference(ImageSet(images, name="x"), extractor), extractor=extractor)
    assert result.metrics["rfid"] == pytest.approx(as_samples.metrics["fid"], rel=1e-5)
    itself = evaluate_reconstruction(reference, reference, extractor=extractor)
    assert itself.metrics == pytest.approx({"rfid": 0, "rsfid": 0}, abs=1e-9)
    other = TinyInception(genuine=False)
    doubled = collect(other, [np.concatenate([images, images])])
    marked = evaluate_reconstruction(collect(other, [np.concatenate([blurred, blurred])]), doubled, extractor=other)
    assert marked.marks == dict.fromkeys(("rfd_tiny", "rsfd_tiny"), "only 50 of 100 images are unique")
    assert "rfd_tiny" in caplog.text


def test_levels_follow_the_uint8_rule():
    pixels = torch.tensor([-2.0, -1.0, -1 / 255, 0.0, 0.999, 1.0, 3.0]).repeat(1, 3, 1, 1)
    expected = [0, 0, 127, 128, 255, 255, 255]
    assert to_levels(pixels)[0, 0, :, 0].tolist() == expected
    every = torch.arange(256).byte().view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    assert np.array_equal(to_levels(every / 127.5 - 1), every.permute(0, 2, 3, 1).numpy())
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be finite"):
            to_levels(torch.full((1, 3, 4, 4), bad))


def test_bad_batches_are_refused():
    extractor = TinyInception()
    with pytest.raises(ValueError, match="At least one"):
        collect(extractor, [])
    with pytest.raises(ValueError, match="uint8"):
        collect(extractor, [levels(2).astype(np.float32)])
    with pytest.raises(ValueError, match="must have one size; got 8x8 and 8x4 px"):
        collect(extractor, [levels(2), levels(2)[:, :4]])


def test_the_hash_sees_every_pixel_and_the_order():
    extractor = TinyInception()
    images = levels(5)
    changed = images.copy()
    changed[4, 7, 7, 2] ^= 1
    hashes = {collect(extractor, [each]).hash for each in (images, changed, images[::-1])}
    assert len(hashes) == 3
    # The same bytes in another shape are another image.
    assert image_digests(images) != image_digests(images.reshape(5, 4, 16, 3))
    assert isinstance(collect(extractor, [images]), Collected)
