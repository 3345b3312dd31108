"""train_autoencoder.py --aspect_buckets: what a run on rectangles is made of, and what it refuses."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from diffusers_eqvae.autoencoders import decode, encode
from diffusers_eqvae.objectives.autoencoder import AutoencoderObjective

from ..faults.test_autoencoder_classes import tiny
from ..invariants.trajectories import run_script
from .test_train_autoencoder import SCRIPT, flags

WIDE, HIGH = (32, 128), (76, 52)  # (height, width) at 64 px and stride 4


@pytest.fixture
def folder(tmp_path):
    """Six images four times as wide as high, and six of 2:3."""
    (tmp_path / "images").mkdir()
    for number in range(12):
        noise = Image.effect_noise((80, 20) if number % 2 else (40, 60), 60)
        noise.convert("RGB").save(tmp_path / f"images/{number:02d}.png")
    return tmp_path


@pytest.fixture
def shapes(monkeypatch):
    """(height, width) of every micro-batch that a run draws for."""
    seen, draw = [], AutoencoderObjective.draw

    def noted(self, batch, randomness):
        seen.append(tuple(batch["pixel_values"].shape[2:]))
        return draw(self, batch, randomness)

    monkeypatch.setattr(AutoencoderObjective, "draw", noted)
    return seen


def test_a_run_on_rectangles_ends_with_an_autoencoder_of_any_shape(folder, tiny_autoencoder_kl, shapes, caplog):
    caplog.set_level(logging.INFO)
    options = {
        "resolution": 64,
        "aspect_buckets": 5,
        "gradient_accumulation_steps": 2,
        "max_train_steps": 9,
        "num_validation_images": 4,
    }
    options |= {
        "disc_weight": 0.5,
        "disc_num_layers": 1,
        "disc_channels": 4,
        "disc_norm": "group",
        "normalization": "channel",
    }
    words = flags(folder, tiny_autoencoder_kl, **options, tau_per_image="", tau_flip="")
    run_script(SCRIPT, [word for word in words if word])
    assert shapes[::2] == shapes[1::2] and len(shapes) == 18
    assert {shape: shapes.count(shape) for shape in (WIDE, HIGH)} in ({WIDE: 8, HIGH: 10}, {WIDE: 10, HIGH: 8})
    said = "32x128: 6, 76x52: 6 images (height x width); cropped to these they lose 1.3% on average, 2.6% at most"
    assert f"Shapes of at least a global batch of 4 images: {said}." in caplog.messages
    metadata = json.loads((folder / "run/run_metadata.json").read_text())
    assert metadata["data"]["shapes"] == said and metadata["training"]["aspect_buckets"] == 5
    with Image.open(next((folder / "run/validation").glob("*_comparison.png"))) as strip:
        assert strip.size == (5 * 68 - 4, 4 * 68 - 4 + 16)  # squares of 64 px
    trained = AutoencoderKL.from_pretrained(folder / "run")
    assert trained.config.latents_mean is not None  # measured on squares
    with torch.no_grad():
        for height, width in (WIDE, HIGH, (72, 8)):
            decoded = decode(trained, encode(trained, torch.rand(1, 3, height, width)).mode())
            assert decoded.shape == (1, 3, height, width) and decoded.isfinite().all()


def test_shapes_with_fewer_images_than_a_global_batch_go_to_the_next(folder, tiny_autoencoder_kl, shapes):
    run_script(SCRIPT, flags(folder, tiny_autoencoder_kl, aspect_buckets=5, train_batch_size=7, max_train_steps=3))
    assert len(set(shapes)) == 1


def test_a_dry_run_measures_the_shape_of_most_pixels(folder, tiny_autoencoder_kl, shapes):
    with pytest.raises(SystemExit):
        run_script(SCRIPT, [*flags(folder, tiny_autoencoder_kl, aspect_buckets=5, resolution=64), "--dry_run"])
    assert len(shapes) >= 4 and set(shapes) == {WIDE}


@pytest.mark.parametrize("flag", ["latents_dir", "features_dir"])
def test_stores_are_of_squares(folder, tiny_autoencoder_kl, flag):
    said = f"--aspect_buckets trains on rectangles, and the store of --{flag} .* of squares; leave one of them out"
    with pytest.raises(ValueError, match=said):
        run_script(SCRIPT, flags(folder, tiny_autoencoder_kl, aspect_buckets=5, **{flag: folder / "store"}))


def test_an_autoencoder_of_one_size_takes_no_rectangles(folder):
    options = {"aspect_buckets": 2, "resolution": 16, "tau_scale": "none", "trainable": "decoder"}
    with pytest.raises(
        ValueError, match=r"--aspect_buckets gives images of .* AutoencoderRAE takes one; leave it out"
    ):
        run_script(SCRIPT, flags(folder, tiny("AutoencoderRAE"), **options))


def test_latents_of_one_position_are_refused_by_what_helps(folder, tiny_autoencoder_kl):
    said = (
        r"at least 2 positions a side, and 4 px give 1 at stride 4; use --resolution 8 or more \(12 with --aspect_buck"
    )
    with pytest.raises(ValueError, match=said):
        run_script(SCRIPT, flags(folder, tiny_autoencoder_kl, aspect_buckets=5, resolution=8))
