"""train_transformer.py through its command line: what it leaves, and what it refuses at the start."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image

from diffusers_eqvae.flow import interpolate, velocity_target
from diffusers_eqvae.latents import LatentNormalization
from diffusers_eqvae.models.transformer_sit import SiTTransformer2DModel
from diffusers_eqvae.provenance import vae_fingerprint
from diffusers_eqvae.training_utils.arguments import DataArguments, RunArguments, parse
from diffusers_eqvae.training_utils.transformer.arguments import FlowArguments, SamplingArguments, TransformerArguments

from ..invariants.tiny_latents import CLASS_NAMES, write_store

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "training" / "train_transformer.py"
TINY = {"patch_size": 2, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
PRESETS = sorted((ROOT / "training" / "configs").glob("sit_*.yaml"))
GROUPS = (TransformerArguments, FlowArguments, SamplingArguments, DataArguments, RunArguments)


@pytest.fixture
def script():
    specification = importlib.util.spec_from_file_location("train_transformer", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    yield module
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def store(tmp_path, tiny_autoencoder_kl):
    return write_store(tmp_path / "store", tiny_autoencoder_kl)


def flags(tmp_path, *extra, **options):
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    defaults = {"model": tmp_path / "tiny.json", "output_dir": tmp_path / "run", "report_to": "none"}
    defaults |= {"train_batch_size": 4, "max_train_steps": 3, "num_inference_steps": 2, "num_validation_images": 1}
    words = [str(word) for name, value in {**defaults, **options}.items() for word in (f"--{name}", value)]
    return [*words, *extra]


def test_finished_directory_loads_in_a_fresh_process(script, tmp_path, store, tiny_autoencoder_kl):
    script.main(flags(tmp_path, latents_dir=store, validation_steps=2))
    run = tmp_path / "run"
    assert {"model_index.json", "transformer", "vae", "scheduler", "run_facts.json"} <= {p.name for p in run.iterdir()}
    assert (run / "validation" / "00000002_samples.png").exists()
    code = f"""
import diffusers_eqvae
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained({str(run)!r})
output = pipeline(["otter", 0], num_inference_steps=2, guidance_scale=1.5)
print(len(output.images), output.images[0].size, pipeline.transformer.config.latent_fingerprint)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split() == ["2", "(16,", "16)", vae_fingerprint(tiny_autoencoder_kl)]


def test_finished_weights_are_the_average(script, tmp_path, store):
    script.main(flags(tmp_path, latents_dir=store, learning_rate=0.1, ema_decay=0.5, validation_steps=0))
    saved = torch.load(tmp_path / "run" / "checkpoints" / "step-00000003" / "transformer.pt", weights_only=True)
    transformer = DiffusionPipeline.from_pretrained(tmp_path / "run").transformer
    for name, tensor in transformer.state_dict().items():
        assert torch.equal(tensor, saved["ema"][name])
    assert not torch.equal(saved["ema"]["proj_out.weight"], saved["module"]["proj_out.weight"])


def test_the_objective_is_the_one_of_the_paper(script, tmp_path, store, monkeypatch):
    """Latents are normalised once, time is 1000 sigma, the target is the velocity, and labels drop by the mask."""
    seen = {}
    original = SiTTransformer2DModel.forward

    def forward(self, hidden_states, timestep, class_labels, drop_labels=None, return_dict=True):
        seen.update(x=hidden_states, timestep=timestep, drop=drop_labels, labels=class_labels)
        return original(self, hidden_states, timestep, class_labels, drop_labels, return_dict)

    def loss(prediction, target):
        seen["target"] = target
        return (prediction - target).square().flatten(1).mean(1)

    monkeypatch.setattr(SiTTransformer2DModel, "forward", forward)
    monkeypatch.setattr(script, "flow_matching_loss", loss)
    script.main(flags(tmp_path, latents_dir=store, max_train_steps=1, validation_steps=0, train_batch_size=16))

    sigma = (seen["timestep"] / 1000).view(-1, 1, 1, 1)
    clean = seen["x"] - sigma * seen["target"]
    noise = clean + seen["target"]
    assert torch.allclose(interpolate(clean, noise, sigma.flatten()), seen["x"], atol=1e-5)
    assert torch.allclose(velocity_target(clean, noise, sigma.flatten()), seen["target"], atol=1e-5)
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    # The store's moments are N(0, 1) means and N(0, 1) log-variances: a raw latent has variance 1 + e^0.5.
    expected = (1 + np.exp(0.5)) ** 0.5 * LatentNormalization.from_vae(
        AutoencoderKL.from_pretrained(store / "vae")
    ).scaling_factor
    assert abs(clean.std() / expected - 1) < 0.1
    assert seen["drop"].dtype == torch.bool and seen["drop"].shape == seen["labels"].shape


def test_labels_drop_as_often_as_the_model_says(script, tmp_path, store, monkeypatch):
    dropped, original = [], SiTTransformer2DModel.forward

    def forward(self, hidden_states, timestep, class_labels, drop_labels=None, return_dict=True):
        dropped.append(drop_labels)
        return original(self, hidden_states, timestep, class_labels, drop_labels, return_dict)

    monkeypatch.setattr(SiTTransformer2DModel, "forward", forward)
    options = {"max_train_steps": 8, "train_batch_size": 16, "validation_steps": 0, "class_dropout_prob": 0.3}
    script.main(flags(tmp_path, latents_dir=store, **options))
    assert 20 < torch.cat(dropped).sum() < 58  # 38.4 expected of 128, standard deviation 5.2


def test_images_on_the_fly(script, tmp_path, tiny_autoencoder_kl):
    tiny_autoencoder_kl.save_pretrained(tmp_path / "vae")
    for label in CLASS_NAMES.values():
        (tmp_path / "images" / label).mkdir(parents=True)
        for index in range(4):
            noise = np.random.default_rng(index).integers(0, 255, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "images" / label / f"{index}.png")
    arguments = flags(tmp_path, vae=tmp_path / "vae", train_data_dir=tmp_path / "images", resolution=16)
    script.main([*arguments, "--random_flip", "--compile", "false"])
    config = json.loads((tmp_path / "run" / "transformer" / "config.json").read_text())
    assert (config["num_classes"], config["sample_size"], config["in_channels"]) == (3, 4, 4)


def test_continues_from_a_saved_transformer_and_a_deterministic_autoencoder(script, tmp_path, tiny_autoencoder_tiny):
    store = write_store(tmp_path / "store", tiny_autoencoder_tiny)
    start = SiTTransformer2DModel(**TINY, sample_size=4, in_channels=4, num_classes=3)
    start.save_pretrained(tmp_path / "start")
    script.main(flags(tmp_path, latents_dir=store, model=tmp_path / "start", learning_rate=1e-30, validation_steps=0))
    finished = DiffusionPipeline.from_pretrained(tmp_path / "run").transformer
    assert torch.allclose(finished.patch_embed.weight, start.patch_embed.weight)
    assert finished.config.latent_fingerprint == vae_fingerprint(tiny_autoencoder_tiny)
    again = {"model": tmp_path / "run", "output_dir": tmp_path / "again", "learning_rate": 1e-30}
    script.main(flags(tmp_path, latents_dir=store, validation_steps=0, **again))
    continued = DiffusionPipeline.from_pretrained(tmp_path / "again").transformer
    assert torch.allclose(continued.patch_embed.weight, start.patch_embed.weight)


def other_autoencoder(tmp_path, vae):
    torch.manual_seed(1)
    other = AutoencoderKL.from_config(vae.config)
    other.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def test_refuses_a_store_of_another_autoencoder(script, tmp_path, store, tiny_autoencoder_kl):
    with pytest.raises(ValueError, match=r"(?i)autoencoder"):
        script.main(flags(tmp_path, latents_dir=store, vae=other_autoencoder(tmp_path, tiny_autoencoder_kl)))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_refuses_a_store_without_labels(script, tmp_path, tiny_autoencoder_kl):
    store = write_store(tmp_path / "store", tiny_autoencoder_kl, labelled=False)
    with pytest.raises(ValueError, match="no labels"):
        script.main(flags(tmp_path, latents_dir=store))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1000}, "3 classes, but --num_classes says 1000"),
        ({"model": "SiT-Q/2"}, "Unknown model preset"),
        ({"model": "DiT-S/2"}, "use SiT-S/2"),
        ({"model": "SiT-S/8"}, "multiple of `patch_size`"),
        ({"train_data_dir": "images"}, "either --latents_dir"),
        ({"sigma_std": 0}, "sigma_std must be positive"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1"),
        ({"num_validation_images": 0}, "--validation_steps 0"),
        ({"validation_labels": -1}, "class numbers from 0 on"),
        ({"class_dropout_prob": 0}, "use --guidance_scale 1"),
    ],
)
def test_refused_in_one_sentence(script, tmp_path, store, options, message):
    with pytest.raises(ValueError, match=message):
        script.main(flags(tmp_path, latents_dir=store, **options))


def test_refuses_a_reversed_guidance_interval():
    with pytest.raises(ValueError, match="lo <= hi"):
        SamplingArguments(guidance_interval=[0.8, 0.2])


def test_refuses_a_model_for_other_latents(script, tmp_path, store):
    SiTTransformer2DModel(**TINY, sample_size=4, in_channels=16, num_classes=3).save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match=r"in_channels = 16.*have 4"):
        script.main(flags(tmp_path, latents_dir=store, model=tmp_path / "start"))


def test_refuses_an_autoencoder_as_the_model(script, tmp_path, store):
    with pytest.raises(ValueError, match="holds an AutoencoderKL; a SiTTransformer2DModel is trained here"):
        script.main(flags(tmp_path, latents_dir=store, model=store / "vae"))


def test_refuses_neither_store_nor_images(script, tmp_path):
    with pytest.raises(ValueError, match="--latents_dir"):
        script.main(flags(tmp_path))


def test_push_gets_the_finished_directory(script, tmp_path, store, monkeypatch):
    pushed = []
    monkeypatch.setattr(script, "push_run", lambda directory, name: pushed.append((directory, name)))
    script.main(flags(tmp_path, "--push_to_hub", latents_dir=store, validation_steps=0, hub_model_id="me/model"))
    assert pushed == [(tmp_path / "run", "me/model")]


def test_dry_run_leaves_nothing(script, tmp_path, store, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(flags(tmp_path, "--dry_run", latents_dir=store, report_to="tensorboard"))
    assert stopped.value.code == 0 and not (tmp_path / "run").exists()
    assert "Disk per checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize(
    "preset", sorted((ROOT / "training" / "configs").glob("sit_*.yaml")), ids=lambda path: path.stem
)
def test_presets_describe_models_that_exist(preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, *_ = parse(*GROUPS, argv=[str(preset), "--output_dir", "x"])
    with torch.device("meta"):
        if arguments.model.endswith(".json"):
            model = SiTTransformer2DModel(**json.loads(Path(arguments.model).read_text()))
        else:
            model = SiTTransformer2DModel.from_preset(arguments.model)
    assert model.config.timestep_convention == "flow"
