"""Denoising as an objective: DiT's two terms, whom they move, and what samples the result."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_eqvae.models.transformer_sit import SiTTransformer2DModel
from diffusers_eqvae.objectives.denoising import DenoisingObjective
from diffusers_eqvae.objectives.flow_matching import FlowMatchingArguments, FlowMatchingObjective
from diffusers_eqvae.randomness import StepRandomness

from ..golden import ddpm_reference as reference
from .test_flow_matching import make_batch, make_model

DIT = {"objective": "denoising", "prediction_type": "epsilon", "learn_sigma": True}


def step(objective, batch):
    draw = objective.draw(batch, StepRandomness(0).at(4, 0))
    return draw, *objective.total(objective(batch, draw))


def test_the_loss_is_dits():
    """Noise and bound of the network's output at integer timesteps, against an independent transcription."""
    objective, batch, seen = DenoisingObjective(make_model(**DIT)), make_batch(), {}

    def look(module, args, kwargs, output):
        seen.update(kwargs, noisy=args[0], output=output.sample)

    objective.model.register_forward_hook(look, with_kwargs=True)
    draw, loss, logs = step(objective, batch)
    steps = seen["timestep"].long().tolist()
    assert seen["timestep"].tolist() == steps and all(0 <= each <= 999 for each in steps)
    assert draw["sigmas"].tolist() == pytest.approx([each / 1000 for each in steps])
    arrays = [each.detach().double().numpy() for each in (batch["latents"], draw["noise"], seen["output"])]
    expected = reference.training_terms(reference.dit_schedule(), arrays[0], arrays[1], steps, arrays[2])
    assert logs["loss/noise"].item() == pytest.approx(expected.mse.mean(), rel=1e-5)
    assert logs["loss/bound"].item() == pytest.approx(expected.vb.mean(), rel=1e-3)
    assert loss.item() == pytest.approx(expected.total.mean(), rel=1e-4)
    noisy = reference.add_noise(reference.dit_schedule(), arrays[0], arrays[1], steps)
    assert np.allclose(seen["noisy"].numpy(), noisy, atol=1e-5)


def test_the_bound_moves_the_variance_alone():
    objective, batch = DenoisingObjective(make_model(**DIT)), make_batch()
    draw = objective.draw(batch, StepRandomness(0).at(4, 0))
    terms = objective(batch, draw)["terms"]
    rows = objective.model.proj_out.weight
    gradients = {name: torch.autograd.grad(term, rows, retain_graph=True)[0] for name, term in terms.items()}
    by_channel = {name: grad.view(4, 8, -1).abs().sum((0, 2)) > 0 for name, grad in gradients.items()}
    assert by_channel["noise"].tolist() == [True] * 4 + [False] * 4
    assert by_channel["bound"].tolist() == [False] * 4 + [True] * 4


def test_timesteps_cover_the_chain_evenly():
    objective = DenoisingObjective(make_model(**DIT))
    steps = objective.timestep(objective.sigmas((torch.arange(4000) + 0.5) / 4000)).long()
    assert torch.equal(steps.bincount(), torch.full((1000,), 4))
    assert objective.timestep(objective.sigmas(torch.tensor([1.0 - 2**-24, 1.0]))).tolist() == [999, 999]


def test_what_samples_it():
    scheduler = DenoisingObjective(make_model(**DIT)).scheduler()
    assert isinstance(scheduler, DDPMScheduler) and scheduler.config.variance_type == "learned_range"
    assert not scheduler.config.clip_sample
    plain = DenoisingObjective(make_model(objective="denoising", prediction_type="epsilon"))
    assert plain.scheduler().config.variance_type == "fixed_small"
    assert set(step(plain, make_batch())[2]) == {"loss"}


@pytest.mark.parametrize("kind", ["epsilon", "score", "sample"])
def test_flow_matching_trains_every_prediction(kind):
    """A network that answers rightly has loss 0, whatever the weights; another has the weighted error."""
    model, batch = make_model(prediction_type=kind), make_batch()
    objective = FlowMatchingObjective(
        model, arguments=FlowMatchingArguments(flow_weighting="velocity", flow_path="vp")
    )
    draw = objective.draw(batch, StepRandomness(0).at(4, 0))
    assert (draw["sigmas"] >= 1e-5).all()
    _, target = objective.corrupt(batch["latents"], draw["noise"], draw["sigmas"])
    state = type("State", (), {"prediction": target + 0.1, "target": target, "sigmas": draw["sigmas"]})
    expected = 0.01 * objective._weight(draw["sigmas"]).mean()
    assert objective.losses(state, None)["flow"].item() == pytest.approx(expected.item(), rel=1e-4)
    state.prediction = target
    assert objective.losses(state, None)["flow"].item() == 0.0
    assert objective.scheduler().config.prediction_type == kind


def test_big_latents_are_shifted_by_default_and_small_ones_are_not(caplog):
    sizes = {"sample_size": 32, "patch_size": 8, "num_layers": 1}
    with caplog.at_level("INFO"):
        shifted = FlowMatchingObjective(make_model(in_channels=16, **sizes))
    assert "sqrt(16 * 32 * 32 / 4096) = 2" in caplog.text
    assert shifted.scheduler().config.shift == shifted.arguments.flow_shift == 2.0
    uniform = torch.tensor([0.5])
    assert shifted.sigmas(uniform).item() == pytest.approx(2 / 3)
    given = FlowMatchingObjective(make_model(in_channels=16, **sizes), arguments=FlowMatchingArguments(flow_shift=1.0))
    assert given.sigmas(uniform).item() == 0.5
    assert FlowMatchingObjective(make_model()).arguments.flow_shift == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DenoisingObjective(make_model()), "trains models that predict epsilon; this one predicts flow_pred"),
        (lambda: FlowMatchingObjective(make_model(prediction_type="logits")), "predict flow_prediction or epsilon or"),
        (
            lambda: FlowMatchingObjective(make_model(), arguments=FlowMatchingArguments(flow_weighting="velocity")),
            "There is no velocity weighting of a flow_prediction prediction; use none",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_presets_are_dits():
    """Trainable parameters with a learned variance, in millions, as the paper gives them."""
    with torch.device("meta"):
        for name, millions in {"DiT-S/2": 32.87, "DiT-B/2": 130.32, "DiT-L/2": 457.84, "DiT-XL/2": 674.83}.items():
            model = SiTTransformer2DModel.from_preset(name)
            counted = sum(weight.numel() for weight in model.parameters()) / 1e6
            assert counted == pytest.approx(millions, abs=0.2), name
            assert (model.config.objective, model.out_channels) == ("denoising", 8)
