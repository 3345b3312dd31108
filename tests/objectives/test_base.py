"""What every objective's forward promises: each trainable parameter has a gradient in every step, and no more."""

from __future__ import annotations

import torch
from torch import nn

from diffusers_eqvae.objectives.base import tie_idle


def test_idle_parameters_get_a_zero_gradient_and_used_ones_their_own():
    torch.manual_seed(0)
    used, idle, frozen = nn.Linear(3, 2), nn.Linear(5, 4), nn.Linear(2, 2).requires_grad_(False)
    module = nn.ModuleList([used, idle, frozen])
    output = used(torch.randn(4, 3)).square().mean()
    alone = torch.autograd.grad(output, used.weight, retain_graph=True)[0]
    (output + tie_idle(module, [output])).backward()
    assert torch.equal(used.weight.grad, alone)
    assert torch.equal(idle.weight.grad, torch.zeros(4, 5)) and torch.equal(idle.bias.grad, torch.zeros(4))
    assert frozen.weight.grad is None


def test_nothing_is_added_where_all_are_used():
    layer = nn.Linear(3, 2)
    output = layer(torch.randn(4, 3)).sum()
    tied = tie_idle(layer, [output])
    assert tied.item() == 0 and tied.grad_fn is None


def test_a_parameter_counts_as_used_through_any_output_and_behind_checkpointing():
    torch.manual_seed(0)
    first, second, third = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
    hidden = torch.utils.checkpoint.checkpoint(first, torch.randn(2, 3), use_reentrant=False)
    tied = tie_idle(nn.ModuleList([first, second, third]), [hidden.sum(), second(hidden).sum()])
    tied.backward()
    assert first.weight.grad is None and second.weight.grad is None and third.weight.grad is not None
