"""Which example is seen when: a pure function of (seed, draw number), so of no worker, rank, world size or restart.

A run is one infinite sequence of *draws* n = 0, 1, 2, ... Draw n belongs to epoch e = n // N and shows the example
permutation(seed, e)[n % N]; its augmentation is drawn from a generator seeded by (seed, n). Ranks take consecutive
slices of that sequence, so two ranks with batch B see what one rank with batch 2B sees, and resuming is a matter of
starting at a later batch. Where batches are to be of one shape, `BucketOrder` shows the same draws batch by batch, as
their buckets fill.
"""

from __future__ import annotations

import signal
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch.utils.data import DataLoader, Dataset, default_collate

from ..randomness import philox, random_words

_EPOCH_STREAM = 1  # Keeps the order of epoch e apart from the augmentation of draw e.
_CACHED_EPOCHS = 3  # Workers that prefetch straddle one epoch boundary, and so does a batch of a bucket.


class DrawableDataset(Protocol):
    """What `DrawDataset` needs: a length and examples that take their randomness from outside."""

    def __len__(self) -> int: ...

    def get(self, index: int, generator: np.random.Generator | None = None) -> Any: ...


class DrawOrder:
    """Maps draw numbers to example indices: index(n) = permutation(seed, n // N)[n % N].

    The permutation sorts N raw Philox words, whose stream numpy guarantees over versions and platforms.

    Args:
        num_examples: N > 0.
        seed: in [0, 2^64).

    Example:
        >>> DrawOrder(8, seed=42).permutation(1).tolist()
        [2, 3, 4, 7, 5, 6, 1, 0]
    """

    def __init__(self, num_examples: int, *, seed: int) -> None:
        if num_examples <= 0:
            raise ValueError(f"A dataset must hold at least one example to draw from; got {num_examples}.")
        if not 0 <= seed < 2**64:
            raise ValueError(f"The seed must lie in [0, 2^64); got {seed}.")
        self.num_examples = num_examples
        self.seed = seed
        self._permutations: OrderedDict[int, np.ndarray] = OrderedDict()

    def index(self, number: int) -> int:
        """The example that draw `number` >= 0 shows, in [0, N)."""
        epoch, position = divmod(number, self.num_examples)
        return int(self.permutation(epoch)[position])

    def permutation(self, epoch: int) -> np.ndarray:
        """The order of one epoch, (N,) int64."""
        if epoch not in self._permutations:
            words = philox(self.seed, epoch, _EPOCH_STREAM).random_raw(self.num_examples)
            self._permutations[epoch] = np.argsort(words, kind="stable")
            if len(self._permutations) > _CACHED_EPOCHS:
                self._permutations.popitem(last=False)
        return self._permutations[epoch]


class BucketOrder(DrawOrder):
    """The draws of `DrawOrder`, sorted into buckets as they come; a batch is shown when its bucket is full.

    So every batch is of one bucket, and which comes next is as random as the images are. What is left in a bucket
    when an epoch ends opens that bucket's first batch of the next one: no image is left out, and when the order of e
    epochs has been walked through, each has been shown e times but fewer than a batch of every bucket, shown once
    less. One bucket is `DrawOrder`, draw by draw.

    Args:
        buckets: (N,) the bucket of each example, from 0 on.
        batch_size: of all ranks and micro-batches of a step together.
        seed: in [0, 2^64).

    Example:
        >>> order = BucketOrder(np.array([0, 1, 0, 1, 0, 1, 0, 0]), 2, seed=42)
        >>> [order.index(number) for number in range(8)]
        [0, 2, 3, 5, 6, 4, 7, 2]
    """

    def __init__(self, buckets: np.ndarray, batch_size: int, *, seed: int) -> None:
        super().__init__(len(buckets), seed=seed)
        self.buckets, self.batch_size = buckets, batch_size
        self._counts = np.bincount(buckets)
        self._starts = np.cumsum(self._counts) - self._counts
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def index(self, number: int) -> int:
        """The example that draw `number` >= 0 shows: of the place number % batch_size in its batch."""
        batch, place = divmod(number, self.batch_size)
        epoch = batch * self.batch_size // self.num_examples
        while self._filled(epoch + 1).sum() <= batch:  # what waits in its bucket is shown an epoch later
            epoch += 1
        bucket, earlier = self._epoch(epoch)[1][batch - self._filled(epoch).sum()]
        own_epoch, position = divmod(int(earlier) * self.batch_size + place, int(self._counts[bucket]))
        return int(self._epoch(own_epoch)[0][self._starts[bucket] + position])

    def _filled(self, epoch: int) -> np.ndarray:
        """How many batches each bucket has filled before an epoch."""
        return epoch * self._counts // self.batch_size

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The examples of an epoch, bucket by bucket and each in the order of `permutation`, (N,); and its batches as
        they fill, (M, 2): the bucket, and how many batches that has filled before."""
        if epoch not in self._epochs:
            permutation = self.permutation(epoch)
            places = np.argsort(self.buckets[permutation], kind="stable")
            batches = []
            for bucket, (first, last) in enumerate(zip(self._filled(epoch), self._filled(epoch + 1), strict=True)):
                earlier = np.arange(first, last)
                last_image = (earlier + 1) * self.batch_size - 1 - epoch * self._counts[bucket]
                full_at = places[self._starts[bucket] + last_image]
                batches.append(np.stack([full_at, np.full_like(earlier, bucket), earlier], axis=1))
            table = np.concatenate(batches)
            self._epochs[epoch] = permutation[places], table[np.argsort(table[:, 0])][:, 1:]
            if len(self._epochs) > _CACHED_EPOCHS:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]


class DrawSampler:
    """Infinite batch sampler of draw numbers, for `DataLoader(DrawDataset(...), batch_sampler=...)`.

    Batch m of rank r holds the draws (m * world_size + r) * B + [0, B).

    Args:
        num_examples: N > 0; may be smaller than the batch, which then spans epochs.
        batch_size: B > 0, per rank.
        seed: of the order; `DrawDataset` must be given the same.
        rank, world_size: this process's place, 0 <= rank < world_size.
        start_batch: number of batches this rank has consumed before, to resume exactly.

    Example:
        >>> sampler = iter(DrawSampler(10, batch_size=2, seed=0, rank=1, world_size=2))
        >>> next(sampler), next(sampler)
        ([2, 3], [6, 7])
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_batch: int = 0,
    ) -> None:
        if batch_size <= 0:
            raise ValueError(f"The batch size must be positive; got {batch_size}.")
        if not 0 <= rank < world_size:
            raise ValueError(f"The rank must lie in [0, world_size = {world_size}); got {rank}.")
        if start_batch < 0:
            raise ValueError(f"start_batch must not be negative; got {start_batch}.")
        self.order = DrawOrder(num_examples, seed=seed)
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.start_batch = start_batch

    def __iter__(self) -> Iterator[list[int]]:
        batch = self.start_batch
        while True:
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))
            batch += 1


class DrawDataset(Dataset):
    """Looks a draw number up: the example of `DrawOrder`, augmented by the draw's own randomness.

    Args:
        dataset: has `__len__` and `get(index, generator)`; where it also has `get_many(indices, words)` (see
            `LatentStore`), a whole batch is read in one call and comes back as one mapping of stacked tensors. Its
            `buckets`, where it has some (see `data.buckets`), give the order.
        seed: the same as the sampler's.

    Use `collate_draws` as the loader's collate_fn; it takes both forms.

    Example:
        >>> sampler = DrawSampler(len(store), batch_size=256, seed=0)
        >>> loader = DataLoader(DrawDataset(store, seed=0), batch_sampler=sampler, collate_fn=collate_draws)
    """

    def __init__(self, dataset: DrawableDataset, *, seed: int) -> None:
        self.dataset = dataset
        buckets = getattr(dataset, "buckets", None)
        self.order = DrawOrder(len(dataset), seed=seed) if buckets is None else buckets.order(seed=seed)

    def __getitem__(self, number: int) -> Any:
        if hasattr(self.dataset, "get_many"):
            return {key: values[0] for key, values in self.__getitems__([number]).items()}
        return self.dataset.get(self.order.index(number), np.random.Generator(philox(self.order.seed, number)))

    def __getitems__(self, numbers: list[int]) -> Any:
        if not hasattr(self.dataset, "get_many"):
            return [self[number] for number in numbers]
        indices = [self.order.index(number) for number in numbers]
        return self.dataset.get_many(indices, random_words(self.order.seed, numbers))


def leave_interrupts(worker: int) -> None:
    """`worker_init_fn` of a DataLoader: Ctrl-C reaches the main process alone, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def collate_draws(batch: Any) -> Any:
    """Stacks a list of examples; a mapping is a batch already (see `DrawDataset`) and passes through."""
    return batch if isinstance(batch, Mapping) else default_collate(batch)


def draw_loader(
    dataset: Any,
    batch_size: int,
    *,
    collate: Callable[[list[Any]], Any] | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
    seed: int,
    place: Sequence[int] | None = None,
    **order: int,
) -> Iterable[Any]:
    """Endless batches of `DrawDataset` in the order of `DrawSampler`, which `order` goes to; `collate` None stacks.

    A stream makes its own loader of them, which begins to read at `place` (see `data.image_streams`).
    """
    if hasattr(dataset, "loader"):
        options: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory, "place": place}
        return dataset.loader(batch_size, seed=seed, **options, **order)
    draws, sampler = DrawDataset(dataset, seed=seed), DrawSampler(len(dataset), batch_size, seed=seed, **order)
    together = batch_size * sampler.world_size
    if isinstance(draws.order, BucketOrder) and draws.order.batch_size % together:
        raise ValueError(
            f"The buckets are those of batches of {draws.order.batch_size} images, which must be a multiple of the "
            f"{together} that all ranks take at once; fit them to the size of a step."
        )
    return DataLoader(
        draws,
        batch_sampler=sampler,
        num_workers=num_workers,
        worker_init_fn=leave_interrupts,
        collate_fn=collate or collate_draws,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
    )
