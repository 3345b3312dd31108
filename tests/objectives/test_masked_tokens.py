"""The masked-token objective: what is drawn, what is minimised, and what its gradient reaches."""

from __future__ import annotations

import math

import pytest
import torch

from diffusers_eqvae.losses.masked_tokens import mask_probability, masked_token_loss
from diffusers_eqvae.models.transformer_maskgit import MaskGITTransformer2DModel
from diffusers_eqvae.objectives.base import OBJECTIVES
from diffusers_eqvae.objectives.masked_tokens import MaskedTokensArguments, MaskedTokensObjective
from diffusers_eqvae.randomness import StepRandomness
from diffusers_eqvae.regularizers import GeneratorRegularizer


@pytest.fixture
def model():
    return MaskGITTransformer2DModel(
        sample_size=4, codebook_size=16, num_layers=2, num_attention_heads=2, attention_head_dim=8, num_classes=3
    ).eval()


def batch_of(size):
    return {"tokens": torch.randint(16, (size, 4, 4)), "class_labels": torch.randint(3, (size,))}


def test_the_mask_follows_arccos(model):
    objective = MaskedTokensObjective(model)
    draw = objective.draw(batch_of(20_000), StepRandomness(seed=0))
    shares, masked = draw["shares"], draw["masked"].float().flatten(1).mean(1)
    # P(share < s) = P(arccos(r) < s pi / 2) = 1 - cos(s pi / 2)
    for s in (0.2, 0.5, 0.8):
        assert (shares < s).float().mean().item() == pytest.approx(1 - math.cos(s * math.pi / 2), abs=0.012)
    assert masked.mean().item() == pytest.approx(2 / math.pi, abs=0.005)
    assert (masked - shares).mean().abs() < 0.003  # Bernoulli per token
    assert draw["drop_labels"].float().mean().item() == pytest.approx(0.1, abs=0.007)
    assert mask_probability(torch.tensor([0.0, 1.0])).tolist() == [1.0, 0.0]


def test_two_halves_of_a_batch_average_to_the_whole(model):
    """Whatever number of tokens is masked in either: two ranks are one with twice the batch."""
    objective, batch = MaskedTokensObjective(model), batch_of(6)
    draw = objective.draw(batch, StepRandomness(seed=1))
    draw["masked"][:3] = False
    draw["masked"][0, 0, 0] = True

    def loss_of(rows):
        part = {name: value[rows] for name, value in batch.items()}
        own = {name: value[rows] for name, value in draw.items() if name != "regularizers"} | {"regularizers": {}}
        return objective.total(objective(part, own))[0]

    halves = (loss_of(slice(0, 3)) + loss_of(slice(3, 6))) / 2
    torch.testing.assert_close(loss_of(slice(0, 6)), halves)


def test_tokens_that_are_seen_count_for_nothing(model):
    logits, tokens = torch.randn(2, 16, 4, 4), torch.randint(16, (2, 4, 4))
    masked = torch.rand(2, 4, 4) < 0.5
    changed = torch.where(masked[:, None], logits, torch.randn_like(logits))
    assert torch.equal(masked_token_loss(logits, tokens, masked), masked_token_loss(changed, tokens, masked))
    assert (masked_token_loss(logits, tokens, torch.zeros_like(masked)) == 0).all()
    with pytest.raises(ValueError, match="The logits of one token and the tokens must have equal shapes"):
        masked_token_loss(logits[..., :3], tokens, masked)


def test_the_gradient_reaches_every_weight_even_where_nothing_is_masked(model):
    objective, batch = MaskedTokensObjective(model), batch_of(3)
    draw = objective.draw(batch, StepRandomness(seed=0))
    draw["masked"][:] = False
    loss, _ = objective.total(objective(batch, draw))
    loss.backward()
    assert loss == 0 and all(parameter.grad is not None for parameter in model.parameters())


class Sharper(GeneratorRegularizer):
    """Looks at all that a penalty is shown."""

    hidden_layers = (1,)

    def penalty(self, state, batch, draw):
        self.state = state
        return state.hidden_states[1].square().mean()


def test_a_penalty_sees_logits_tokens_and_shares(model):
    regularizer = Sharper()
    objective, batch = MaskedTokensObjective(model, {"sharper": regularizer}), batch_of(3)
    draw = objective.draw(batch, StepRandomness(seed=0))
    output = objective(batch, draw)
    state = regularizer.state
    assert state.prediction.shape == (3, 16, 4, 4) and torch.equal(state.target, batch["tokens"])
    assert torch.equal(state.noisy == 16, draw["masked"]) and torch.equal(state.sigmas, draw["shares"])
    assert set(output["terms"]) == {"masked", "sharper"} and state.hidden_states[1].shape == (3, 16, 16)


def test_it_is_found_by_name_and_refuses_another_smoothing():
    assert OBJECTIVES["masked_tokens"] is MaskedTokensObjective and MaskedTokensObjective.reads == "tokens"
    with pytest.raises(ValueError, match="mask_label_smoothing"):
        MaskedTokensArguments(mask_label_smoothing=1.0)
