"""Randomness as a function of (seed, rank, step): the reason why a resumed run equals an uninterrupted one.

Two kinds: the global generators of Python, NumPy and torch, reseeded before every micro-batch (what a module draws on
its own, such as dropout), and `StepRandomness`, whose numbers belong to a *sample of the step* and not to the process
that happens to compute it, so that they also survive a change of world size or accumulation.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

# A number below every other that float32 uniforms on a grid of 2^-24 can take: keeps them out of 0.
_SMALLEST_UNIFORM = np.float32(2.0**-25)


def reseed_global(seed: int, rank: int, step: int, micro: int) -> None:
    """Seeds Python's, NumPy's and torch's (CPU and CUDA) global generators from (seed, rank, step, micro)."""
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
        """Moves to a micro-batch and restarts its calls; returns itself."""
        self.step, self.micro, self.call = step, micro, 0
        self._shared: torch.Generator | None = None
        return self

    def shared_generator(self) -> torch.Generator:
        """The CPU generator of what is drawn once per optimizer step (EQ-VAE's tau).

        It gives the same numbers on every rank and in every micro-batch of the step. All callers of one micro-batch
        share it, so that their numbers differ; `at` starts it anew.
        """
        if self._shared is None:
            word = np.random.SeedSequence((self.seed, self.step, 0)).generate_state(1, np.uint64)[0]
            self._shared = torch.Generator().manual_seed(int(word >> np.uint64(1)))
        return self._shared

    def randn(
        self, shape: Sequence[int], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Standard normal noise (B, ...), this rank's part of the step's global draw."""
        out = _host_buffer(shape, device)
        rows = out.numpy().reshape(len(out), -1)
        for row, generator in zip(rows, self._sample_generators(len(out)), strict=True):
            generator.standard_normal(dtype=np.float32, out=row)
        return out.to(device, dtype, non_blocking=True)

    def rand(
        self, shape: Sequence[int], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Uniform numbers (B, ...) in the open interval (0, 1), this rank's part of the step's global draw."""
        out = _host_buffer(shape, device)
        rows = out.numpy().reshape(len(out), -1)
        for row, generator in zip(rows, self._sample_generators(len(out)), strict=True):
            generator.random(dtype=np.float32, out=row)
        np.maximum(rows, _SMALLEST_UNIFORM, out=rows)
        return out.to(device, dtype, non_blocking=True)

    def _sample_generators(self, batch_size: int) -> Iterator[np.random.Generator]:
        first = (self.micro * self.world_size + self.rank) * batch_size
        call, self.call = self.call, self.call + 1
        for place in range(first, first + batch_size):
            counter = np.array([0, place, call, self.step], np.uint64)
            yield np.random.Generator(np.random.Philox(key=self._key, counter=counter))


def _host_buffer(shape: Sequence[int], device: torch.device | str) -> Tensor:
    """Page-locked for a GPU: only from there does the copy not wait for everything the GPU still has to do."""
    return torch.empty(tuple(shape), pin_memory=torch.device(device).type == "cuda")
