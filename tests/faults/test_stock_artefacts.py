"""What is saved is plain diffusers' own, on the screens of those who have nothing else; or it fails to load there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from diffusers_eqvae.autoencoders import load_autoencoder
from diffusers_eqvae.latents import LatentNormalization
from diffusers_eqvae.models.autoencoder_kl_eq import PADDING_MODES, AutoencoderKLEQ, as_class
from diffusers_eqvae.pipelines.pipeline_class_conditional import ClassConditionalPipeline
from diffusers_eqvae.schedulers.scheduling_flow_match_ode import FlowMatchODEScheduler

NORMALIZATIONS = {
    "default": {},
    "scale": {"scaling_factor": 0.7},
    "shift": {"scaling_factor": 0.7, "shift_factor": 0.1},
    "channels": {"scaling_factor": 1.0, "latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.9, 1.1, 1.0, 1.2]},
}
PADDINGS = [mode for mode in PADDING_MODES if mode != "zeros"]


def build(**options):
    torch.manual_seed(0)
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return AutoencoderKLEQ(block_out_channels=(8, 16), norm_num_groups=4, **kinds, **options).eval()


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(1, 3, 16, 16) * 2 - 1


STRANGER = """
import logging, sys, torch
import diffusers
from diffusers import {cls}
from diffusers.utils import logging as verbosity
torch.set_num_threads(1)
verbosity.set_verbosity_warning()
vae = {cls}.from_pretrained(sys.argv[1])
assert "diffusers_eqvae" not in sys.modules
assert type(vae) is diffusers.AutoencoderKL, type(vae)
with torch.no_grad():
    torch.save(vae.eval()(torch.load(sys.argv[2])).sample, sys.argv[3])
"""


def stranger(code: str, *arguments: Path, cls: str = "AutoencoderKL") -> subprocess.CompletedProcess:
    """A process that knows plain diffusers only."""
    command = [sys.executable, "-c", code.format(cls=cls), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("cls", ["AutoencoderKL", "AutoModel"])
def test_a_stranger_loads_it_without_a_warning(cls, tmp_path, pixels):
    vae = build(**NORMALIZATIONS["channels"])
    vae.save_pretrained(tmp_path / "vae")
    torch.save(pixels, tmp_path / "pixels.pt")
    done = stranger(STRANGER, tmp_path / "vae", tmp_path / "pixels.pt", tmp_path / "out.pt", cls=cls)
    assert done.returncode == 0, done.stderr
    assert "ignored" not in done.stderr and "eqvae" not in done.stderr
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "out.pt"), vae(pixels).sample)


@pytest.mark.parametrize("normalization", NORMALIZATIONS.values(), ids=NORMALIZATIONS)
def test_its_config_is_that_of_a_stock_autoencoder(normalization, tmp_path):
    vae = build(**normalization)
    vae.save_pretrained(tmp_path / "ours")
    AutoencoderKL.from_config({**vae.config, "_class_name": "AutoencoderKL"}).save_pretrained(tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs"))
    assert ours["_class_name"] == "AutoencoderKL" and "padding_mode" not in ours
    theirs.pop("padding_mode", None)
    assert ours == theirs
    assert (tmp_path / "ours" / "mean_std.json").exists() == ("latents_mean" in normalization)


@pytest.mark.parametrize("saved_as", ["ours", "stock"])
def test_our_class_reads_either(saved_as, tmp_path, pixels):
    vae = build(scaling_factor=0.7)
    (vae if saved_as == "ours" else vae.to_stock()).save_pretrained(tmp_path)
    loaded = AutoencoderKLEQ.from_pretrained(tmp_path).eval()
    assert type(loaded) is AutoencoderKLEQ and loaded.config.padding_mode == "zeros"
    assert loaded.config.scaling_factor == 0.7
    with torch.no_grad():
        assert torch.equal(loaded(pixels).sample, vae(pixels).sample)


@pytest.mark.parametrize("mode", PADDINGS)
@pytest.mark.parametrize(
    "load",
    [
        lambda path, vae: AutoencoderKL.from_pretrained(path),
        lambda path, vae: AutoencoderKL.from_config(vae.config),
        lambda path, vae: AutoencoderKL.from_config(AutoencoderKL.load_config(path)),
    ],
    ids=["weights", "config in memory", "config"],
)
def test_other_padding_fails_in_plain_diffusers_and_says_what_loads_it(mode, load, tmp_path, pixels):
    vae = build(padding_mode=mode)
    vae.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"loaded by diffusers_eqvae\.AutoencoderKLEQ with padding_mode={mode} does"):
        load(tmp_path, vae)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "AutoencoderKLEQ"
    for loaded in (AutoencoderKLEQ.from_pretrained(tmp_path), load_autoencoder(str(tmp_path))):
        assert loaded.config.padding_mode == mode
        with torch.no_grad():
            assert torch.equal(loaded.eval()(pixels).sample, vae(pixels).sample)


def test_a_stock_form_has_the_same_parameters(pixels):
    vae = build(**NORMALIZATIONS["shift"])
    stock = vae.to_stock()
    assert type(stock) is AutoencoderKL and stock.config.shift_factor == 0.1 and not stock.training
    assert all(ours is theirs for ours, theirs in zip(vae.parameters(), stock.parameters(), strict=True))
    assert LatentNormalization.from_vae(stock) == LatentNormalization.from_vae(vae)
    with torch.no_grad():
        assert torch.equal(stock(pixels).sample, vae(pixels).sample)
    with pytest.raises(
        ValueError, match="pads with zeros, and this autoencoder with reflect, so it has no stock form"
    ):
        build(padding_mode="reflect").to_stock()


def test_a_stock_form_belongs_into_foreign_pipelines(tmp_path):
    others = {"text_encoder": None, "tokenizer": None, "unet": None, "scheduler": None}
    pipeline = StableDiffusionPipeline(
        vae=build().to_stock(), **others, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    assert pipeline.config["vae"] == ("diffusers", "AutoencoderKL")


@pytest.mark.parametrize("padding_mode", [None, "reflect", "zeros"])
def test_our_class_is_built_around_a_stock_autoencoder(padding_mode, pixels):
    stock = build(scaling_factor=0.7).to_stock()
    ours = as_class(AutoencoderKLEQ, stock, **({} if padding_mode is None else {"padding_mode": padding_mode}))
    assert ours.config.padding_mode == (padding_mode or "zeros") and ours.config.scaling_factor == 0.7
    expected = build(padding_mode=padding_mode or "zeros")
    with torch.no_grad():
        assert torch.equal(ours(pixels).sample, expected(pixels).sample)
    assert list(ours.config.down_block_types) == list(expected.config.down_block_types)


@pytest.mark.parametrize("put", ["constructor", "attribute", "register_modules", "compiled"])
def test_our_pipelines_name_the_stock_class(put, tiny_sit, tmp_path):
    vae, other = build(), build()
    pipeline = ClassConditionalPipeline(tiny_sit, vae if put == "constructor" else other, FlowMatchODEScheduler())
    if put == "attribute":
        pipeline.vae = vae
    elif put == "register_modules":
        pipeline.register_modules(vae=vae)
    elif put == "compiled":
        pipeline.vae = torch.compile(vae, backend="eager")
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["vae"] == ["diffusers", "AutoencoderKL"]
    assert type(ClassConditionalPipeline.from_pretrained(tmp_path).vae) is AutoencoderKL


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"variant": "fp16"}, "diffusion_pytorch_model.fp16.safetensors"),
        ({"safe_serialization": False}, "diffusion_pytorch_model.bin"),
        ({"max_shard_size": "20KB"}, "diffusion_pytorch_model.safetensors.index.json"),
        ({"variant": "fp16", "max_shard_size": "20KB"}, "diffusion_pytorch_model.safetensors.index.fp16.json"),
    ],
    ids=["variant", "pickled", "shards", "variant in shards"],
)
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_every_option_of_saving_is_honoured_through_a_pipeline(options, expected, padding_mode, tiny_sit, tmp_path):
    vae = build(padding_mode=padding_mode, **NORMALIZATIONS["channels"])
    ClassConditionalPipeline(tiny_sit, vae, FlowMatchODEScheduler()).save_pretrained(tmp_path, **options)
    files = {path.name for path in (tmp_path / "vae").iterdir()}
    assert {expected, "mean_std.json", "config.json"} <= files
    loading = {"variant": "fp16"} if "variant" in options else {}
    loaded = AutoencoderKLEQ.from_pretrained(tmp_path / "vae", **loading)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), vae.state_dict().values(), strict=True))
