"""Learning rate, EMA and master weights of one optimized module."""

import copy
import math

import pytest
import torch
from torch import nn

from diffusers_eqvae.training_utils.nonfinite import NonfiniteGuard
from diffusers_eqvae.training_utils.optimization import (
    ExponentialAverage,
    OptimizedModule,
    check_master_weights,
    learning_rate_factor,
    lerp_without_waiting,
)
from diffusers_eqvae.training_utils.optimizers import build_optimizer


def optimized(module, *, decay=0.9, fused=True):
    optimizer = build_optimizer("adamw", module, lr=0.1)
    if not fused:
        optimizer = torch.optim.AdamW(check_master_weights("module", module), lr=0.1)
    return OptimizedModule("module", module, module, optimizer, 0.1, ExponentialAverage(module, decay))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("constant_with_warmup", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 - math.cos(math.pi / 4)) / 2]),
    ],
)
def test_schedules(schedule, expected):
    factors = [learning_rate_factor(schedule, step, warmup_steps=2, total_steps=6) for step in range(6)]
    assert factors == pytest.approx(expected)


def test_ema_is_the_exact_recursion_from_the_initial_weights():
    entry = optimized(nn.Linear(3, 2), decay=0.9)
    expected = entry.module.weight.detach().double().clone()
    for value in (1.0, -2.0, 0.5, 4.0):
        nn.init.constant_(entry.module.weight, value)
        entry.update_ema(torch.zeros(()))
        expected = 0.9 * expected + 0.1 * value
    assert torch.allclose(entry.ema.module.weight.double(), expected, rtol=0, atol=1e-6)
    assert entry.ema.module.weight.dtype == torch.float32


def test_the_form_for_devices_gives_the_same_average():
    entry = optimized(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), decay=0.9)
    averages = [weight.clone() for weight in entry.ema.module.parameters()]
    nn.init.constant_(entry.module[0].weight, 2.0)
    for nonfinite in (torch.zeros(()), torch.ones(())):
        entry.update_ema(nonfinite)
        lerp_without_waiting(averages, list(entry.module.parameters()), 0.1 * (1 - nonfinite))
        for average, weight in zip(averages, entry.ema.module.parameters(), strict=True):
            assert torch.allclose(average, weight, rtol=0, atol=1e-7)


def test_ema_copies_buffers_and_shares_frozen_weights():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2).requires_grad_(False))
    entry = optimized(module)
    module(torch.randn(8, 2))
    entry.update_ema(torch.zeros(()))
    averaged = entry.ema.module
    assert torch.equal(averaged[1].running_mean, module[1].running_mean)
    assert averaged[2].weight is module[2].weight and averaged[0].weight is not module[0].weight
    assert not any(parameter.requires_grad for parameter in averaged.parameters())
    assert "2.weight" not in entry.state_dict()["module"] and "2.weight" not in entry.state_dict()["ema"]


def test_a_nonfinite_step_leaves_the_average_and_its_buffers():
    entry = optimized(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    before = copy.deepcopy(entry.ema.module.state_dict())
    nn.init.constant_(entry.module[0].weight, 3.0)
    entry.module(torch.full((8, 2), float("nan")))
    entry.update_ema(torch.ones(()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in entry.ema.module.state_dict().items())


def test_state_survives_a_moment_of_freezing_and_refuses_another_module():
    entry = optimized(nn.Linear(3, 2))
    entry.module.requires_grad_(False)
    state = copy.deepcopy(entry.state_dict())
    assert set(state["module"]) == {"weight", "bias"}
    other = optimized(nn.Linear(3, 2))
    other.load_state_dict(state)
    assert torch.equal(other.module.weight, entry.module.weight)
    with pytest.raises(ValueError, match="resolved_arguments"):
        optimized(nn.Sequential(nn.Linear(3, 2))).load_state_dict(state)


def test_options_of_the_optimizer_are_the_runs_and_moments_the_checkpoints():
    entry, other = optimized(nn.Linear(3, 2)), optimized(nn.Linear(3, 2))
    entry.module(torch.ones(1, 3)).sum().backward()
    entry.step(0.1, torch.zeros(()))
    other.optimizer.param_groups[0].update(betas=(0.5, 0.9), weight_decay=0.25)
    other.load_state_dict(copy.deepcopy(entry.state_dict()))
    group = other.optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"]) == ((0.5, 0.9), 0.25)
    moments = [optimizer.state_dict()["state"][0] for optimizer in (entry.optimizer, other.optimizer)]
    assert all(torch.equal(moments[0][key], moments[1][key]) for key in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("fused", [True, False])
def test_a_nonfinite_step_changes_nothing(fused):
    entry = optimized(nn.Linear(3, 2), fused=fused)
    entry.module(torch.randn(4, 3)).sum().backward()
    entry.step(0.1, torch.zeros(()))
    before = copy.deepcopy((entry.module.state_dict(), entry.optimizer.state_dict()["state"]))
    entry.module.weight.grad.fill_(float("nan"))
    entry.step(0.1, torch.ones(()))
    after = entry.module.state_dict(), entry.optimizer.state_dict()["state"]
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    states = [(old[key], after[1][index][key]) for index, old in before[1].items() for key in old]
    assert states and all(torch.equal(old, new) for old, new in states)


def test_guard_counts_in_a_row_and_in_all():
    guard = NonfiniteGuard(torch.device("cpu"))
    for bad in (1.0, 1.0, 0.0, 1.0):
        guard.count(torch.tensor(bad))
    assert guard.read() == (1, 3)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Linear(2, 2).to(torch.bfloat16), "must be float32"),
        (nn.Linear(2, 2).requires_grad_(False), "no trainable parameter"),
    ],
)
def test_what_cannot_be_trained_is_refused(module, message):
    with pytest.raises(ValueError, match=message):
        check_master_weights("module", module)
