"""Noise belongs to a sample of the step, not to the process that computes it."""

import random

import numpy as np
import pytest
import torch

from diffusers_eqvae.randomness import StepRandomness, preserved_global_state, reseed_global


def draw(kind, batch, *, rank=0, world_size=1, micro=0, step=3, seed=0):
    randomness = StepRandomness(seed, rank, world_size).at(step, micro)
    return getattr(randomness, kind)((batch, 3, 2))


@pytest.mark.parametrize("kind", ["rand", "randn"])
def test_two_ranks_are_one_rank_with_twice_the_batch(kind):
    ranks = torch.cat([draw(kind, 2, rank=rank, world_size=2) for rank in range(2)])
    assert torch.equal(ranks, draw(kind, 4))


@pytest.mark.parametrize("kind", ["rand", "randn"])
def test_accumulation_is_a_larger_batch(kind):
    parts = torch.cat([draw(kind, 2, micro=micro) for micro in range(2)])
    assert torch.equal(parts, draw(kind, 4))
    both = [draw(kind, 1, micro=micro, rank=rank, world_size=2) for micro in range(2) for rank in range(2)]
    assert torch.equal(torch.cat(both), draw(kind, 4))


def test_steps_seeds_calls_and_samples_differ():
    randomness = StepRandomness(0).at(3, 0)
    draws = [randomness.randn((2, 64)), randomness.randn((2, 64))]
    draws += [StepRandomness(0).at(4, 0).randn((2, 64)), StepRandomness(1).at(3, 0).randn((2, 64))]
    rows = torch.cat(draws)
    assert (rows @ rows.T / 64 - torch.eye(8)).abs().max() < 0.6
    assert len({tuple(row.tolist()) for row in rows}) == 8


def test_at_restarts_the_calls():
    randomness = StepRandomness(0)
    first = randomness.at(2, 0).rand((4,))
    randomness.rand((4,))
    assert torch.equal(randomness.at(2, 0).rand((4,)), first)


def test_distributions():
    normal, uniform = StepRandomness(0).randn((64, 1000)), StepRandomness(0).rand((64, 1000))
    assert abs(normal.mean()) < 0.01 and abs(normal.std() - 1) < 0.01
    assert abs(normal.pow(4).mean() - 3) < 0.1
    assert uniform.min() > 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.005
    assert abs(uniform.std() - 12**-0.5) < 0.005


def test_rand_never_gives_zero(monkeypatch):
    class Zeros:
        def random(self, dtype, out):
            out[:] = 0

    monkeypatch.setattr(StepRandomness, "_sample_generators", lambda self, batch: (Zeros() for _ in range(batch)))
    assert (StepRandomness(0).rand((3, 2)) > 0).all()


def test_shared_generator_is_equal_on_all_ranks_and_micro_batches():
    def numbers(rank, micro, step):
        randomness = StepRandomness(0, rank, 4).at(step, micro)
        return [torch.rand(4, generator=randomness.shared_generator()).tolist() for _ in range(2)]

    assert numbers(0, 0, 5) == numbers(3, 1, 5) != numbers(0, 0, 6)
    first, second = numbers(0, 0, 5)
    assert first != second  # two callers of one step continue one generator
    randomness = StepRandomness(0).at(5, 0)
    torch.rand(3, generator=randomness.shared_generator())
    assert torch.rand(4, generator=randomness.at(5, 1).shared_generator()).tolist() == first


def global_numbers():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_reseeding_sets_all_three_global_generators():
    seen = set()
    for place in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]:
        reseed_global(*place)
        first = global_numbers()
        reseed_global(*place)
        assert global_numbers() == first
        seen.update(first)
    assert len(seen) == 15


def test_preserved_state_hides_what_is_drawn_inside():
    reseed_global(0, 0, 0, 0)
    expected = global_numbers()
    reseed_global(0, 0, 0, 0)
    with preserved_global_state():
        global_numbers()
    assert global_numbers() == expected


def test_rank_outside_the_world_is_refused():
    with pytest.raises(ValueError, match="rank"):
        StepRandomness(0, 2, 2)
