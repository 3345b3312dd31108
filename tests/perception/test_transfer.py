"""Annotations carried over by nearest positions: exact where the answer is known, and equivariant."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_eqvae.images import adm_center_crop
from diffusers_eqvae.perception import NearestTransfer, label_targets, position_labels, position_values, to_size
from diffusers_eqvae.perception.annotated_images import nearest_center_crop, paired_files, read_annotations
from diffusers_eqvae.perception.tasks import DepthTask, SegmentationTask
from diffusers_eqvae.perception.transfer import target_means
from diffusers_eqvae.perception.visualize import draw_depth, draw_labels, label_colours

VOID = 255


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.randint(0, 5, (2, 4, 4), generator=torch.Generator().manual_seed(1))


def test_a_position_takes_its_most_frequent_label():
    mask = torch.tensor([[[1, 1, 3, VOID], [1, 0, 3, VOID], [VOID, VOID, 4, 4], [VOID, 2, 2, 2]]])
    assert position_labels(mask, (2, 2)).tolist() == [[[1, 3], [VOID, 2]]]  # ties: 3 before void, 2 before 4
    assert position_labels(mask, (4, 4)).tolist() == mask.tolist()
    assert position_labels(mask.to(torch.uint8), (2, 2)).tolist() == [[[1, 3], [VOID, 2]]]


def test_majority_rotates_with_the_mask():
    mask = torch.randint(0, 3, (1, 12, 8), generator=torch.Generator().manual_seed(0))
    rotated = position_labels(torch.rot90(mask, 1, (1, 2)), (2, 3))
    assert torch.equal(rotated, torch.rot90(position_labels(mask, (3, 2)), 1, (1, 2)))


def test_values_of_a_position_are_the_mean_of_the_valid_ones():
    values = torch.tensor([[[1.0, 3.0, 9.0, 9.0], [5.0, torch.nan, 9.0, 9.0]]])
    targets = position_values(values, torch.tensor([[[1, 1, 0, 0], [1, 0, 0, 0]]]).bool(), (1, 2))
    assert targets[0, 0, 0, 0] == 3.0 and targets[0, 0, 0, 1].isnan()


def test_transfer_from_an_image_onto_itself_is_perfect(features, labels):
    targets = label_targets(labels, 5)
    transferred = NearestTransfer(features, targets, neighbours=1)(features)
    assert torch.equal(transferred, targets)
    depth = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    assert torch.equal(NearestTransfer(features, depth, neighbours=1)(features), depth)


def test_transfer_rotates_with_the_features(features, labels):
    transfer = NearestTransfer(features, label_targets(labels, 5), neighbours=3)
    new = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(transfer(torch.rot90(new, 1, (2, 3))), torch.rot90(transfer(new), 1, (2, 3)), atol=1e-6)


def test_transfer_is_the_softmax_of_cosines(features, labels):
    new = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(3))
    bank = features.double().movedim(1, -1).reshape(-1, 8).numpy()
    query = (new.double().movedim(1, -1).reshape(-1, 8).numpy() - bank.mean(0)) / bank.std(0)
    bank = (bank - bank.mean(0)) / bank.std(0)
    cosine = query @ bank.T / np.linalg.norm(query, axis=1)[:, None] / np.linalg.norm(bank, axis=1)
    expected = []
    for row in cosine:
        nearest = np.argsort(-row)[:4]
        weight = np.exp(row[nearest] / 0.07)
        expected.append(weight @ np.eye(5)[labels.flatten()[nearest]] / weight.sum())
    transferred = NearestTransfer(features, label_targets(labels, 5), neighbours=4)(new)
    assert np.allclose(transferred[0].reshape(5, -1).T, expected, atol=1e-5)


def test_shares_sum_to_one_and_void_positions_teach_nothing(features, labels):
    labels[0, :2] = VOID
    targets = label_targets(labels, 5)
    shares = NearestTransfer(features, targets)(features)
    assert torch.allclose(shares.sum(1), torch.ones(2, 4, 4)) and shares.isfinite().all()
    kept = NearestTransfer(features[1:], targets[1:])
    moved = features.clone()
    moved[0] = torch.nan
    targets[0] = torch.nan
    assert torch.equal(NearestTransfer(moved, targets)(features), kept(features))


def test_transfer_in_chunks_is_transfer(features, labels, monkeypatch):
    transfer = NearestTransfer(features, label_targets(labels, 5))
    whole = transfer(features)
    monkeypatch.setattr("diffusers_eqvae.perception.transfer._CHUNK", 100)
    assert torch.allclose(transfer(features), whole, atol=1e-6)


class Sizes(TorchDispatchMode):
    """How many numbers each operation gave."""

    def __init__(self):
        super().__init__()
        self.of = defaultdict(list)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        output = function(*arguments, **(options or {}))
        if isinstance(output, torch.Tensor):
            self.of[str(function.overloadpacket)].append(output.numel())
        return output


def test_neither_similarities_nor_targets_exceed_the_budget(features, monkeypatch):
    monkeypatch.setattr("diffusers_eqvae.perception.transfer._CHUNK", 2000)
    for num_classes in (2, 150):
        transfer = NearestTransfer(features, torch.zeros(2, num_classes, 4, 4), neighbours=3)
        with Sizes() as sizes:
            assert transfer(torch.randn(30, 8, 4, 4)).shape == (30, num_classes, 4, 4)
        assert 1000 < max(sizes.of["aten.mm"]) <= 2000 or 1000 < max(sizes.of["aten.index"]) <= 2000
        assert max(sizes.of["aten.mm"] + sizes.of["aten.index"]) <= 2000


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_may_be_of_any_integer_type(labels, dtype):
    labels[0, 0] = VOID
    assert torch.equal(label_targets(labels.to(dtype), 5).nan_to_num(-1), label_targets(labels, 5).nan_to_num(-1))
    with pytest.raises(ValueError, match=r"Labels must be 0\.\.3"):
        label_targets(labels.to(dtype), 4)


def test_means_look_at_no_image():
    labels = torch.tensor([[[0, 1], [VOID, 2]], [[0, 1], [VOID, 1]], [[0, 2], [VOID, 1]]])
    targets = label_targets(labels, 3)
    assert target_means(targets, per_position=True).argmax(0).tolist() == [[0, 1], [1, 1]]  # void: the mode
    assert target_means(targets)[:, 0, 0].tolist() == pytest.approx([3 / 9, 4 / 9, 2 / 9])


def test_what_does_not_belong_together_is_refused(features, labels):
    targets = label_targets(labels, 5)
    for call, message in (
        (lambda: NearestTransfer(features, targets[:1]), "same images and latent positions"),
        (lambda: NearestTransfer(features, targets, neighbours=0), "At least one neighbour"),
        (lambda: NearestTransfer(features, targets * torch.nan), "Nothing is annotated"),
        (lambda: label_targets(labels, 4), "Labels must be 0..3"),
        (lambda: position_labels(labels, (3, 3)), "do not tile"),
        (lambda: label_targets(position_labels(labels - 1, (2, 2)), 5), r"Labels must be 0\.\.4"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("size", [(64, 48), (37, 90), (20, 33)])
def test_annotations_are_cropped_as_images_are(size):
    """A disc drawn as an image and as a mask covers the same pixels after both crops."""
    y, x = np.mgrid[: size[1], : size[0]]
    mask = (np.hypot(y - size[1] / 2, x - size[0] / 2 - 3) < min(size) / 3).astype(np.uint8)
    image = np.asarray(adm_center_crop(Image.fromarray(mask * 255).convert("RGB"), 20))[..., 0]
    cropped = nearest_center_crop(mask, 20)
    assert cropped.shape == (20, 20) and set(np.unique(cropped)) == {0, 1}
    assert ((image > 127) == (cropped == 1)).mean() > 0.97


def test_annotations_are_integers_of_one_channel_with_an_image_each(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    with pytest.raises(ValueError, match="0 images"):
        paired_files(tmp_path / "images", tmp_path / "masks")
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.jpg")
    with pytest.raises(ValueError, match="1 of them without: a"):
        paired_files(tmp_path / "images", tmp_path / "masks")
    path = tmp_path / "masks" / "a.png"
    Image.fromarray(np.full((8, 8), 1500, np.uint16)).save(path)
    assert paired_files(tmp_path / "images", tmp_path / "masks") == [(tmp_path / "images" / "a.jpg", path)]
    assert torch.equal(read_annotations([path], 8), torch.full((1, 8, 8), 1500))
    assert torch.equal(DepthTask().read([path], 8), torch.full((1, 8, 8), 1.5))
    Image.fromarray(np.kron(np.array([[0, 2000], [3000, 0]], np.uint16), np.ones((4, 4), np.uint16))).save(path)
    cells = DepthTask().targets(DepthTask().read([path], 8), (2, 2))[0, 0]
    assert cells.isnan().tolist() == [[True, False], [False, True]] and cells[0, 1] == 2.0 and cells[1, 0] == 3.0
    Image.new("L", (8, 8), VOID).save(path)
    with pytest.raises(ValueError, match="16 bits"):
        DepthTask().read([path], 8)
    with pytest.raises(ValueError, match="ignored label"):
        SegmentationTask.of_files([path])
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(ValueError, match="one channel"):
        read_annotations([path], 8)


def test_depths_are_compared_up_to_a_factor_where_asked():
    truth = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0)) + 1
    figures = {}
    for median_scaling in (False, True):
        task = DepthTask(median_scaling=median_scaling)
        task.score("m", truth * 3, truth)
        figures[median_scaling] = task.results()["m"]
    assert figures[False]["abs_rel"] == pytest.approx(2.0) and figures[False]["delta1"] == 0.0
    assert figures[True]["rmse"] == pytest.approx(0.0, abs=1e-6) and figures[True]["delta1"] == 1.0


def test_labels_are_enlarged_along_straight_edges():
    labels = torch.tensor([[[0, 1], [0, 1]]])
    enlarged = to_size(label_targets(labels, 2), (8, 8)).argmax(1)
    assert torch.equal(enlarged, labels.repeat_interleave(4, 1).repeat_interleave(4, 2))


def test_colours_belong_to_labels_and_near_is_white():
    assert len({tuple(colour) for colour in label_colours(150).tolist()}) == 150
    assert torch.equal(label_colours(150)[:4], label_colours(4))
    drawn = draw_labels(torch.tensor([[0, 2, VOID]]), ignore_index=VOID)
    assert drawn.shape == (3, 1, 3) and torch.equal(drawn[:, 0, 1], label_colours(3)[2])
    assert drawn[:, 0, 2].unique().numel() == 1
    depth = draw_depth(torch.tensor([[1.0, 3.0, 9.0, torch.nan]]), (1.0, 3.0))
    assert depth[:, 0, :3].tolist() == [[1.0, -1.0, -1.0]] * 3 and depth[2, 0, 3] > depth[0, 0, 3]
