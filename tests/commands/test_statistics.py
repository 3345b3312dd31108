"""eqvae statistics: what it measures is what the training and encoding scripts write for the same images."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import eqvae_command
from diffusers_eqvae.autoencoders import encode, load_autoencoder
from diffusers_eqvae.inspection.run import load_images
from diffusers_eqvae.latents import ENTRIES, LatentNormalization

from ..invariants.trajectories import ROOT, as_flags, run_script


@pytest.fixture
def folder(tmp_path, tiny_autoencoder_kl):
    (tmp_path / "images").mkdir()
    for index in range(11):
        array = np.random.default_rng(index).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / "images" / f"{index:02d}.png")
    tiny_autoencoder_kl.save_pretrained(tmp_path / "vae")
    return tmp_path


def statistics(vae, folder, *more) -> int:
    words = ["statistics", vae, "--data_dir", folder / "images", "--resolution", "16", *more]
    return eqvae_command.main([str(word) for word in words])


def content(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def printed(capsys) -> dict:
    return json.JSONDecoder().raw_decode(capsys.readouterr().out.lstrip())[0]


@pytest.mark.parametrize("normalization", ["channel", "scalar"])
def test_the_copy_says_what_train_autoencoder_writes_to_the_digit(folder, normalization):
    run_script(
        ROOT / "training" / "train_autoencoder.py",
        as_flags(
            {
                "pretrained_model_name_or_path": folder / "vae",
                "train_data_dir": folder / "images",
                "output_dir": folder / "run",
                "resolution": 16,
                "perceptual_weight": 0,
                "disc_weight": 0,
                "regularizers": "none",
                "max_train_steps": 1,
                "validation_steps": 0,
                "normalization": normalization,
                "report_to": "none",
                "cache_dir": folder / "cache",
            }
        ),
    )
    silent = load_autoencoder(str(folder / "run"))
    LatentNormalization().apply_to(silent)
    silent.save_pretrained(folder / "silent")
    options = ("--normalization", normalization, "--output_dir", folder / "copy")
    assert statistics(folder / "silent", folder, *options) == 0
    for name in ("mean_std.json", "diffusion_pytorch_model.safetensors"):
        assert (folder / "copy" / name).read_bytes() == (folder / "run" / name).read_bytes(), name
    saved, trained = (json.loads((folder / name / "config.json").read_text()) for name in ("copy", "run"))
    assert {key: saved[key] for key in ENTRIES} == {key: trained[key] for key in ENTRIES}
    assert (saved["latents_mean"] is None) == (normalization == "scalar")


def test_it_equals_what_encode_latents_writes(folder):
    flags = {"vae": folder / "vae", "train_data_dir": folder / "images", "output_dir": folder / "store"}
    flags |= {"resolution": 16, "batch_size": 3, "dtype": "fp32", "cache_dir": folder / "cache"}
    run_script(ROOT / "training" / "encode_latents.py", as_flags(flags))
    assert statistics(folder / "vae", folder, "--output_dir", folder / "copy") == 0
    ours, store = (json.loads((folder / name / "mean_std.json").read_text()) for name in ("copy", "store"))
    assert ours["num_samples"] == store["num_samples"] == 11
    for name in ("latents_mean", "latents_std"):
        assert ours[name] == pytest.approx(store[name], rel=1e-6), name


def test_figures_are_those_of_the_posterior_and_the_source_is_left_alone(folder, capsys):
    """Mean and total variance per channel, against a float64 transcription on four evenly spaced images of eleven."""
    before = content(folder / "vae")
    assert statistics(folder / "vae", folder, "--num_images", "4") == 0
    said = printed(capsys)
    vae = load_autoencoder(str(folder / "vae"))
    with torch.no_grad():
        posterior = encode(vae, load_images(folder / "images", resolution=16, num_images=4))
    mean, variance = posterior.mean.double(), posterior.logvar.double().exp()
    total = mean.var((0, 2, 3), correction=0) + variance.mean((0, 2, 3))
    assert said["latents_mean"] == pytest.approx(mean.mean((0, 2, 3)).tolist(), rel=1e-5, abs=1e-7)
    assert said["latents_std"] == pytest.approx(total.sqrt().tolist(), rel=1e-5)
    assert content(folder / "vae") == before


def test_the_source_and_what_others_wrote_are_never_written_to(folder, tiny_vq_model, capsys):
    before = content(folder / "vae")
    assert statistics(folder / "vae", folder, "--output_dir", folder / "vae") == 2
    assert "which is read here (vae); what is read is never written to" in capsys.readouterr().err
    (folder / "mine").mkdir()
    (folder / "mine" / "config.json").write_text("{}")
    assert statistics(folder / "vae", folder, "--output_dir", folder / "mine") == 2
    assert "choose a new or an empty directory" in capsys.readouterr().err
    assert content(folder / "vae") == before and content(folder / "mine") == {"config.json": b"{}"}
    tiny_vq_model.save_pretrained(folder / "vq")
    assert statistics(folder / "vq", folder, "--output_dir", folder / "new") == 2
    assert "its tokens need no normalisation" in capsys.readouterr().err and not (folder / "new").exists()
