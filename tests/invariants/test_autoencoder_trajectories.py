"""Trajectories of train_autoencoder.py: what must not depend on interruptions, processes or accumulation."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusers_eqvae.losses.perceptual import LPIPS

from .trajectories import ROOT, as_flags, assert_close, assert_equal, last_checkpoint, run_script, torchrun

SCRIPT = ROOT / "training" / "train_autoencoder.py"
MODEL = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
}


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    """A folder with images, a tiny model's config and seeded LPIPS weights."""
    root = tmp_path_factory.mktemp("autoencoder")
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    for number in range(12):
        smooth = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(smooth).resize((80, 80), Image.Resampling.BICUBIC).save(root / f"images/{number:02d}.png")
    (root / "model.json").write_text(json.dumps(MODEL))
    lpips = LPIPS.random("squeeze", seed=0)
    save_file({f"features.{k}": v for k, v in lpips.features.state_dict().items()}, root / "backbone.safetensors")
    heads = {f"lin{i}.model.1.weight": head.view(1, -1, 1, 1).clone() for i, head in enumerate(lpips.heads)}
    save_file(heads, root / "heads.safetensors")
    return root


def flags(material, output_dir, **options) -> list[str]:
    defaults = {
        "model_config": material / "model.json",
        "train_data_dir": material / "images",
        "output_dir": output_dir,
        "resolution": 72,
        "reduction": "mean",  # a sum at this size would drive the adaptive weight to its limit
        "lpips_net": "squeeze",
        "lpips_backbone_weights": material / "backbone.safetensors",
        "lpips_linear_weights": material / "heads.safetensors",
        "disc_norm": "group",
        "disc_num_layers": 2,
        "disc_channels": 8,
        "train_batch_size": 2,
        "learning_rate": 1e-3,
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "ema_decay": 0.9,
        "report_to": "none",
        "logging_steps": 1,
        "validation_steps": 0,
        "num_validation_images": 2,
        "num_normalization_images": 4,
        "cache_dir": material / "cache",
    }
    if "pretrained_model_name_or_path" in options:
        defaults.pop("model_config")
    return as_flags({**defaults, **options})


def train(material, output_dir, **options) -> dict[str, dict]:
    run_script(SCRIPT, flags(material, output_dir, **options))
    return {name: last_checkpoint(output_dir, name) for name in ("objective", "discriminator")}


def adversarial_weights(output_dir) -> list[float]:
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [record["adversarial_weight"] for record in map(json.loads, lines) if "adversarial_weight" in record]


# Every regularization of the discriminator; LeCam has a state.
GAME = {"disc_lecam_weight": 0.1, "disc_lecam_decay": 0.5, "disc_r1_weight": 0.1, "disc_norm": "group"}
GAME |= {"disc_augment": ["color", "translation", "cutout"]}


@pytest.mark.slow
def test_a_regularized_discriminator_resumes_exactly_and_on_two_ranks(tmp_path, material):
    whole = train(material, tmp_path / "one", train_batch_size=4, **GAME)
    assert whole["objective"]["module"]["scores.count"] == 1 and whole["objective"]["module"]["scores.step"] == 3
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "one", resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-00000004")
    assert_equal(whole, train(material, resumed, train_batch_size=4, resume_from_checkpoint="latest", **GAME))
    finished = torchrun(SCRIPT, flags(material, tmp_path / "two", **GAME), processes=2)
    assert finished.returncode == 0, finished.stderr[-2000:]
    for name, state in whole.items():
        assert_close(state, last_checkpoint(tmp_path / "two", name))


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, material):
    whole = train(material, tmp_path / "whole")
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole", resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-00000004")
    assert_equal(whole, train(material, resumed, resume_from_checkpoint="latest"))


def test_two_ranks_are_one_with_twice_the_batch(tmp_path, material):
    one = train(material, tmp_path / "one", train_batch_size=4)
    finished = torchrun(SCRIPT, flags(material, tmp_path / "two"), processes=2)
    assert finished.returncode == 0, finished.stderr[-2000:]
    weights = adversarial_weights(tmp_path / "one"), adversarial_weights(tmp_path / "two")
    assert len(weights[0]) == 4
    assert weights[0][0] == pytest.approx(weights[1][0], rel=1e-5)
    assert weights[0] == pytest.approx(weights[1], rel=0.05)
    for name, state in one.items():
        assert_close(state, last_checkpoint(tmp_path / "two", name))


@pytest.mark.slow
@pytest.mark.parametrize("trainable", [["decoder.up_blocks.1", "encoder.conv_in"], ["lora"]])
def test_two_ranks_train_a_part_as_one_does(tmp_path, material, trainable):
    torch.manual_seed(0)
    AutoencoderKL(**MODEL).save_pretrained(tmp_path / "base")
    options = {"trainable": trainable, "adaptive_disc_weight": False}
    options["pretrained_model_name_or_path"] = tmp_path / "base"
    one = train(material, tmp_path / "one", train_batch_size=4, **options)
    finished = torchrun(SCRIPT, flags(material, tmp_path / "two", **options), processes=2)
    assert finished.returncode == 0, finished.stderr[-2000:]
    for name, state in one.items():
        assert_close(state, last_checkpoint(tmp_path / "two", name))


def test_accumulation_is_a_larger_batch(tmp_path, material):
    """The adaptive weight is a function of what it is measured on, one micro-batch, so it is fixed here."""
    options = {"adaptive_disc_weight": False}
    whole = train(material, tmp_path / "whole", train_batch_size=4, **options)
    halves = train(material, tmp_path / "halves", gradient_accumulation_steps=2, **options)
    for name in whole:
        assert_close(whole[name], halves[name])


def test_validation_does_not_disturb_the_run(tmp_path, material):
    assert_equal(
        train(material, tmp_path / "with", validation_steps=1),
        train(material, tmp_path / "without", validation_steps=0),
    )


def test_finished_directory_is_stock_and_averaged(tmp_path, material):
    state = train(material, tmp_path / "run")["objective"]["ema"]
    directory = tmp_path / "run"
    vae = AutoencoderKL.from_config(json.loads((directory / "config.json").read_text()))
    vae.load_state_dict(load_file(directory / "diffusion_pytorch_model.safetensors"))
    for name, value in vae.state_dict().items():
        assert torch.equal(value, state[f"model.{name}"])
    mean_std = json.loads((directory / "mean_std.json").read_text())
    assert mean_std["num_samples"] == 4
    assert vae.config.latents_std == mean_std["latents_std"]
    assert (directory / "discriminator" / "config.json").is_file()
    assert (directory / "run_metadata.json").is_file()
