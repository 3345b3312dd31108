"""train_transformer.py through its command line: what it leaves, and what it refuses at the start."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image

from diffusers_eqvae.data.latent_store import LatentStore
from diffusers_eqvae.data.order import DrawDataset, DrawSampler
from diffusers_eqvae.hub import prepare_push
from diffusers_eqvae.latents import LatentNormalization
from diffusers_eqvae.models.alignment_network import AlignmentNetwork
from diffusers_eqvae.models.feature_projector import FeatureProjector
from diffusers_eqvae.models.transformer_sit import SiTTransformer2DModel
from diffusers_eqvae.pipelines.pipeline_class_conditional import ClassConditionalPipeline
from diffusers_eqvae.provenance import autoencoder_identity
from diffusers_eqvae.randomness import StepRandomness
from diffusers_eqvae.training_utils.arguments import DataArguments, OptimizerArguments, RunArguments
from diffusers_eqvae.training_utils.command_line import parse
from diffusers_eqvae.training_utils.transformer import arguments as cli
from diffusers_eqvae.training_utils.transformer.model_source import ModelSource

from ..invariants.tiny_latents import CLASS_NAMES, write_store

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "training" / "train_transformer.py"
SIZES = {"patch_size": 2, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
TINY = {"_class_name": "SiTTransformer2DModel", **SIZES}
PRESETS = sorted(path for path in (ROOT / "training" / "configs").glob("*it_*.yaml") if "eqvae" not in path.name)
GROUPS = (cli.TransformerArguments, OptimizerArguments, cli.SamplingArguments, DataArguments, RunArguments)


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
    written = {path.name for path in run.iterdir()}
    assert {"model_index.json", "transformer", "vae", "scheduler", "run_metadata.json"} <= written
    assert (run / "validation" / "00000002_samples.png").exists()
    code = f"""
import diffusers_eqvae
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained({str(run)!r})
output = pipeline(["otter", 0], num_inference_steps=2, guidance_scale=1.5)
print(len(output.images), output.images[0].size, pipeline.transformer.config.autoencoder["encoder"]["float32"])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    encoder = autoencoder_identity(tiny_autoencoder_kl)["encoder"]["float32"]
    assert result.stdout.split() == ["2", "(16,", "16)", encoder]


def test_finished_weights_are_the_average(script, tmp_path, store):
    script.main(flags(tmp_path, latents_dir=store, learning_rate=0.1, ema_decay=0.5, validation_steps=0))
    saved = torch.load(tmp_path / "run" / "checkpoints" / "step-00000003" / "objective.pt", weights_only=True)
    transformer = DiffusionPipeline.from_pretrained(tmp_path / "run").transformer
    for name, tensor in transformer.state_dict().items():
        assert torch.equal(tensor, saved["ema"][f"model.{name}"])
    assert not torch.equal(saved["ema"]["model.proj_out.weight"], saved["module"]["model.proj_out.weight"])


@pytest.fixture
def seen(monkeypatch):
    """What the model was given in every forward, and what was drawn."""
    calls = []
    original = SiTTransformer2DModel.forward

    def forward(self, hidden_states, timestep, class_labels, **options):
        calls.append({"x": hidden_states, "timestep": timestep, "labels": class_labels, **options})
        output = original(self, hidden_states, timestep, class_labels, **options)
        calls[-1]["output"] = output.sample if options.get("return_dict", True) else output[0]
        return output

    monkeypatch.setattr(SiTTransformer2DModel, "forward", forward)
    return calls


def test_the_loss_is_the_one_of_the_paper(script, tmp_path, store, seen):
    """Latents are normalised once and noised with the run's own numbers, time is 1000 sigma, and the loss is the mean
    square of the velocity, all recomputed here from the seed."""
    options = {"max_train_steps": 1, "validation_steps": 0, "train_batch_size": 16, "logging_steps": 1}
    script.main(flags(tmp_path, latents_dir=store, **options))
    call, vae = seen[0], AutoencoderKL.from_pretrained(store / "vae")
    data = LatentStore(store, vae=vae)
    numbers = next(iter(DrawSampler(len(data), 16, seed=0)))
    moments = DrawDataset(data, seed=0).__getitems__(numbers)["moments"].double()
    randomness = StepRandomness(0)
    posterior_noise, noise = (randomness.randn((16, 4, 4, 4)).double() for _ in range(2))
    sigma = randomness.rand((16,)).double().view(-1, 1, 1, 1)
    mean, logvar = moments.chunk(2, dim=1)
    clean = (mean + (0.5 * logvar).exp() * posterior_noise) * LatentNormalization.from_vae(vae).scaling_factor
    torch.testing.assert_close(call["timestep"].double(), 1000 * sigma.flatten())
    torch.testing.assert_close(call["x"].double(), (1 - sigma) * clean + sigma * noise, rtol=1e-5, atol=1e-5)
    expected = (call["output"].double() - (noise - clean)).square().mean()
    (line, *_) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["loss"] == pytest.approx(expected.item(), rel=1e-5)
    # Moments are normal, so latents are independent with variance 1 + E exp(logvar): pi / 2 of their deviation.
    scale = LatentNormalization.from_vae(vae).scaling_factor
    linear = math.pi / 2 * scale * math.sqrt(1 + math.exp(0.5))
    assert json.loads(line)["loss_of_linear_predictor"] == pytest.approx(linear, rel=0.1)


def test_another_path_has_no_line_of_a_linear_predictor(script, tmp_path, store):
    script.main(flags(tmp_path, latents_dir=store, max_train_steps=1, logging_steps=1, flow_path="cosine"))
    (line, *_) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert "loss" in json.loads(line) and "loss_of_linear_predictor" not in json.loads(line)


def test_labels_drop_as_often_as_the_model_says(script, tmp_path, store, seen):
    options = {"max_train_steps": 8, "train_batch_size": 16, "validation_steps": 0, "class_dropout_prob": 0.3}
    script.main(flags(tmp_path, latents_dir=store, **options))
    dropped = torch.cat([call["drop_labels"] for call in seen])
    assert 20 < dropped.sum() < 58  # 38.4 expected of 128, standard deviation 5.2


@pytest.fixture
def image_flags(tmp_path, tiny_autoencoder_kl):
    """Of a run that encodes a folder of images of three classes on the way."""
    tiny_autoencoder_kl.save_pretrained(tmp_path / "vae")
    for label in CLASS_NAMES.values():
        (tmp_path / "images" / label).mkdir(parents=True)
        for index in range(4):
            noise = np.random.default_rng(index).integers(0, 255, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "images" / label / f"{index}.png")
    return flags(tmp_path, vae=tmp_path / "vae", train_data_dir=tmp_path / "images", resolution=16)


def test_images_on_the_fly(script, tmp_path, image_flags):
    script.main([*image_flags, "--random_flip", "--compile", "false"])
    config = json.loads((tmp_path / "run" / "transformer" / "config.json").read_text())
    assert (config["num_classes"], config["sample_size"], config["in_channels"]) == (3, 4, 4)


def test_regularizers_that_read_the_images_features(script, tmp_path, image_flags):
    """The projector is trained, saved as a component of its own, and no part of the pipeline."""
    words = ["--regularizers", "vae_repa", "contrastive_flow", "velocity_direction", "--vae_repa_layer", "1"]
    words += ["--vae_repa_projector_size", "8", "--no_use_ema", "--logging_steps", "1"]
    script.main([*image_flags, *words])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"loss/flow", "loss/vae_repa", "loss/contrastive_flow", "loss/velocity_direction"} < lines[0].keys()
    projector = FeatureProjector.from_pretrained(tmp_path / "run" / "vae_repa_projector")
    saved = torch.load(tmp_path / "run" / "checkpoints" / "step-00000003" / "objective.pt", weights_only=True)
    for name, weight in projector.state_dict().items():
        assert torch.equal(weight, saved["module"][f"regularizers.vae_repa.projector.{name}"])
    assert "projector" not in " ".join(ClassConditionalPipeline.from_pretrained(tmp_path / "run").components)


def test_a_store_holds_no_images_to_read(script, tmp_path, store):
    with pytest.raises(ValueError, match="vae_repa reads the features vae_encoder, which these data do not hold"):
        script.main([*flags(tmp_path, latents_dir=store), "--regularizers", "vae_repa"])


def saved_network(folder) -> AlignmentNetwork:
    network = AlignmentNetwork(latent_channels=4, hidden_size=8, feature_size=6)
    network.save_pretrained(folder)
    return network


@pytest.mark.parametrize("from_store", [False, True])
def test_the_pipeline_carries_the_alignment_network_of_its_autoencoder(
    script, tmp_path, store, tiny_autoencoder_kl, from_store
):
    """Beside the autoencoder that is named, or beside the store's copy of it."""
    tiny_autoencoder_kl.save_pretrained(tmp_path / "aligned")
    network = saved_network((store / "vae" if from_store else tmp_path / "aligned") / "alignment_network")
    vae = {} if from_store else {"vae": tmp_path / "aligned"}
    script.main(flags(tmp_path, latents_dir=store, max_train_steps=1, **vae))
    carried = ClassConditionalPipeline.from_pretrained(tmp_path / "run").alignment_network
    assert all(map(torch.equal, carried.state_dict().values(), network.state_dict().values()))


def test_continues_from_a_saved_transformer_and_a_deterministic_autoencoder(script, tmp_path, tiny_autoencoder_tiny):
    store = write_store(tmp_path / "store", tiny_autoencoder_tiny)
    start = SiTTransformer2DModel(**SIZES, sample_size=4, in_channels=4, num_classes=3)
    start.save_pretrained(tmp_path / "start")
    script.main(flags(tmp_path, latents_dir=store, model=tmp_path / "start", learning_rate=1e-30, validation_steps=0))
    finished = DiffusionPipeline.from_pretrained(tmp_path / "run").transformer
    assert torch.allclose(finished.patch_embed.weight, start.patch_embed.weight)
    assert finished.config.autoencoder == autoencoder_identity(tiny_autoencoder_tiny)
    again = {"model": tmp_path / "run", "output_dir": tmp_path / "again", "learning_rate": 1e-30}
    script.main(flags(tmp_path, latents_dir=store, validation_steps=0, **again))
    continued = DiffusionPipeline.from_pretrained(tmp_path / "again").transformer
    assert torch.allclose(continued.patch_embed.weight, start.patch_embed.weight)


def test_a_pipeline_goes_on_along_its_own_path(script, tmp_path, store):
    """Linear is the default: without the check, weights of a cosine path would be trained on another."""
    quick = {"latents_dir": store, "max_train_steps": 1, "validation_steps": 0}
    script.main(flags(tmp_path, flow_path="cosine", **quick))
    again = {"model": tmp_path / "run", "output_dir": tmp_path / "again", **quick}
    with pytest.raises(ValueError, match=r"run was trained on the cosine path.* --flow_path cosine, or name .*former"):
        script.main(flags(tmp_path, **again))
    script.main(flags(tmp_path, flow_path="cosine", **again))
    on_purpose = again | {"model": tmp_path / "run" / "transformer", "output_dir": tmp_path / "other"}
    script.main(flags(tmp_path, **on_purpose))
    paths = [DiffusionPipeline.from_pretrained(tmp_path / name).scheduler.config.path for name in ("again", "other")]
    assert paths == ["cosine", "linear"]


def other_autoencoder(tmp_path, vae):
    torch.manual_seed(1)
    other = AutoencoderKL.from_config(vae.config)
    other.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def test_refuses_a_store_of_another_autoencoder(script, tmp_path, store, tiny_autoencoder_kl):
    with pytest.raises(ValueError, match="its encoder weights differ"):
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
        ({"config_overrides": "num_classes=1000"}, "num_classes = 1000, but the latents have 3"),
        (
            {"config_overrides": "objective=denoising"},
            "trains models that predict epsilon; this one predicts flow_pred",
        ),
        ({"objective": "autoencoder"}, "autoencoder does not fit here; --objective takes denoising, flow_matching"),
        ({"model": "SiT-Q/2"}, "Unknown model 'SiT-Q/2'"),
        ({"model": "SiT-S/2", "objective": "denoise"}, "no objective 'denoise'; there are autoencoder, denoising"),
        ({"model": "SiT-S/8"}, "multiple of `patch_size`"),
        ({"train_data_dir": "images"}, "either --latents_dir"),
        ({"sigma_std": 0}, "sigma_std must be positive"),
        ({"num_inference_steps": 0}, "num_inference_steps must be positive"),
        ({"num_validation_images": 0}, "num_validation_images must be positive"),
        ({"validation_labels": -1}, "Class ids must lie in 0.."),
        ({"class_dropout_prob": 0}, "use --guidance_scale 1"),
    ],
)
def test_refused_in_one_sentence(script, tmp_path, store, options, message):
    with pytest.raises(ValueError, match=message):
        script.main(flags(tmp_path, latents_dir=store, **options))


def test_refuses_a_reversed_guidance_interval():
    with pytest.raises(ValueError, match="lo <= hi"):
        cli.SamplingArguments(guidance_interval=[0.8, 0.2])


def test_refuses_a_model_for_other_latents(script, tmp_path, store):
    SiTTransformer2DModel(**SIZES, sample_size=4, in_channels=16, num_classes=3).save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match=r"in_channels = 16.*have 4"):
        script.main(flags(tmp_path, latents_dir=store, model=tmp_path / "start"))


def test_refuses_an_autoencoder_as_the_model(script, tmp_path, store):
    with pytest.raises(ValueError, match="AutoencoderKL is not a backbone known here"):
        script.main(flags(tmp_path, latents_dir=store, model=store / "vae"))


def test_refuses_neither_store_nor_images(script, tmp_path):
    with pytest.raises(ValueError, match="--latents_dir"):
        script.main(flags(tmp_path))


@pytest.mark.parametrize("worked", [True, False])
def test_push_gets_the_finished_directory_and_its_failure_is_the_programs(
    script, tmp_path, store, monkeypatch, worked
):
    pushed = []
    push = lambda *run, **options: pushed.append((*run, options)) or worked  # noqa: E731
    monkeypatch.setattr("diffusers_eqvae.training_utils.uploads.push_run", push)
    words = flags(tmp_path, "--push_to_hub", latents_dir=store, validation_steps=0, hub_model_id="me/model")
    if worked:
        script.main(words)
    else:
        with pytest.raises(SystemExit) as ended:
            script.main(words)
        assert ended.value.code == 1
    assert pushed == [(tmp_path / "run", "me/model", {"private": False, "revision": None, "hub_images": None})]


def test_the_card_of_a_run_on_a_store_names_autoencoder_data_and_resolution(script, tmp_path, store):
    config = json.loads((store / "vae" / "config.json").read_text())
    (store / "vae" / "config.json").write_text(json.dumps(config | {"_name_or_path": "stabilityai/sd-vae-ft-mse"}))
    script.main(flags(tmp_path, latents_dir=store, validation_steps=0))
    settings = LatentStore(store).settings
    _, card = prepare_push(tmp_path / "run", "me/sit")
    for text in (
        "on the latents of [stabilityai/sd-vae-ft-mse]",
        f"trained on `{settings.source['dataset']}` at {settings.resolution} px",
    ):
        assert text in card, card


def test_dry_run_leaves_nothing(script, tmp_path, store, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(flags(tmp_path, "--dry_run", latents_dir=store, report_to="tensorboard"))
    assert stopped.value.code == 0 and not (tmp_path / "run").exists()
    assert "Disk per checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_describe_models_that_exist(preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, *_ = parse(*GROUPS, argv=[str(preset), "--output_dir", "x"], choices=cli.transformer_choices)
    source = ModelSource.find(arguments.model)
    with torch.device("meta"):
        model = source.cls(**source.config)
    trained_by = {
        "dit": ("denoising", "epsilon"),
        "lightningdit": ("flow_matching", "flow_prediction"),
        "maskgit": ("masked_tokens", "logits"),
        "sit": ("flow_matching", "flow_prediction"),
    }
    expected = trained_by[preset.stem.partition("_")[0]]
    assert (model.config.objective, model.config.prediction_type) == expected


def test_what_was_resolved_repeats_the_run(script, tmp_path, store):
    """As a preset: an empty list and a number that begins with a minus come back as they were."""
    script.main(flags(tmp_path, "--sigma_mean=-1e-05", latents_dir=store, validation_steps=0))
    preset = tmp_path / "run" / "resolved_arguments.yaml"
    script.main([str(preset), "--output_dir", str(tmp_path / "again")])
    again = (tmp_path / "again" / "resolved_arguments.yaml").read_text()
    assert "sigma_mean: -1.0e-05" in again and "config_overrides: []" in again
    one, other = (DiffusionPipeline.from_pretrained(tmp_path / name).transformer for name in ("run", "again"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_name_may_be_given_other_constructor_arguments(script, tmp_path, store):
    options = {"config_overrides": "qk_norm=true", "class_dropout_prob": 0.25, "validation_steps": 0}
    script.main(flags(tmp_path, latents_dir=store, **options))
    config = json.loads((tmp_path / "run" / "transformer" / "config.json").read_text())
    assert config["qk_norm"] is True and config["class_dropout_prob"] == 0.25
    with pytest.raises(ValueError, match="takes no --config_overrides"):
        script.main(flags(tmp_path, latents_dir=store, model=tmp_path / "run", **options))
