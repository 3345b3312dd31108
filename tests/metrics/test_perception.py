"""IoU and depth errors against NumPy, and the laws that make counts joinable."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusers_eqvae.metrics.perception import SegmentationConfusion, depth_errors


def counted(prediction: torch.Tensor, target: torch.Tensor, num_classes: int = 5) -> SegmentationConfusion:
    confusion = SegmentationConfusion(num_classes)
    confusion.update(prediction, target)
    return confusion


@pytest.fixture
def classes() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randint(0, 4, (3, 8, 9), generator=generator)
    target = torch.randint(0, 4, (3, 8, 9), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = 255
    return prediction, target


def test_iou_is_that_of_sets(classes):
    prediction, target = (tensor.numpy() for tensor in classes)
    confusion = counted(*classes)
    kept = target != 255
    expected = []
    for label in range(4):
        p, t = (prediction == label) & kept, (target == label) & kept
        expected.append((p & t).sum() / (p | t).sum())
    iou = confusion.iou()
    assert np.allclose(iou[:4], expected, atol=1e-15)
    assert iou[4].isnan()  # neither there nor predicted: no part of the mean
    assert confusion.mean_iou() == pytest.approx(np.mean(expected), abs=1e-15)
    assert confusion.accuracy() == pytest.approx((prediction == target)[kept].mean(), abs=1e-15)


def test_a_class_that_is_only_predicted_counts_as_wrong():
    confusion = counted(torch.tensor([0, 1]), torch.tensor([0, 0]))
    assert confusion.iou()[:2].tolist() == [0.5, 0.0]
    assert confusion.counts[0, :2].tolist() == [1, 1] and int(confusion.counts[1].sum()) == 0  # rows are the truth
    assert confusion.mean_iou() == 0.25


def test_merged_counts_are_those_of_all_images(classes):
    whole = counted(*classes)
    joined = SegmentationConfusion(5)
    for prediction, target in zip(*classes, strict=True):
        joined.merge(counted(prediction, target))
    assert torch.equal(joined.counts, whole.counts)
    assert int(whole.counts.sum()) == int((classes[1] != 255).sum())


def test_confusion_refuses_what_it_cannot_count():
    confusion = SegmentationConfusion(3)
    zeros = torch.zeros(2, dtype=torch.int64)
    for prediction, target, message in (
        (torch.tensor([0, 3]), zeros, "Predicted classes must be 0..2"),
        (torch.tensor([0, 255]), zeros, "only in the target"),
        (zeros, torch.tensor([0, 7]), "True classes must be 0..2"),
        (zeros, torch.zeros(3, dtype=torch.int64), "of one shape"),
        (zeros.float(), zeros, "integers"),
    ):
        with pytest.raises(ValueError, match=message):
            confusion.update(prediction, target)
    with pytest.raises(ValueError, match="can be merged"):
        confusion.merge(SegmentationConfusion(4))
    assert int(confusion.counts.sum()) == 0


def numpy_errors(prediction: np.ndarray, target: np.ndarray, scaled: bool) -> tuple[float, float, float]:
    kept = target > 0
    p, t = prediction[kept].astype(np.float64), target[kept].astype(np.float64)
    if scaled:
        p = p * np.median(t) / np.median(p)
    ratio = np.maximum(p / t, t / p)
    return float(np.sqrt(np.mean((p - t) ** 2))), float(np.mean(np.abs(p - t) / t)), float(np.mean(ratio < 1.25))


@pytest.mark.parametrize("scaled", [False, True])
def test_depth_errors_are_eigens(scaled):
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(3, 6, 7, generator=generator) * 5 + 0.5
    prediction = target * (1 + 0.4 * torch.randn(target.shape, generator=generator)).clamp_min(0.1)
    target[:, 0, :3] = 0.0
    measured = depth_errors(prediction, target, median_scaling=scaled)
    for index in range(3):
        expected = numpy_errors(prediction[index].numpy(), target[index].numpy(), scaled)
        for name, value in zip(("rmse", "abs_rel", "delta1"), expected, strict=True):
            assert measured[name][index].item() == pytest.approx(value, abs=1e-12), name


def test_delta1_counts_ratios_below_five_quarters_either_way():
    target = torch.tensor([[[1.0, 1.0, 1.0, 1.25, 1.24, 1.4]]])
    prediction = torch.tensor([[[1.25, 1.24, 1.4, 1.0, 1.0, 1.0]]])
    assert depth_errors(prediction, target)["delta1"].item() == pytest.approx(2 / 6)


def test_median_scaling_makes_a_factor_invisible():
    target = torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(0)) + 1
    errors = depth_errors(target * torch.tensor([3.0, 0.2]).view(2, 1, 1), target, median_scaling=True)
    assert errors["rmse"].max() < 1e-6 and errors["delta1"].tolist() == [1.0, 1.0]
    assert depth_errors(target * 3, target)["abs_rel"].tolist() == pytest.approx([2.0, 2.0])


def test_invalid_pixels_change_nothing():
    target = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(0)) + 1
    prediction = target + 0.3
    reference = depth_errors(prediction[:, 1:], target[:, 1:])
    for void in (torch.nan, 0.0, torch.inf):
        masked = target.clone()
        masked[:, 0] = void
        assert depth_errors(prediction, masked) == reference
    assert depth_errors(prediction, target, torch.arange(4).view(1, 4, 1).expand(1, 4, 4) > 0) == reference


def test_depth_errors_refuse_what_has_no_error():
    ones = torch.ones(1, 2, 2)
    for prediction, target, message in (
        (ones, ones * 0, "needs valid pixels"),
        (-ones, ones, "positive depths"),
        (ones, ones[0], r"\(B, H, W\)"),
    ):
        with pytest.raises(ValueError, match=message):
            depth_errors(prediction, target)
