"""Autoencoders of images of any number of channels, from a folder of arrays to a card."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from diffusers_eqvae.commands import compat, statistics
from diffusers_eqvae.data.image_datasets import PixelDataset, load_image_dataset
from diffusers_eqvae.data.latent_store import LatentStore
from diffusers_eqvae.inspection.run import main as inspect
from diffusers_eqvae.metrics.reconstruction import psnr

from ..invariants.trajectories import ROOT, as_flags, load_script, run_script
from .test_train_autoencoder import SCRIPT, autoencoder_of, flags

# Channels -> what their arrays hold, and value_range.json; channels come last, and of five first.
KINDS = {1: (np.uint8, None), 2: (np.float32, {"black": -1.5, "white": 2.5}), 5: (np.uint16, None)}


@pytest.fixture
def arrays(tmp_path):
    """A function that fills tmp_path/images with eight smooth arrays of so many channels."""

    def write(channels: int):
        dtype, stated = KINDS[channels]
        low, high = (-1.5, 2.5) if stated else (0, np.iinfo(dtype).max)
        (tmp_path / "images").mkdir()
        rng = np.random.default_rng(0)
        for number in range(8):
            smooth = np.kron(rng.uniform(low, high, (4, 5, channels)), np.ones((11, 10, 1))).astype(dtype)
            array = {1: smooth[..., 0], 2: smooth}.get(channels, smooth.transpose(2, 0, 1))
            np.save(tmp_path / f"images/{number}.npy", array)
        if stated:
            (tmp_path / "images/value_range.json").write_text(json.dumps(stated))
        return tmp_path

    return write


@pytest.mark.parametrize("channels", [pytest.param(1, marks=pytest.mark.slow), 2, 5])
def test_arrays_are_trained_on_encoded_measured_and_inspected(arrays, channels, caplog, capsys):
    folder = arrays(channels)
    words = flags(folder, autoencoder_of(channels), disc_weight=0.5, disc_num_layers=1, validation_steps=1)
    run_script(SCRIPT, words)
    trained = AutoencoderKL.from_pretrained(folder / "run", latents_mean=None, latents_std=None)
    assert json.loads((folder / "run/discriminator/config.json").read_text())["in_channels"] == channels
    source = load_image_dataset(train_data_dir=folder / "images", channels=channels)
    images = PixelDataset(source, resolution=32)
    pixels = torch.stack([images[index]["pixel_values"] for index in range(8)])
    assert pixels.shape == (8, channels, 32, 32) and -1 <= pixels.min() < -0.9 and 0.9 < pixels.max() <= 1

    data = {"train_data_dir": folder / "images", "resolution": 32, "cache_dir": folder / "cache"}
    run_script(
        ROOT / "training/encode_latents.py", as_flags({"vae": folder / "run", "output_dir": folder / "s", **data})
    )
    with torch.no_grad():
        posterior = trained.encode(pixels).latent_dist
        expected = psnr(trained.decode(posterior.mode()).sample, pixels).mean().item()
    stored = LatentStore(folder / "s").get_many(range(8))["moments"].float()
    assert torch.allclose(stored, posterior.parameters, atol=0.05)

    capsys.readouterr()
    assert statistics.main([str(folder / "run"), *as_flags({"data_dir": folder / "images", "resolution": 32})]) == 0
    printed = capsys.readouterr().out
    stated = json.loads(printed[printed.index("{") : printed.rindex("}") + 1])
    assert np.allclose(stated["latents_mean"], posterior.mean.mean((0, 2, 3)), atol=1e-4)

    evaluate = {"vae": folder / "run", "data_dir": folder / "images", "resolution": 32, "output": folder / "card.json"}
    with caplog.at_level(logging.WARNING):
        load_script(ROOT / "training/evaluate_autoencoder.py").main(as_flags(evaluate))
    card = json.loads((folder / "card.json").read_text())
    assert card["metrics"]["psnr"] == pytest.approx(expected, abs=0.05)  # of 8 bits a channel

    shown = {"data_dir": folder / "images", "resolution": 32, "num_images": 8, "output_dir": folder / "health"}
    assert inspect([str(folder / "run"), *as_flags(shown)]) == 0
    assert json.loads((folder / "health/card.run.json").read_text())["metrics"]["psnr"] == pytest.approx(expected)
    shown.pop("output_dir")
    assert compat.main([str(folder / "run"), str(folder / "run"), *as_flags(shown)]) == 0


def test_what_sees_rgb_images_alone_refuses_others_in_a_sentence(arrays, tiny_autoencoder_kl):
    folder = arrays(5)
    words = flags(folder, autoencoder_of(5), perceptual_weight=1)
    with pytest.raises(ValueError, match="LPIPS compares RGB or grey images, and these have 5 channels; give --perc"):
        run_script(SCRIPT, words)
    evaluate = load_script(ROOT / "training/evaluate_autoencoder.py").main
    options = {"vae": folder / "vae", "data_dir": folder / "images", "resolution": 32, "output": folder / "card.json"}
    with pytest.raises(ValueError, match=r"have 5 channels; leave lpips out of --metrics"):
        evaluate(as_flags(options | {"metrics": ["psnr", "lpips"], "lpips_backbone_weights": folder / "w.pth"}))
    with pytest.raises(ValueError, match=r"Images have 3 \(RGB\) channels here, and this AutoencoderKL takes 5"):
        evaluate(as_flags(options | {"feature_networks": "squeezenet"}))
    shown = {"data_dir": folder / "images", "resolution": 32, "output_dir": folder / "health"}
    with pytest.raises(ValueError, match="have 5 channels; leave lpips_backbone_weights out"):
        inspect([str(folder / "vae"), *as_flags(shown | {"lpips_backbone_weights": folder / "w.pth"})])
    tiny_autoencoder_kl.save_pretrained(folder / "rgb")
    with pytest.raises(ValueError, match=r"Images have 5 channels here, and this AutoencoderKL takes 3"):
        inspect([str(folder / "vae"), *as_flags(shown | {"compare": folder / "rgb"})])
