"""The optimizers by name: what each moves, what its state weighs, how it goes on, and what is refused."""

import copy
import importlib.util
import logging
import sys
from typing import get_args

import pytest
import torch
from torch import nn

from diffusers_eqvae.training_utils.arguments import OptimizerArguments
from diffusers_eqvae.training_utils.autoencoder.arguments import AutoencoderOptimizerArguments
from diffusers_eqvae.training_utils.dry_run import weight_bytes
from diffusers_eqvae.training_utils.optimization import OptimizedModule
from diffusers_eqvae.training_utils.optimizers import (
    OPTIMIZERS,
    OptimizerName,
    build_optimizer,
    hidden_matrices,
    state_bytes,
)

from ..invariants.trajectories import assert_equal

NEEDS_BITSANDBYTES = pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="needs bitsandbytes")
NAMES = [pytest.param(name, marks=NEEDS_BITSANDBYTES if name == "adamw_8bit" else ()) for name in OPTIMIZERS]


class Net(nn.Module):
    """A kernel, a table, matrices before, inside and after the blocks, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kernel, self.table, self.before = nn.Conv2d(3, 24, 3), nn.Embedding(5, 24), nn.Linear(24, 24)
        block = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 200), nn.SiLU(), nn.Linear(200, 24))
        self.blocks = nn.ModuleList([block, nn.ModuleList([nn.Linear(24, 24, bias=False)])])
        self.blocks.append(nn.Linear(24, 24).requires_grad_(False))
        self.after = nn.Linear(24, 2)

    def forward(self, pixels, labels):
        hidden = self.before(self.kernel(pixels).mean((2, 3)) + self.table(labels))
        hidden = hidden + self.blocks[1][0](self.blocks[0](hidden))
        return self.after(self.blocks[2](hidden))


def entry(name: str, module: nn.Module | None = None, **options) -> OptimizedModule:
    module = module or Net()
    optimizer = build_optimizer(name, module, lr=1e-2, **options)
    return OptimizedModule("net", module, module, optimizer, 1e-2, None, optimizer_name=name)


def train(trained: OptimizedModule, steps: range) -> OptimizedModule:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        pixels, labels = torch.randn(4, 3, 5, 5, generator=generator), torch.randint(5, (4,), generator=generator)
        trained.module(pixels, labels).square().sum().backward()
        trained.step(1e-2 / (step + 1), torch.zeros(()))
        trained.optimizer.zero_grad()
    return trained


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_and_read_goes_on_bit_for_bit(name, tmp_path):
    whole = train(entry(name, weight_decay=0.1), range(5))
    first = train(entry(name, weight_decay=0.1), range(2))
    first.save(tmp_path)
    resumed = entry(name, weight_decay=0.1)
    resumed.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    train(resumed, range(2, 5))
    for before, after in zip(whole.module.parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(before, after)
    moved = [not torch.equal(a, b) for a, b in zip(whole.module.parameters(), Net().parameters(), strict=True)]
    assert moved == [weight.requires_grad for weight in whole.module.parameters()]


@pytest.mark.parametrize("name", NAMES)
def test_the_table_says_what_the_state_weighs(name):
    trained = train(entry(name), range(1))
    tensors = [
        value
        for state in trained.optimizer.state.values()
        for key, value in state.items()
        if key != "step" and not key.startswith("qmap")  # bitsandbytes has one map of levels for all tensors
    ]
    measured = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert measured == state_bytes(name, trained.module) == weight_bytes(trained)["optimizer"]


def test_the_bytes_per_weight_of_large_matrices():
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(1024, 1024, bias=False)])

    with torch.device("meta"):
        module = Blocks()
    per_weight = {name: state_bytes(name, module) / 1024**2 for name in OPTIMIZERS}
    expected = {"adamw": 8, "adam": 8, "adamw_8bit": 2 + 8 / 256, "adafactor": 8 / 1024, "muon": 4}
    assert per_weight == pytest.approx(expected, rel=1e-12)


def test_muon_takes_the_matrices_inside_blocks_and_adamw_all_else():
    module = Net()
    matrices = hidden_matrices(module)
    expected = [module.blocks[0][1].weight, module.blocks[0][3].weight, module.blocks[1][0].weight]
    assert [id(each) for each in matrices] == [id(each) for each in expected]
    optimizer = build_optimizer("muon", module, lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.25)
    muon, adamw = optimizer.param_groups
    assert [id(each) for each in muon["params"]] == [id(each) for each in expected]
    assert (adamw["betas"], adamw["eps"]) == ((0.8, 0.9), 1e-6)
    assert muon["weight_decay"] == adamw["weight_decay"] == 0.25
    both = {id(each) for group in optimizer.param_groups for each in group["params"]}
    assert both == {id(each) for each in module.parameters() if each.requires_grad}


def test_muons_first_step_is_orthogonal_and_as_large_as_adamws():
    """W -= lr 0.2 sqrt(max(n, m)) NS(g), five times X <- 3.4445 X - 4.775 X X'X + 2.0315 X (X'X)^2, in float64."""
    module = nn.Module()
    module.blocks = nn.ModuleList([nn.Linear(16, 8, bias=False)])
    weight = module.blocks[0].weight
    before = weight.detach().double().clone()
    gradient = torch.randn(8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight.grad = gradient.float()
    build_optimizer("muon", module, lr=1e-2).step()
    x = gradient / gradient.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    expected = 1e-2 * 0.2 * 16**0.5 * x
    step = before - weight.detach().double()
    assert (step - expected).norm() < 0.15 * expected.norm()  # torch iterates in bfloat16
    assert torch.linalg.svdvals(step / (1e-2 * 0.2 * 16**0.5)).sub(1).abs().max() < 0.4


def test_adafactors_step_is_relative_to_the_weights():
    """Its first step: g / sqrt(rows x columns / mean of rows), clipped to root mean square 1, times lr * RMS(w)."""
    weight = nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)) * 3)
    module = nn.Module()
    module.weight = weight
    optimizer = build_optimizer("adafactor", module, lr=1e-2)
    before, gradient = weight.detach().double().clone(), torch.randn(6, 4, dtype=torch.float64)
    weight.grad = gradient.float()
    optimizer.step()
    squares = gradient.square()
    rows, columns = squares.mean(1, keepdim=True), squares.mean(0, keepdim=True)
    update = gradient / (rows * columns / rows.mean()).sqrt()
    update /= max(1.0, update.square().mean().sqrt().item())
    expected = before - 1e-2 * before.square().mean().sqrt() * update
    assert torch.allclose(weight.detach().double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_nonfinite_step_changes_nothing(name):
    trained = train(entry(name), range(1))
    before = copy.deepcopy(trained.state_dict())
    trained.module(torch.randn(4, 3, 5, 5), torch.arange(4)).mul(torch.nan).sum().backward()
    trained.step(1e-2, torch.ones(()))
    assert trained.optimizer.state
    assert_equal(before, trained.state_dict())


@pytest.mark.parametrize(("one", "other"), [("adamw", "adafactor"), ("adafactor", "adam"), ("muon", "adamw")])
def test_the_state_of_another_optimizer_is_refused_by_name(one, other):
    state = train(entry(one), range(1)).state_dict()
    with pytest.raises(ValueError, match=rf"another optimizer than {other}.*Resume with the --optimizer it was"):
        entry(other).load_state_dict(state)


def test_falls_back_with_a_log_line_where_there_is_no_fused_kernel(monkeypatch, caplog):
    adamw = torch.optim.AdamW

    def without_fused(parameters, *, fused=None, **options):
        if fused:
            raise RuntimeError("no fused kernel")
        return adamw(parameters, **options)

    without_fused.__name__ = "AdamW"
    monkeypatch.setattr(torch.optim, "AdamW", without_fused)
    with caplog.at_level(logging.WARNING):
        optimizer = build_optimizer("adamw", nn.Linear(2, 2), lr=0.1)
    assert isinstance(optimizer, adamw) and "no fused kernel" in caplog.text


def test_what_cannot_be_built_is_refused_with_the_remedy(monkeypatch):
    with pytest.raises(ValueError, match="one of adamw, adam, adamw_8bit, adafactor, muon; got 'sgd'"):
        build_optimizer("sgd", nn.Linear(2, 2), lr=0.1)
    with pytest.raises(ValueError, match=r"no such weight of this Linear is trained; use --optimizer adamw"):
        build_optimizer("muon", nn.Linear(2, 2), lr=0.1)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match=r"needs the package bitsandbytes: pip install bitsandbytes"):
        OptimizerArguments(optimizer="adamw_8bit")
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match=r"needs torch 2\.9 or newer"):
        OptimizerArguments(optimizer="muon")


def test_the_table_is_what_the_option_takes():
    assert tuple(OPTIMIZERS) == get_args(OptimizerName)


def test_an_option_that_an_optimizer_has_not_is_named(caplog):
    AutoencoderOptimizerArguments(optimizer="adafactor")
    assert not caplog.messages
    AutoencoderOptimizerArguments(optimizer="adafactor", adam_beta1=0.9)
    assert "Without effect, since adafactor has none of them: --adam_beta1." in caplog.text
    with pytest.raises(ValueError, match="which adam's is not; give --optimizer adamw"):
        OptimizerArguments(optimizer="adam", adam_weight_decay=0.1)
