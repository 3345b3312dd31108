"""Trajectories of the discrete line: a MaskGIT on tokens, and the VQ model that makes them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_eqvae.models.autoencoder_vq_eq import VQModelEQ

from .tiny_latents import write_store
from .trajectories import ROOT, as_flags, assert_close, assert_equal, last_checkpoint, run_script, torchrun

RUN = {"report_to": "none", "validation_steps": 0, "ema_decay": 0.9, "learning_rate": 1e-3, "logging_steps": 1}
RUN |= {"max_train_steps": 6, "checkpointing_steps": 3}
MASKGIT = {"_class_name": "MaskGITTransformer2DModel", "num_layers": 2, "num_attention_heads": 2}
MASKGIT |= {"attention_head_dim": 8}


@pytest.fixture
def maskgit(tmp_path, tiny_vq_model):
    """The script, and its flags for a tiny MaskGIT on a store of tokens."""
    (tmp_path / "maskgit.json").write_text(json.dumps(MASKGIT))
    store = write_store(tmp_path / "store", tiny_vq_model)
    options = {"model": tmp_path / "maskgit.json", "latents_dir": store, "num_inference_steps": 4, **RUN}
    return ROOT / "training" / "train_transformer.py", options


@pytest.fixture
def vq(tmp_path, tiny_vq_model):
    """The script, and its flags for a tiny VQ model with EQ-VAE's transforms."""
    VQModelEQ.from_config(tiny_vq_model.config).save_pretrained(tmp_path / "vq")
    (tmp_path / "images").mkdir()
    for number in range(8):
        levels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(levels).resize((40, 40), Image.Resampling.BICUBIC).save(tmp_path / f"images/{number}.png")
    options = {"pretrained_model_name_or_path": tmp_path / "vq", "train_data_dir": tmp_path / "images", **RUN}
    options |= {"resolution": 32, "perceptual_weight": 0, "disc_weight": 0, "reduction": "mean", "p_equivariance": 0.7}
    options |= {"num_validation_images": 1, "num_normalization_images": 1, "cache_dir": tmp_path / "cache"}
    return ROOT / "training" / "train_autoencoder.py", options


def train(line, output, **options) -> dict:
    script, flags = line
    run_script(script, as_flags({**flags, "output_dir": output, **options}))
    return last_checkpoint(output, "objective")


@pytest.mark.parametrize("name", ["maskgit", "vq"])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, name, request):
    """With dropout: it is drawn from the generator that every micro-batch seeds."""
    line = request.getfixturevalue(name)
    options = {"train_batch_size": 4, "gradient_accumulation_steps": 2}
    whole = train(line, tmp_path / "whole", **options)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-00000006")
    assert_equal(whole, train(line, tmp_path / "resumed", resume_from_checkpoint="latest", **options))
    moved = [name for name, weight in whole["module"].items() if not torch.equal(weight, whole["ema"][name])]
    assert moved


@pytest.mark.parametrize("name", ["maskgit", pytest.param("vq", marks=pytest.mark.slow)])
def test_two_ranks_are_one_with_twice_the_batch(tmp_path, name, request):
    script, flags = request.getfixturevalue(name)
    if name == "maskgit":
        flags["config_overrides"] = "dropout=0.0"
    one = train((script, flags), tmp_path / "one", train_batch_size=4)
    words = as_flags({**flags, "output_dir": tmp_path / "two", "train_batch_size": 2})
    done = torchrun(script, words, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_close(one, last_checkpoint(tmp_path / "two", "objective"), 1e-4)
    logs = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("one", "two")
    ]
    names = {"maskgit": ("loss",), "vq": ("loss/codebook", "codebook/usage", "codebook/perplexity", "codebook/dead")}
    for key in names[name]:
        first, second = ([record[key] for record in records if key in record] for records in logs)
        assert len(first) == 6 and first == pytest.approx(second, rel=1e-4)
