"""--dry_run: what is counted, and that it says what a run then needs."""

from __future__ import annotations

import json
import re
from itertools import accumulate

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.profiler import ProfilerActivity, profile

from diffusers_eqvae.training_utils.dry_run import LiveTensors, first_examples, per_batch, smallest_card

from ..invariants.test_autoencoder_trajectories import MODEL, material
from ..invariants.test_autoencoder_trajectories import SCRIPT as AUTOENCODER
from ..invariants.test_autoencoder_trajectories import flags as autoencoder_flags
from ..invariants.tiny_latents import write_store
from ..invariants.trajectories import ROOT, as_flags, run_script

__all__ = ["material"]
TRANSFORMER = ROOT / "training" / "train_transformer.py"
KIBI = 1024


def test_each_storage_counts_while_it_lives_and_models_do_not():
    model = nn.Linear(16, 16, bias=False)
    x = torch.ones(16, 16)  # 1 KiB each
    with LiveTensors([model]) as tensors:
        a = x * 2
        b = a.view(256).add_(1)  # the same storage
        c = a + x
        del a, b
        d = c + x
        e = model.weight.t()
    assert tensors.peak(without=[]) == 2 * KIBI and e.shape == d.shape
    assert tensors.peak(without=[c]) == KIBI


def test_gradients_can_be_left_out():
    """y = W2 W1 x: outputs of the two layers live at once, and a third with the loss's gradient in their place."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    x = torch.ones(2, 64)
    with LiveTensors([model]) as tensors:
        model(x).sum().backward()
    gradients = [weight.grad for weight in model.parameters()]
    weight, output = 64 * 64 * 4, 2 * 64 * 4
    assert 2 * weight <= tensors.peak(without=[]) <= 2 * weight + 6 * output
    assert 2 * output <= tensors.peak(without=gradients) <= 6 * output


def test_a_step_of_more_examples_is_on_the_line_through_two():
    assert per_batch({2: 30, 4: 50}, 16) == 170 and per_batch({2: 30, 4: 50}, 4) == 50 and per_batch({1: 7}, 1) == 7


def test_first_examples_of_nested_batches():
    batch = {"a": torch.arange(4), "b": [torch.arange(4), ("name", torch.arange(4))]}
    cut = first_examples(batch, 2)
    assert cut["a"].tolist() == cut["b"][0].tolist() == cut["b"][1][1].tolist() == [0, 1] and cut["b"][1][0] == "name"


def estimated_and_needed(script, flags, capsys) -> tuple[float, float]:
    """What --dry_run says, and the largest sum of live tensors that torch.profiler sees in four steps, in MiB."""
    with pytest.raises(SystemExit):
        run_script(script, [*flags, "--dry_run"])
    printed = capsys.readouterr().out
    said = float(re.search(r"in all\s+([\d.]+) MiB", printed)[1])
    assert "it needs a card of 8 GB (estimated, not measured on one)." in printed
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run_script(script, flags)
    events = profiled.profiler.kineto_results.events()
    return said, max(accumulate(each.nbytes() for each in events if each.name() == "[memory]")) / 2**20


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": "true", "regularizers": "contrastive_flow"},
        pytest.param({"gradient_accumulation_steps": 2, "optimizer": "adafactor"}, marks=pytest.mark.slow),
        pytest.param({"optimizer": "muon", "train_batch_size": 1}, marks=pytest.mark.slow),
        pytest.param({"mixed_precision": "bf16"}, marks=pytest.mark.slow),
    ],
)
def test_it_says_what_a_generator_needs(tmp_path, tiny_autoencoder_kl, options, capsys):
    model = {"_class_name": "SiTTransformer2DModel", "patch_size": 2, "num_layers": 4}
    model |= {"num_attention_heads": 4, "attention_head_dim": 48}
    (tmp_path / "model.json").write_text(json.dumps(model))
    store = write_store(tmp_path / "store", tiny_autoencoder_kl, side=16)
    words = {"latents_dir": store, "model": tmp_path / "model.json", "output_dir": tmp_path / "run"}
    words |= {"train_batch_size": 16, "max_train_steps": 4, "validation_steps": 0, "checkpointing_steps": 0}
    said, needed = estimated_and_needed(TRANSFORMER, as_flags({**words, "report_to": "none", **options}), capsys)
    assert said == pytest.approx(needed, rel=0.15)


# What makes an autoencoder's training fit on a card: what learns, what judges, and what is recomputed or kept small.
SMALL = {
    "all of it": {},
    "recomputed": {"gradient_checkpointing": "true"},
    "a larger batch": {"train_batch_size": 8},
    "no discriminator": {"disc_weight": 0},
    "no judge at all": {"disc_weight": 0, "perceptual_weight": 0},
    "decoder": {"trainable": ["decoder"], "regularizers": "none"},
    "adapters": {"trainable": ["lora"]},
    "adapters, recomputed": {"trainable": ["lora"], "gradient_checkpointing": "true", "disc_weight": 0},
    "accumulated, no average": {"gradient_accumulation_steps": 4, "train_batch_size": 1, "use_ema": "false"},
    "small state": {"optimizer": "adafactor", "gradient_checkpointing": "true"},
    "bf16": {"mixed_precision": "bf16"},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", SMALL.values(), ids=SMALL)
def test_it_says_what_an_autoencoder_needs(tmp_path, material, options, capsys):
    if "trainable" in options:
        torch.manual_seed(0)
        AutoencoderKL(**MODEL).save_pretrained(tmp_path / "base")
        options = options | {"pretrained_model_name_or_path": tmp_path / "base"}
    flags = autoencoder_flags(
        material, tmp_path / "run", **{"checkpointing_steps": 0, "train_batch_size": 4, **options}
    )
    said, needed = estimated_and_needed(AUTOENCODER, flags, capsys)
    print(f"estimated {said / needed:.2f} of what was needed")
    assert said == pytest.approx(needed, rel=0.15)


@pytest.mark.parametrize(
    ("gib", "said"),
    [
        (6.5, "a card of 8 GB"),
        (6.6, "a card of 12 GB"),  # 6.6 * 1.15 + .5 = 8.09
        (69, "a card of 80 GB"),
        (70, "a card of 141 GB"),
        (123, "none of 141 GB; lower --train_batch_size"),
    ],
)
def test_the_card_holds_the_estimate_15_per_cent_and_the_framework(gib, said):
    assert smallest_card(gib * 2**30) == said
