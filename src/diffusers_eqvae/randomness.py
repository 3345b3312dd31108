"""Randomness as a function of (seed, stream, index): resumed equals uninterrupted, two ranks equal one.

Whatever is random belongs to a place in a run (a step, a sample of a step, an image of a set, a draw of an epoch), and
never to the process that happens to compute it. `stream` keeps apart what is drawn at one place:

    torch_generator, numpy_generator     SeedSequence((seed, index, stream)): noise and labels of image `index`
    philox                               key (seed, index), counter word `stream`: orders and crops of a data set
    random_words                         splitmix64 of (seed, index): one decision per index without a generator
    StepRandomness                       Philox of (seed, step, call, place in the global batch): noise of a step
    reseed_global                        Python's, NumPy's and torch's own generators, before every micro-batch
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

# A number below every other that float32 uniforms on a grid of 2^-24 can take: keeps them out of 0.
_SMALLEST_UNIFORM = np.float32(2.0**-25)


def torch_generator(seed: int, index: int, stream: int = 0) -> torch.Generator:
    """A CPU generator, so that no device matters, seeded with 63 bits of SeedSequence((seed, index, stream)).

    Example:
        >>> torch.randn(3, generator=torch_generator(seed=0, index=17))
    """
    word = np.random.SeedSequence((seed, index, stream)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(word >> np.uint64(1)))


def numpy_generator(seed: int, index: int, stream: int = 0) -> np.random.Generator:
    """PCG64 of SeedSequence((seed, index, stream)).

    Example:
        >>> int(numpy_generator(seed=0, index=17, stream=1).integers(1000))
    """
    return np.random.default_rng((seed, index, stream))


def philox(seed: int, index: int, stream: int = 0) -> np.random.Philox:
    """Philox4x64 with key (seed, index) from counter (0, 0, 0, stream): raw words that numpy guarantees for ever.

    Example:
        >>> order = np.argsort(philox(seed=0, index=epoch, stream=1).random_raw(num_examples), kind="stable")
    """
    return np.random.Philox(
        key=np.array([seed, index], dtype=np.uint64), counter=np.array([0, 0, 0, stream], dtype=np.uint64)
    )


def random_words(seed: int, indices: Sequence[int]) -> np.ndarray:
    """One random 64-bit word per index, (len(indices),) uint64: splitmix64 (Steele et al. 2014) of (seed, index).

    Example:
        >>> mirrored = random_words(0, [4, 5, 6]) >> np.uint64(63)
    """
    return _splitmix64(np.asarray(indices, dtype=np.uint64) ^ _splitmix64(np.asarray([seed], dtype=np.uint64)))


def _splitmix64(words: np.ndarray) -> np.ndarray:
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def reseed_global(seed: int, rank: int, step: int, micro: int) -> None:
    """Seeds Python's, NumPy's and torch's (CPU and CUDA) global generators from (seed, rank, step, micro-batch)."""
    words = np.random.SeedSequence((seed, rank, step, micro)).generate_state(3, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[1] >> np.uint64(32)))
    torch.manual_seed(int(words[2] >> np.uint64(1)))


@contextmanager
def preserved_global_state() -> Iterator[None]:
    """Whatever is drawn inside leaves the global generators as they were (validation must not disturb training)."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


class StepRandomness:
    """Noise that depends on the seed, the step and the sample's place in the global batch, and on nothing else.

    Sample i of micro-batch m on rank r has the global place j = (m * world_size + r) * B + i, the order of
    `data.order.DrawSampler`. Call number c of a micro-batch draws sample j of step s from Philox4x64 with key(seed)
    and counter (0, j, c, s). So 2 ranks of B see what 1 rank of 2B sees, accumulation 2x1 sees what 1x2 sees, and CPU
    and GPU see the same numbers. Calls are told apart by their order: make the same calls in every micro-batch.

    Args:
        seed: of the run, >= 0.
        rank, world_size: of this process.

    Attributes:
        step, micro: where it stands.
        call: number of the next draw in this micro-batch.

    Example:
        >>> randomness = StepRandomness(seed=0).at(step=7, micro=0)
        >>> noise = randomness.randn((4, 16, 32, 32))
    """

    def __init__(self, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, world_size); got rank {rank} of {world_size}.")
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self._key = np.random.SeedSequence(seed).generate_state(2, np.uint64)
        self.at(0, 0)

    def at(self, step: int, micro: int) -> StepRandomness:
        """Moves to a micro-batch and restarts its calls and its shared generator; returns itself."""
        self.step, self.micro, self.call = step, micro, 0
        self._shared: torch.Generator | None = None
        return self

    def shared_generator(self) -> torch.Generator:
        """The CPU generator of the step, the same on every rank and in every micro-batch.

        For what must be drawn once per optimizer step (EQ-VAE's tau). All callers of a micro-batch continue one
        generator, so the regularizers of a step draw different numbers: ask in the same order in every micro-batch.

        Example:
            >>> angle = torch.randint(4, (), generator=randomness.shared_generator())
        """
        if self._shared is None:
            self._shared = torch_generator(self.seed, self.step)
        return self._shared

    def randn(
        self, shape: Sequence[int], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Standard normal noise (B, ...), this rank's part of the step's global draw."""
        out, rows = self._rows(shape, device)
        for row, generator in rows:
            generator.standard_normal(dtype=np.float32, out=row)
        return out.to(device, dtype, non_blocking=True)

    def rand(
        self, shape: Sequence[int], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Uniform numbers (B, ...) in the open interval (0, 1), this rank's part of the step's global draw."""
        out, rows = self._rows(shape, device)
        for row, generator in rows:
            generator.random(dtype=np.float32, out=row)
            np.maximum(row, _SMALLEST_UNIFORM, out=row)
        return out.to(device, dtype, non_blocking=True)

    def _rows(
        self, shape: Sequence[int], device: torch.device | str
    ) -> tuple[Tensor, Iterable[tuple[np.ndarray, np.random.Generator]]]:
        """An empty tensor on the host, and each sample's row of it with the sample's own generator."""
        # Page-locked for a GPU: only from there does the copy not wait for everything the GPU still has to do.
        out = torch.empty(tuple(shape), pin_memory=torch.device(device).type == "cuda")
        return out, zip(out.numpy().reshape(len(out), -1), self._sample_generators(len(out)), strict=True)

    def _sample_generators(self, batch_size: int) -> Iterator[np.random.Generator]:
        first = (self.micro * self.world_size + self.rank) * batch_size
        call, self.call = self.call, self.call + 1
        for place in range(first, first + batch_size):
            counter = np.array([0, place, call, self.step], np.uint64)
            yield np.random.Generator(np.random.Philox(key=self._key, counter=counter))
