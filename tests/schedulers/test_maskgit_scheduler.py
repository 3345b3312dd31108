"""MaskGIT's scheduler: an oracle's distribution, the arccos schedule, and what it leaves alone."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from diffusers_eqvae.schedulers.scheduling_maskgit import MaskGITScheduler


def sample(scheduler, logits_of, shape, *, vocabulary, steps, generator=None, tokens=None):
    scheduler.set_timesteps(steps)
    tokens = torch.full(shape, vocabulary) if tokens is None else tokens
    for timestep in scheduler.timesteps:
        tokens = scheduler.step(logits_of(tokens), timestep, tokens, generator=generator).prev_sample
    return tokens


class Oracle:
    """The exact conditional logits of any joint distribution of n tokens out of K, whatever is masked."""

    def __init__(self, num_tokens: int, vocabulary: int) -> None:
        self.outcomes = torch.tensor(list(itertools.product(range(vocabulary), repeat=num_tokens)))
        self.probabilities = torch.rand(len(self.outcomes), dtype=torch.float64) ** 3
        self.probabilities /= self.probabilities.sum()
        self.vocabulary = vocabulary

    def __call__(self, tokens):
        flat = tokens.flatten(1)
        agree = ((flat[:, None] == self.outcomes) | (flat[:, None] == self.vocabulary)).all(2)  # (B, outcomes)
        weights = agree * self.probabilities
        choices = torch.nn.functional.one_hot(self.outcomes, self.vocabulary).double()  # (outcomes, n, K)
        marginals = torch.einsum("bo,onk->bkn", weights, choices)
        return (marginals / marginals.sum(1, keepdim=True)).log().unflatten(2, tokens.shape[1:])

    def expected(self) -> torch.Tensor:
        return self.probabilities

    def counted(self, tokens) -> torch.Tensor:
        place = (tokens.flatten(1) * self.vocabulary ** torch.arange(tokens[0].numel() - 1, -1, -1)).sum(1)
        return torch.bincount(place, minlength=len(self.outcomes)).double() / len(tokens)


@pytest.mark.parametrize("temperature", [1e12, 4.5, 0.0])
def test_an_oracle_is_sampled_exactly_where_the_order_does_not_look_at_the_tokens(temperature):
    """One token a step, chosen by the noise alone, is ancestral sampling in a random order: exact for any joint.

    With the confidence in play, likely tokens are settled first, and the samples are sharper than the distribution.
    """
    oracle, count = Oracle(4, 3), 40_000
    drawn = sample(MaskGITScheduler(choice_temperature=temperature), oracle, (count, 2, 2), vocabulary=3, steps=4)
    assert drawn.max() < 3
    expected, found = oracle.expected(), oracle.counted(drawn)
    chi_squared = (count * (found - expected) ** 2 / expected).sum().item()
    degrees = len(expected) - 1
    exact = chi_squared < degrees + 4 * math.sqrt(2 * degrees)  # four standard deviations
    assert exact == (temperature == 1e12), chi_squared


def test_independent_alike_tokens_keep_their_distribution_at_any_number_of_steps():
    """Where all possible tokens are equally likely, the confidence says nothing, and nothing is sharpened."""
    vocabulary, allowed = 8, torch.tensor([0, 3, 4])
    table = torch.full((vocabulary,), -math.inf).index_fill(0, allowed, 0.0)

    def logits_of(tokens):
        return table[None, :, None, None].expand(len(tokens), -1, *tokens.shape[1:])

    for steps in (1, 3, 8):
        drawn = sample(MaskGITScheduler(), logits_of, (3000, 4, 4), vocabulary=vocabulary, steps=steps)
        shares = torch.bincount(drawn.flatten(), minlength=vocabulary) / drawn.numel()
        deviation = math.sqrt(2 / 9 / drawn.numel())
        torch.testing.assert_close(shares[allowed], torch.full((3,), 1 / 3), atol=4 * deviation, rtol=0)
        assert shares[allowed].sum() == pytest.approx(1.0)


def test_without_noise_the_likeliest_tokens_stay_first():
    logits = torch.full((1, 3, 2, 2), -8.0)
    sureness = torch.tensor([[2.0, 9.0], [5.0, 1.0]])
    logits[0, 1] = sureness
    scheduler = MaskGITScheduler(choice_temperature=0.0)
    scheduler.set_timesteps(4)
    tokens, settled = torch.full((1, 2, 2), 3), []
    for timestep in scheduler.timesteps:
        after = scheduler.step(logits, timestep, tokens, generator=torch.Generator().manual_seed(0)).prev_sample
        settled += ((tokens == 3) & (after != 3)).flatten().nonzero().flatten().tolist()
        tokens = after
    assert settled == sureness.flatten().argsort(descending=True).tolist()


@pytest.mark.parametrize(
    ("steps", "kept"),
    [
        (8, [1, 18, 26, 32, 38, 43, 48, 50]),
        (12, [1, 9, 13, 17, 19, 22, 24, 26, 28, 30, 32, 35]),
        (1, [256]),
        (256, [1] * 256),
    ],
)
def test_the_schedule_is_arccos(steps, kept):
    """The numbers of the PyTorch port for 256 tokens; and those of every size sum to all, at least one each."""
    scheduler = MaskGITScheduler()
    scheduler.set_timesteps(steps)
    assert scheduler.counts(256) == kept
    for num_tokens in {*range(steps, steps + 20), 1000}:
        counts = scheduler.counts(num_tokens)
        assert sum(counts) == num_tokens and min(counts) >= 1
    assert scheduler.timesteps[0] == 1000 and (scheduler.timesteps.diff() < 0).all()


def test_each_step_settles_what_is_due_and_touches_nothing_else():
    scheduler, vocabulary = MaskGITScheduler(), 5
    scheduler.set_timesteps(4)
    tokens = torch.full((3, 4, 4), vocabulary)
    tokens[:, 0, 0] = 2  # known from the beginning: inpainting
    masked = [int((tokens[0] == vocabulary).sum())]
    for timestep in scheduler.timesteps:
        after = scheduler.step(torch.randn(3, vocabulary, 4, 4), timestep, tokens).prev_sample
        known = tokens != vocabulary
        assert torch.equal(after[known], tokens[known])
        tokens = after
        assert len({int((each == vocabulary).sum()) for each in tokens}) == 1
        masked.append(int((tokens[0] == vocabulary).sum()))
    assert [before - after for before, after in itertools.pairwise(masked)] == [*scheduler.counts(16)[:3], 5]
    assert (tokens[:, 0, 0] == 2).all() and tokens.max() < vocabulary


def test_a_sample_depends_on_its_own_generator_alone():
    logits = torch.randn(3, 6, 4, 4)

    def run(rows, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return sample(
            MaskGITScheduler(), lambda _: logits[rows], (len(rows), 4, 4), vocabulary=6, steps=3, generator=generators
        )

    together = run([0, 1, 2], [5, 6, 7])
    assert torch.equal(together[1:2], run([1], [6])) and not torch.equal(together[1:2], run([1], [5]))


def test_what_cannot_be_sampled_is_refused():
    scheduler = MaskGITScheduler()
    with pytest.raises(ValueError, match="call set_timesteps before step"):
        scheduler.step(torch.zeros(1, 2, 2, 2), 1000.0, torch.full((1, 2, 2), 2))
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="num_inference_steps must be at most 4, the number of tokens; got 5"):
        scheduler.step(torch.zeros(1, 2, 2, 2), scheduler.timesteps[0], torch.full((1, 2, 2), 2))
    with pytest.raises(ValueError, match=r"No step stands at timestep 3\.0; take it from scheduler\.timesteps"):
        scheduler.step(torch.zeros(1, 2, 2, 2), 3.0, torch.full((1, 2, 2), 2))
    for options, words in (
        ({"choice_temperature": -1.0}, "choice_temperature must be finite and >= 0"),
        ({"choice_temperature": math.nan}, "choice_temperature must be finite and >= 0"),
        ({"prediction_type": "epsilon"}, "prediction_type must be 'logits'"),
    ):
        with pytest.raises(ValueError, match=words):
            MaskGITScheduler(**options)
