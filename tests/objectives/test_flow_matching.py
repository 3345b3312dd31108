"""Flow matching as an objective: its terms, its draws, what its regularizers see and move."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffusers_eqvae.models.transformer_sit import SiTTransformer2DModel
from diffusers_eqvae.objectives.flow_matching import FlowMatchingArguments, FlowMatchingObjective
from diffusers_eqvae.randomness import StepRandomness
from diffusers_eqvae.regularizers import GeneratorRegularizer


class Projector(GeneratorRegularizer):
    """Predicts the clean latents' mean from the tokens after block 2; off from a step on, as HASTE's switch."""

    hidden_layers = (2,)
    weight = 0.5

    def __init__(self, width: int = 16, stop_at: int = 10) -> None:
        super().__init__()
        self.head, self.stop_at, self.seen = nn.Linear(width, 1), stop_at, None

    def draw(self, size, randomness):
        return randomness.rand((3,)) if randomness.step < self.stop_at else None

    def penalty(self, state, batch, draw):
        self.seen = state
        return (self.head(state.hidden_states[2]).mean((1, 2)) - state.clean.mean((1, 2, 3))).square().mean()


def make_model(**options) -> SiTTransformer2DModel:
    torch.manual_seed(0)
    sizes = {"sample_size": 4, "patch_size": 2, "num_layers": 4, "num_attention_heads": 2, "attention_head_dim": 8}
    model = SiTTransformer2DModel(**{**sizes, "num_classes": 3, **options}).train()
    for parameter in model.parameters():  # adaLN-zero would hide what a gradient reaches
        nn.init.normal_(parameter, std=0.1)
    return model


def make_batch():
    generator = torch.Generator().manual_seed(1)
    return {"latents": torch.randn(3, 4, 4, 4, generator=generator), "class_labels": torch.tensor([0, 1, 2])}


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_loss_is_the_mean_square_of_the_velocity(path):
    """Against the derivative of the path by finite differences, in float64."""
    model = make_model()
    objective = FlowMatchingObjective(model, arguments=FlowMatchingArguments(flow_path=path))
    batch, randomness = make_batch(), StepRandomness(0).at(4, 0)
    draw = objective.draw(batch, randomness)
    loss, logs = objective.total(objective(batch, draw))

    latents, noise, sigma = batch["latents"].double(), draw["noise"].double(), draw["sigmas"].double()
    angle = torch.pi / 2

    def place(at):
        alpha, beta = (1 - at, at) if path == "linear" else (torch.cos(angle * at), torch.sin(angle * at))
        return alpha.view(-1, 1, 1, 1) * latents + beta.view(-1, 1, 1, 1) * noise

    velocity = (place(sigma + 1e-5) - place(sigma - 1e-5)) / 2e-5
    labels = batch["class_labels"].masked_fill(draw["drop_labels"], 3)
    prediction = model.eval()(place(sigma).float(), 1000 * draw["sigmas"], labels).sample
    torch.testing.assert_close(loss.double(), (prediction.double() - velocity).square().mean(), rtol=1e-4, atol=1e-6)
    assert set(logs) == {"loss"} and objective.scheduler().config.path == path


def test_noise_belongs_to_the_sample_and_not_to_the_rank():
    objective = FlowMatchingObjective(make_model(class_dropout_prob=0.5))
    whole = {name: torch.cat([value, value]) for name, value in make_batch().items()}
    one = objective.draw(whole, StepRandomness(0).at(2, 0))
    halves = [objective.draw(make_batch(), StepRandomness(0, rank, 2).at(2, 0)) for rank in range(2)]
    for name in ("noise", "sigmas", "drop_labels"):
        assert torch.equal(one[name], torch.cat([half[name] for half in halves]))
    assert len(set(one["sigmas"].tolist())) == 6


def test_a_regularizer_sees_the_state_and_moves_only_what_lies_before_it():
    model, projector = make_model(), Projector()
    objective = FlowMatchingObjective(model, {"projector": projector})
    batch = make_batch()
    draw = objective.draw(batch, StepRandomness(0))
    output = objective(batch, draw)
    state = projector.seen
    assert torch.equal(state.clean, batch["latents"]) and torch.equal(state.noise, draw["noise"])
    assert set(state.hidden_states) == {2} and state.hidden_states[2].shape == (3, 4, 16)
    output["terms"]["projector"].backward(retain_graph=True)
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {f"transformer_blocks.{n}.attn.to_qkv.weight" for n in (0, 1)} <= moved
    assert not any(name.startswith(("transformer_blocks.2", "transformer_blocks.3", "proj_out")) for name in moved)
    loss, logs = objective.total(output)
    expected = output["terms"]["flow"] + 0.5 * output["terms"]["projector"]
    torch.testing.assert_close(loss, expected)
    assert set(logs) == {"loss", "loss/flow", "loss/projector"}


def test_a_regularizer_that_is_off_costs_nothing_and_stalls_no_rank():
    projector = Projector(stop_at=0)
    objective = FlowMatchingObjective(make_model(), {"projector": projector})
    batch = make_batch()
    output = objective(batch, objective.draw(batch, StepRandomness(0)))
    assert set(output["terms"]) == {"flow"} and projector.seen is None
    objective.total(output)[0].backward()
    assert not projector.head.weight.grad.any()
    assert all(parameter.grad is not None for parameter in objective.parameters())


def test_a_learned_variance_is_left_alone():
    model = make_model(learn_sigma=True)
    objective = FlowMatchingObjective(model)
    batch = make_batch()
    objective.total(objective(batch, objective.draw(batch, StepRandomness(0))))[0].backward()
    rows = model.proj_out.weight.grad.view(2, 2, 8, 16)
    assert rows[:, :, :4].any() and not rows[:, :, 4:].any()


def test_the_gradient_is_that_of_the_bare_model():
    """The wrapped forward adds nothing: same loss, same gradients as three lines by hand."""
    model, batch = make_model(), make_batch()
    objective = FlowMatchingObjective(model)
    draw = objective.draw(batch, StepRandomness(0))
    objective.total(objective(batch, draw))[0].backward()
    wrapped = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    sigma = draw["sigmas"].view(-1, 1, 1, 1)
    noisy = (1 - sigma) * batch["latents"] + sigma * draw["noise"]
    prediction = model(noisy, 1000 * draw["sigmas"], batch["class_labels"], drop_labels=draw["drop_labels"]).sample
    (prediction - (draw["noise"] - batch["latents"])).square().mean().backward()
    for ours, bare in zip(wrapped, (parameter.grad for parameter in model.parameters()), strict=True):
        torch.testing.assert_close(ours, bare)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match=r"sigma_std must be positive; got 0\.0"):
        FlowMatchingArguments(sigma_std=0.0)


def test_a_regularizer_without_random_choices_acts_in_every_step():
    class Constant(GeneratorRegularizer):
        def penalty(self, state, batch, draw):
            return state.prediction.square().mean()

    objective = FlowMatchingObjective(make_model(), {"constant": Constant()})
    batch = make_batch()
    assert set(objective(batch, objective.draw(batch, StepRandomness(0)))["terms"]) == {"flow", "constant"}
