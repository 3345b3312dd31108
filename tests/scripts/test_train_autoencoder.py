"""train_autoencoder.py: what it makes from its command line, and what it refuses at once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from diffusers_eqvae.autoencoders import load_autoencoder
from diffusers_eqvae.data.image_datasets import PixelDataset, load_image_dataset
from diffusers_eqvae.data.latent_store import LatentStore
from diffusers_eqvae.hub import prepare_push
from diffusers_eqvae.inspection.compatibility import compatibility
from diffusers_eqvae.inspection.run import load_images
from diffusers_eqvae.latents import LatentNormalization
from diffusers_eqvae.model_card import RunMetadata
from diffusers_eqvae.models.alignment_network import AlignmentNetwork
from diffusers_eqvae.models.discriminator import PatchDiscriminator
from diffusers_eqvae.training_utils.autoencoder import save
from diffusers_eqvae.training_utils.next_steps import NEXT

from ..faults.test_autoencoder_classes import tiny
from ..invariants.trajectories import ROOT, as_flags, assert_equal, last_checkpoint, run_script

SCRIPT = ROOT / "training" / "train_autoencoder.py"


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(6):
        smooth = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(smooth).resize((40, 40), Image.Resampling.BICUBIC).save(tmp_path / f"images/{number}.png")
    return tmp_path


def flags(folder, vae, **options) -> list[str]:
    defaults = {
        "pretrained_model_name_or_path": folder / "vae",
        "train_data_dir": folder / "images",
        "output_dir": folder / "run",
        "resolution": 32,
        "perceptual_weight": 0,
        "disc_weight": 0,
        "train_batch_size": 2,
        "max_train_steps": 2,
        "learning_rate": 1e-3,
        "report_to": "none",
        "logging_steps": 1,
        "num_validation_images": 2,
        "num_normalization_images": 4,
        "cache_dir": folder / "cache",
    }
    vae.save_pretrained(folder / "vae")
    return as_flags({**defaults, **options})


def test_fine_tuned_model_loads_with_plain_diffusers(folder, tiny_autoencoder_kl):
    arguments = flags(folder, tiny_autoencoder_kl, validation_steps=1, keep_best="psnr_rotated_latent")
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    trained = AutoencoderKL.from_pretrained(folder / "run", latents_mean=None, latents_std=None)
    moved = [
        not torch.equal(a, b) for a, b in zip(trained.parameters(), tiny_autoencoder_kl.parameters(), strict=True)
    ]
    assert all(moved)
    metadata = RunMetadata.load(folder / "run" / "run_metadata.json")
    assert metadata.training["regularizers"]["equivariance"]["p_equivariance"] == 0.5
    names = {metric["name"] for metric in metadata.evaluation["metrics"]}
    assert names >= {"psnr", "equivariance_rotation", "equivariance_scale"}
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("validation/psnr" in record for record in records)
    turned = {record["step"]: record.get("validation/psnr_rotated_latent", -1) for record in records}
    best = max((1, 2), key=lambda step: turned[step])
    assert (folder / "run" / "checkpoints" / f"step-{best:08d}" / "objective.pt").is_file()
    assert f"The best psnr_rotated_latent is {turned[best]:.6g}, after step {best}: eqvae export" in done.stderr
    assert list((folder / "run" / "validation").glob("*_comparison.png"))

    (image,) = metadata.evaluation["images"]
    assert image["path"] == "validation/00000002_comparison.png" and image["private"]
    assert all("before" in metric for metric in metadata.evaluation["metrics"])
    files, card = prepare_push(folder / "run", "me/eq-vae", hub_images="validation")
    assert image["path"] in files and image["path"] not in prepare_push(folder / "run", "me/eq-vae")[0]
    for text in (
        "before training",
        "[EQ-VAE](https://arxiv.org/abs/2502.09509)",
        "pip install",
        "pipeline_tag: image",
    ):
        assert text in card, text
    assert str(folder) not in card


@pytest.mark.parametrize("trainable", ["full", "decoder"])
def test_the_card_says_what_fits_the_base_models_generators_and_its_licence(folder, tiny_autoencoder_kl, trainable):
    words = flags(folder, tiny_autoencoder_kl, trainable=trainable, num_validation_images=6, learning_rate=0.2)
    (folder / "vae/README.md").write_text("---\nlicense: other\nlicense_name: research-only\n---\n# A model\n")
    run_script(SCRIPT, words)
    model = RunMetadata.load(folder / "run/run_metadata.json").model
    assert model["base_license"] == "research-only"
    measured, images = model["measured_compatibility"], load_images(folder / "images", resolution=32, num_images=6)
    new, base = (load_autoencoder(str(folder / name)) for name in ("run", "vae"))
    expected = compatibility(new, base, images)
    assert (measured["num_images"], measured["resolution_px"], measured["verdict"]) == (6, 32, expected.verdict)
    assert measured["relative_distance"] == pytest.approx(expected.distance, rel=1e-3, abs=1e-6)
    assert measured["psnr"] == pytest.approx(expected.psnr, abs=1e-2)
    assert (measured["verdict"] == "drop-in") == (trainable == "decoder")
    _, card = prepare_push(folder / "run", "me/eq-vae")
    assert f"| verdict | **{measured['verdict']}** |" in card and "vae` is under the licence `research-only`" in card
    assert f"| next | {NEXT[measured['verdict']][:20]}" in card


def test_a_base_model_that_is_gone_at_the_end_costs_no_run(folder, tiny_autoencoder_kl, monkeypatch):
    def gone(*_, **__):
        raise OSError(f"{folder} is not an autoencoder")

    monkeypatch.setattr(save, "load_autoencoder", gone)
    run_script(SCRIPT, flags(folder, tiny_autoencoder_kl, max_train_steps=1))
    model = RunMetadata.load(folder / "run/run_metadata.json").model
    assert model["measured_compatibility"]["refused"].startswith("It could not be measured when the run ended")
    card = prepare_push(folder / "run", "me/eq-vae")[1]
    assert "It could not be measured when the run ended" in card and str(folder) not in card


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AutoencoderKLFlux2", {}),
        ("AutoencoderKLQwenImage", {}),
        ("AutoencoderRAE", {"tau_scale": "none", "p_low_resolution": 0}),
    ],
)
def test_classes_with_ways_of_their_own_are_trained_and_encoded(folder, name, options):
    vae = tiny(name)
    common = {"resolution": 16, "validation_steps": 1, "output_dir": folder / "run"}
    run_script(SCRIPT, flags(folder, vae, **common, **options))
    trained = type(vae).from_pretrained(folder / "run")
    before = dict(vae.named_parameters())
    moved = {key for key, weight in trained.named_parameters() if not torch.equal(weight, before[key])}
    assert {key.split(".")[0] for key in moved} >= ({"decoder"} if "RAE" in name else {"encoder", "decoder"})
    figures = {metric["name"] for metric in RunMetadata.load(folder / "run/run_metadata.json").evaluation["metrics"]}
    assert "equivariance_rotation" in figures and ("equivariance_scale" in figures) == ("RAE" not in name)
    assert f"vae = {name}.from_pretrained" in prepare_push(folder / "run", "me/eq-vae")[1]
    words = {"vae": folder / "run", "train_data_dir": folder / "images", "resolution": 16, "dtype": "fp32"}
    words |= {"output_dir": folder / "latents", "batch_size": 2, "normalization": "config"}
    run_script(SCRIPT.with_name("encode_latents.py"), as_flags(words))
    store, stored = LatentStore(folder / "latents"), load_autoencoder(str(folder / "latents/vae"))
    normalization = LatentNormalization.from_vae(stored)
    assert normalization == LatentNormalization.from_vae(load_autoencoder(str(folder / "run")))
    measured = LatentNormalization.from_statistics(store.statistics())
    if "RAE" not in name:  # which keeps its latents, and so what normalises them
        for values, others in zip(normalization.mean_and_std, measured.mean_and_std, strict=True):
            torch.testing.assert_close(torch.tensor(values), torch.tensor(others), rtol=0.3, atol=0.1)


def test_deterministic_autoencoder_and_no_regularizer(folder, tiny_autoencoder_tiny):
    options = {"regularizers": "none", "validation_steps": 0, "normalization": "channel"}
    run_script(SCRIPT, flags(folder, tiny_autoencoder_tiny, **options))
    trained = AutoencoderTiny.from_pretrained(folder / "run")
    assert len(trained.config.latents_mean) == 4


@pytest.mark.filterwarnings("ignore:.*weights.*")
def test_both_regularizers_on_one_autoencoder(folder, tiny_autoencoder_kl):
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder / "dino")
    options = {
        "regularizers": ["equivariance", "alignment"],
        "alignment_teacher": folder / "dino",
        "alignment_image_size": 56,
        "alignment_hidden_size": 16,
        "validation_steps": 0,
        "checkpointing_steps": 1,
    }
    run_script(SCRIPT, flags(folder, tiny_autoencoder_kl, **options))
    network = AlignmentNetwork.from_pretrained(folder / "run", subfolder="alignment_network")
    assert (network.config.feature_size, network.config.teacher_image_size) == (16, 56)
    assert json.loads((folder / "run" / "config.json").read_text())["_class_name"] == "AutoencoderKL"
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["alignment_weight"] > 0
    assert not any("teacher" in name for name in last_checkpoint(folder / "run", "objective")["module"])

    options |= {"output_dir": folder / "again", "learning_rate": 0, "max_train_steps": 1}
    options |= {"pretrained_model_name_or_path": folder / "run"}
    run_script(SCRIPT, flags(folder, tiny_autoencoder_kl, **options))
    continued = AlignmentNetwork.from_pretrained(folder / "again", subfolder="alignment_network")
    assert all(map(torch.equal, continued.state_dict().values(), network.state_dict().values()))


def test_the_discriminator_is_trained(folder, tiny_autoencoder_kl):
    options = {"disc_weight": 0.5, "disc_start": 1, "disc_channels": 8, "disc_num_layers": 1}
    options |= {"max_train_steps": 3, "checkpointing_steps": 1, "checkpoints_total_limit": 3, "validation_steps": 0}
    run_script(SCRIPT, flags(folder, tiny_autoencoder_kl, **options))
    saved = folder / "run" / "checkpoints"
    first, second, third = (
        torch.load(saved / f"step-{step:08d}" / "discriminator.pt", weights_only=True)["module"] for step in (1, 2, 3)
    )
    learned = [name for name in first if name.endswith((".weight", ".bias"))]
    assert all(torch.isfinite(third[name]).all() for name in learned)
    assert sum(not torch.equal(first[name], second[name]) for name in learned) > len(learned) // 2
    assert sum(not torch.equal(second[name], third[name]) for name in learned) > len(learned) // 2
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(record.get("loss/discriminator", 0) > 0 for record in records)


def test_the_optimizer_and_the_discriminators_rate_are_chosen(folder, tiny_autoencoder_kl):
    options = {"optimizer": "adamw", "adam_beta1": 0.8, "adam_epsilon": 1e-6, "adam_weight_decay": 0.5}
    options |= {"disc_weight": 0.5, "disc_channels": 8, "disc_num_layers": 1, "disc_learning_rate": 0}
    options |= {"max_train_steps": 1, "validation_steps": 0, "ema_decay": 0.5}
    run_script(SCRIPT, flags(folder, tiny_autoencoder_kl, **options))
    states = {name: last_checkpoint(folder / "run", name) for name in ("objective", "discriminator")}
    rates = {"objective": 1e-3, "discriminator": 0.0}
    for name, state in states.items():
        (group,) = state["optimizer"]["param_groups"]
        assert tuple(group["betas"]) == (0.8, 0.9) and (group["eps"], group["weight_decay"]) == (1e-6, 0.5)
        assert group["lr"] == rates[name] and group.get("decoupled_weight_decay", True)
        assert state["optimizer"]["state"]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
def test_muon_trains_the_matrices_and_adamw_kernels_and_discriminator(folder, tiny_autoencoder_kl):
    options = {"optimizer": "muon", "disc_weight": 0.5, "disc_channels": 8, "disc_num_layers": 1}
    options |= {"max_train_steps": 2, "checkpointing_steps": 1, "validation_steps": 0, "ema_decay": 0.5}
    arguments = flags(folder, tiny_autoencoder_kl, **options)
    run_script(SCRIPT, arguments)
    whole = {name: last_checkpoint(folder / "run", name) for name in ("objective", "discriminator")}
    matrices, rest = whole["objective"]["optimizer"]["param_groups"]
    assert len(matrices["params"]) == 2 * 4 and "momentum" in matrices  # queries, keys, values, output; two attentions
    assert len(rest["params"]) == len(list(tiny_autoencoder_kl.parameters())) - 8 and "betas" in rest
    (group,) = whole["discriminator"]["optimizer"]["param_groups"]
    assert "betas" in group
    shutil.rmtree(folder / "run" / "checkpoints" / "step-00000002")
    run_script(SCRIPT, [*arguments, "--resume_from_checkpoint", "latest"])
    assert_equal(whole, {name: last_checkpoint(folder / "run", name) for name in whole})
    metadata = RunMetadata.load(folder / "run" / "run_metadata.json")
    assert metadata.training["optimizer"] == "muon"


def test_bf16_run_moves_every_float32_weight(folder, tiny_autoencoder_kl):
    """At lr 4.5e-6 a bfloat16 weight would not move; the masters are float32 and the average follows them."""
    options = {"mixed_precision": "bf16", "learning_rate": 4.5e-6, "max_train_steps": 200, "ema_decay": 0.9}
    options |= {"checkpointing_steps": 200, "validation_steps": 0, "logging_steps": 100, "train_batch_size": 1}
    run_script(SCRIPT, flags(folder, tiny_autoencoder_kl, **options))
    state = last_checkpoint(folder / "run", "objective")
    start = tiny_autoencoder_kl.state_dict()
    for part in ("module", "ema"):
        moved = [state[part][f"model.{name}"] != value for name, value in start.items()]
        share = torch.cat([mask.flatten() for mask in moved]).float().mean()
        assert share > 0.99, f"{part}: {share:.3f} of the weights moved"
        assert all(value.dtype == torch.float32 for value in state[part].values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 30}, "multiple of the autoencoder's stride 4"),
        ({"regularizers": "equivarianse"}, "There is no regularizer .equivarianse."),
        ({"disc_weight": 0.5}, "The discriminator needs images"),
        ({"mixed_precision": "fp16"}, "fp16"),
        ({"model_config": "x.json"}, "exactly one of"),
        ({"train_data_dir": "nowhere"}, "does not exist"),
        ({"p_equivariance": 1.5}, "p_equivariance"),
        ({"adam_weight_decay": 0.1}, "decoupled from the gradient.*give --optimizer adamw, or leave it out"),
        ({"learning_rate": -1}, "learning_rate must not be negative"),
    ],
)
def test_bad_input_is_refused_at_the_start(folder, tiny_autoencoder_kl, options, message):
    with pytest.raises(ValueError, match=message):
        run_script(SCRIPT, flags(folder, tiny_autoencoder_kl, **options))
    assert not (folder / "run" / "config.json").exists()


def test_gradient_checkpointing_of_autoencoder_tiny_is_refused(folder, tiny_autoencoder_tiny):
    with pytest.raises(ValueError, match="AutoencoderTiny"):
        run_script(SCRIPT, flags(folder, tiny_autoencoder_tiny, gradient_checkpointing=True))


VQ = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "num_vq_embeddings": 16,
    "mid_block_add_attention": False,
}


def test_a_vq_model_trains_its_codebook_and_stays_a_stock_one(folder):
    before = VQModel(**VQ)
    torch.nn.init.normal_(before.quantize.embedding.weight)
    options = {"reduction": "mean", "p_equivariance": 1.0, "sample_posterior": "false", "max_train_steps": 3}
    options |= {"disc_weight": 0.8, "disc_num_layers": 1, "disc_channels": 8, "normalization": "config"}
    run_script(SCRIPT, flags(folder, before, **options, padding_mode="zeros"))
    records = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    record = next(record for record in records if "loss/codebook" in record)
    assert 0 < record["codebook/usage"] <= 1 <= record["codebook/perplexity"] <= 16 and record["codebook/dead"] == 0
    assert record["loss/commitment"] == pytest.approx(0.25 * record["loss/codebook"])
    trained = VQModel.from_pretrained(folder / "run")
    moved = (trained.quantize.embedding.weight - before.quantize.embedding.weight).abs().sum(1) > 0
    assert moved.any() and torch.isfinite(trained(torch.zeros(1, 3, 32, 32)).sample).all()
    identity = json.loads((folder / "run" / "run_metadata.json").read_text())["model"]["class"]
    assert identity == "VQModelEQ"


def test_a_new_model_is_of_the_class_that_its_config_says(folder, tiny_autoencoder_kl):
    (folder / "vq.json").write_text(json.dumps({"_class_name": "VQModelEQ", **VQ}))
    words = flags(folder, tiny_autoencoder_kl, model_config=folder / "vq.json")
    place = words.index("--pretrained_model_name_or_path")
    run_script(SCRIPT, words[:place] + words[place + 2 :])
    assert len(VQModel.from_pretrained(folder / "run").quantize.embedding.weight) == 16
    (folder / "vq.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match=r"the class 'UNet2DModel'; a new autoencoder is one of .*VQModel"):
        run_script(SCRIPT, [*words[:place], *words[place + 2 :], "--output_dir", str(folder / "other")])


def autoencoder_of(channels: int) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )


@pytest.mark.parametrize("channels", [1, 4])
def test_images_with_one_channel_or_with_transparency_are_trained_on(folder, channels):
    """To the end: discriminator, validation, statistics, card; then resumed, and encoded."""
    for path in sorted((folder / "images").iterdir())[:3]:
        with Image.open(path) as image:
            image.putalpha(Image.linear_gradient("L").resize(image.size))
            image.save(path)
    adversarial = {"disc_weight": 0.5, "disc_num_layers": 1, "disc_augment": ["color"]}
    words = flags(folder, autoencoder_of(channels), validation_steps=1, **adversarial)
    run_script(SCRIPT, words)
    trained = AutoencoderKL.from_pretrained(folder / "run", latents_mean=None, latents_std=None)
    assert trained.config.in_channels == channels
    assert json.loads((folder / "run/discriminator/config.json").read_text())["in_channels"] == channels
    with Image.open(next((folder / "run/validation").glob("*.png"))) as drawn:
        assert drawn.mode == "RGB"
    store = {"vae": folder / "run", "train_data_dir": folder / "images", "resolution": 32}
    encode = ROOT / "training" / "encode_latents.py"
    run_script(encode, as_flags(store | {"output_dir": folder / "store", "cache_dir": folder / "cache"}))
    row = LatentStore(folder / "store").get_many([0])["moments"][0].float()
    source = load_image_dataset(train_data_dir=folder / "images", channels=channels)
    with torch.no_grad():
        expected = trained.encode(PixelDataset(source, resolution=32)[0]["pixel_values"][None]).latent_dist.parameters
    assert torch.allclose(row, expected[0], atol=0.05)


def test_what_judges_rgb_images_alone_is_refused_beside_others(folder, tiny_autoencoder_kl):
    four = flags(folder, autoencoder_of(4), perceptual_weight=1)
    with pytest.raises(
        ValueError, match=r"LPIPS compares RGB or grey images, and these have 4 .*--perceptual_weight 0"
    ):
        run_script(SCRIPT, four)
    PatchDiscriminator(base_channels=8, num_layers=1).save_pretrained(folder / "judge")
    with pytest.raises(ValueError, match="judges images of 3 channels, and these have 4; leave it out"):
        run_script(SCRIPT, flags(folder, autoencoder_of(4), disc_weight=1, disc_pretrained=folder / "judge"))
    Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    ).save_pretrained(folder / "teacher")
    aligned = {"regularizers": "alignment", "alignment_teacher": folder / "teacher", "alignment_image_size": 28}
    with pytest.raises(ValueError, match=r"teacher of the regularizer alignment sees RGB or grey .* 4 channels"):
        run_script(SCRIPT, flags(folder, autoencoder_of(4), **aligned))
    run_script(SCRIPT, flags(folder, autoencoder_of(1), **aligned))
    assert AlignmentNetwork.from_pretrained(folder / "run", subfolder="alignment_network")
