"""Laws of the draw rule: what is seen depends on (seed, draw number) and on nothing else."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from diffusers_eqvae.data.buckets import Buckets
from diffusers_eqvae.data.order import (
    BucketOrder,
    DrawDataset,
    DrawOrder,
    DrawSampler,
    collate_draws,
    draw_loader,
)


def batches(count: int, **kwargs) -> list[list[int]]:
    return list(itertools.islice(DrawSampler(10, **kwargs), count))


class Noisy:
    """Ten examples whose 'augmentation' is one uniform number."""

    def __len__(self) -> int:
        return 10

    def get(self, index: int, generator=None) -> dict:
        return {"index": index, "noise": generator.random()}


class NoisyInOneCall(Noisy):
    def get_many(self, indices, words) -> dict:
        return {"index": torch.tensor(indices), "noise": torch.from_numpy((words >> np.uint64(11)).astype(np.float64))}


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_see_what_one_rank_sees(world_size: int) -> None:
    together = batches(7, batch_size=4 * world_size, seed=3)
    ranks = [batches(7, batch_size=4, seed=3, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [list(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)] == together


def test_start_batch_continues_exactly() -> None:
    kwargs = {"batch_size": 3, "seed": 5, "rank": 1, "world_size": 2}
    assert batches(9, **kwargs)[4:] == batches(5, start_batch=4, **kwargs)


@pytest.mark.parametrize("num_examples", [1, 3, 10, 257])
def test_every_example_once_per_epoch(num_examples: int) -> None:
    order = DrawOrder(num_examples, seed=0)
    for epoch in range(4):
        seen = [order.index(epoch * num_examples + position) for position in range(num_examples)]
        assert sorted(seen) == list(range(num_examples))


def test_epochs_and_seeds_differ() -> None:
    permutations = {tuple(DrawOrder(50, seed=seed).permutation(epoch)) for seed in range(4) for epoch in range(4)}
    assert len(permutations) == 16


def test_cached_epochs_do_not_change_the_order() -> None:
    numbers = [0, 25, 13, 3, 47, 1, 26, 99, 2]
    order = DrawOrder(10, seed=1)
    assert [order.index(n) for n in numbers] == [DrawOrder(10, seed=1).index(n) for n in numbers]


def test_dataset_smaller_than_the_batch_spans_epochs() -> None:
    loader = DataLoader(DrawDataset(Noisy(), seed=2), batch_sampler=DrawSampler(10, 25, seed=2))
    index = next(iter(loader))["index"]
    assert index.shape == (25,)
    assert index.bincount().tolist() != [3] * 5 and sorted(index[:10].tolist()) == list(range(10))


@pytest.mark.parametrize("dataset", [Noisy(), NoisyInOneCall()])
def test_workers_and_restarts_change_nothing(dataset) -> None:
    def read(num_workers: int, start_batch: int, count: int) -> list:
        sampler = DrawSampler(10, 4, seed=9, start_batch=start_batch)
        loader = DataLoader(
            DrawDataset(dataset, seed=9), batch_sampler=sampler, num_workers=num_workers, collate_fn=collate_draws
        )
        rows = list(itertools.islice(loader, count))
        return [(row["index"].tolist(), row["noise"].tolist()) for row in rows]

    expected = read(0, 0, 6)
    assert read(2, 0, 6) == expected
    assert read(0, 3, 3) == expected[3:]


def test_draws_of_one_example_are_augmented_differently() -> None:
    for dataset in (Noisy(), NoisyInOneCall()):
        draws = DrawDataset(dataset, seed=0)
        assert len({float(draws[number]["noise"]) for number in range(200)}) == 200


def test_golden_orders_on_every_platform_and_in_every_process() -> None:
    """Made by this implementation and frozen: a change would silently break every resumed run."""
    code = "from diffusers_eqvae.data.order import DrawOrder;print(DrawOrder(8, seed=42).permutation(1).tolist())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == GOLDEN


GOLDEN = "[2, 3, 4, 7, 5, 6, 1, 0]"


# ------------------------------------------------------------------ buckets

# Numbers of examples by bucket, and the size of a batch: ordinary, one bucket, buckets below a batch, all below one.
FILLED = [((13, 7, 4), 3), ((10,), 4), ((9, 1, 5), 4), ((2, 1), 5), ((8, 8), 8)]


def bucket_order(counts: tuple[int, ...], size: int, seed: int = 3) -> BucketOrder:
    buckets = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    return BucketOrder(buckets, size, seed=seed)


def shown(order: BucketOrder, batches: range) -> list[list[int]]:
    size = order.batch_size
    return [[order.index(batch * size + place) for place in range(size)] for batch in batches]


@pytest.mark.parametrize(("counts", "size"), FILLED)
def test_buckets_fill_as_the_plain_order_is_walked_through(counts, size) -> None:
    order = bucket_order(counts, size)
    plain, waiting, expected = DrawOrder(sum(counts), seed=3), [[] for _ in counts], []
    for number in itertools.count():
        example = plain.index(number)
        waiting[order.buckets[example]].append(example)
        if len(full := waiting[order.buckets[example]]) == size:
            expected.append(full[:])
            full.clear()
            if len(expected) == 40:
                break
    assert shown(order, range(40)) == expected
    # Any batch by its number alone, in whatever order they are asked for.
    for batch in (39, 0, 21, 22, 5):
        assert shown(bucket_order(counts, size), range(batch, batch + 1)) == [expected[batch]]


@pytest.mark.parametrize(("counts", "size"), FILLED)
def test_a_batch_is_of_one_bucket_and_every_example_is_shown_once_an_epoch(counts, size) -> None:
    order = bucket_order(counts, size)
    for epochs in (1, 2, 7):
        batches = shown(order, range(sum(epochs * count // size for count in counts)))
        assert all(len(set(order.buckets[batch])) == 1 for batch in batches)
        times = np.bincount(np.array(batches, dtype=int).ravel(), minlength=sum(counts))
        for bucket, count in enumerate(counts):
            late = epochs - times[order.buckets == bucket]
            assert late.sum() == epochs * count % size
            assert set(late.tolist()) <= {0, 1} or count < size


def test_one_bucket_is_the_plain_order() -> None:
    order, plain = BucketOrder(np.zeros(10, dtype=int), 4, seed=5), DrawOrder(10, seed=5)
    assert [order.index(number) for number in range(100)] == [plain.index(number) for number in range(100)]


class Bucketed(Noisy):
    """Ten examples of two shapes."""

    buckets = Buckets(((2, 4), (3, 3)), np.array([0, 1, 1, 0, 1, 1, 0, 1, 1, 1]), np.zeros(10), batch_size=4)

    def get(self, index: int, generator=None) -> dict:
        return {**super().get(index, generator), "pixels": torch.zeros(self.buckets.shape(index))}


def test_ranks_micro_batches_workers_and_restarts_change_no_bucket() -> None:
    def read(count: int, batch_size: int = 4, **options) -> list[tuple[list, list, int]]:
        loader = draw_loader(Bucketed(), batch_size, seed=9, **options)
        rows = itertools.islice(loader, count)
        return [(row["index"].tolist(), row["noise"].tolist(), tuple(row["pixels"].shape[1:])) for row in rows]

    whole = read(6)
    assert {shape for *_, shape in whole} == {(2, 4), (3, 3)}
    assert read(6, num_workers=2) == whole
    assert read(3, start_batch=3) == whole[3:]
    ranks = [read(6, 2, rank=rank, world_size=2) for rank in range(2)]
    accumulated = read(12, 2)
    for step, (index, noise, shape) in enumerate(whole):
        for halves in ([ranks[0][step], ranks[1][step]], accumulated[2 * step : 2 * step + 2]):
            assert [index, noise] == [halves[0][part] + halves[1][part] for part in (0, 1)]
            assert {half[2] for half in halves} == {shape}


def test_batches_that_buckets_were_not_fitted_to_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"of batches of 4 images, .* multiple of the 6 .*; fit them to the size of a"
    ):
        draw_loader(Bucketed(), 3, seed=0, rank=0, world_size=2)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_examples": 0, "batch_size": 1, "seed": 0}, "at least one example"),
        ({"num_examples": 5, "batch_size": 0, "seed": 0}, "batch size must be positive"),
        ({"num_examples": 5, "batch_size": 1, "seed": 0, "rank": 2, "world_size": 2}, "rank must lie"),
        ({"num_examples": 5, "batch_size": 1, "seed": 0, "start_batch": -1}, "start_batch"),
        ({"num_examples": 5, "batch_size": 1, "seed": -1}, "seed must lie"),
    ],
)
def test_impossible_arguments_are_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DrawSampler(**kwargs)
