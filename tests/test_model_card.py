"""A model card shows what the run's metadata holds, warns where it must, and invents nothing."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import yaml
from huggingface_hub import ModelCard

from diffusers_eqvae.hub import prepare_push, push_run
from diffusers_eqvae.model_card import METADATA_FILE, RunMetadata, redact, render_model_card, stated_license

METADATA = RunMetadata(
    model={
        "base_model": "stabilityai/sd-vae-ft-mse",
        "license": "mit",
        "latent_space_changed": True,
        "normalization": {"mean": [0.25, -1.0], "std": [1.0, 2.0], "scaling_factor": 0.5, "num_samples": 4321},
    },
    training={
        "optimizer_steps": 500,
        "learning_rate": 1e-4,
        "losses": {"l1": 1.0, "lpips": 0.5, "kl": 1e-6},
        "regularizers": {"equivariance": {"p_equivariance": 0.5, "p_low_resolution": 0.25, "rotation": True}},
        "seed": 7,
    },
    data={"dataset": "someone/images", "resolution_px": 256},
    evaluation={
        "metrics": [{"name": "R | 90", "value": 0.1234567, "how": "24 images\nof 256 px"}],
        "images": [{"path": "a image.png", "caption": "before and after"}],
    },
    provenance={"versions": {"torch": "2.6.0"}, "command": "accelerate launch training/train_autoencoder.py"},
)


def test_everything_known_is_on_the_card():
    files = ["config.json", "discriminator/config.json"]
    card = render_model_card(METADATA, "autoencoder", repo_id="me/eq-vae", files=files)
    for text in (
        "# eq-vae",
        "someone/images",
        "| resolution px | 256 |",
        "| optimizer steps | 500 |",
        "l1 1, lpips 0.5, kl 1e-06",
        "| equivariance (p_equivariance 0.5, p_low_resolution 0.25, rotation True) |",
        "with the regularizers equivariance on [someone/images]",
        "(z - mean) * scaling_factor / std",
        "measured on 4321 images",
        "| mean | 0.25, -1 |",
        "| R \\| 90 | 0.123457 | 24 images of 256 px |",
        "![before and after](a%20image.png)",
        "`discriminator/config.json`: the discriminator",
        "torch 2.6.0",
        "| seed | 7 |",
        "accelerate launch training/train_autoencoder.py",
    ):
        assert text in card, text
    metadata = ModelCard(card).data.to_dict()
    assert metadata["license"] == "mit"
    assert metadata["base_model"] == "stabilityai/sd-vae-ft-mse"
    assert metadata["datasets"] == ["someone/images"]
    assert metadata["library_name"] == "diffusers"
    assert "diffusers_eqvae" in metadata["tags"]


@pytest.mark.parametrize("kind", ["autoencoder", "pipeline"])
def test_without_metadata_nothing_is_claimed(kind):
    card = render_model_card(RunMetadata(), kind)
    for absent in ("## Training", "## Metrics", "## Images", "## Normalisation", "## Files", "Made with", "None"):
        assert absent not in card
    assert set(yaml.safe_load(card.split("---\n")[1])) == {"library_name", "pipeline_tag", "tags"}
    assert "\n\n\n" not in card


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: research-only\n---\n", "research-only"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\ntags: [vae]\n---\nlicense: mit\n", None),
        ("# no header, license: mit\n", None),
        ("---\nlicense: [\n---\n", None),
        (None, None),
    ],
)
def test_a_licence_is_what_the_header_of_the_readme_states(tmp_path, readme, expected):
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    assert stated_license(str(tmp_path)) == expected
    assert stated_license(str(tmp_path / "nowhere")) is None


def test_a_run_hands_the_licence_of_its_base_on_unless_it_has_its_own(tmp_path):
    RunMetadata(model={"base_license": "mit"}).save(tmp_path / METADATA_FILE)
    assert stated_license(str(tmp_path)) == "mit"
    RunMetadata(model={"base_license": "mit", "license": "cc-by-4.0"}).save(tmp_path / METADATA_FILE)
    assert stated_license(str(tmp_path)) == "cc-by-4.0"
    (tmp_path / METADATA_FILE).write_text("{}")
    assert stated_license(str(tmp_path)) is None


def test_an_unknown_licence_and_two_that_cannot_be_compared_are_said():
    model = {"base_model": "a/b", "measured_compatibility": {"num_images": 2, "refused": "NEW has 8 latent channels."}}
    card = render_model_card(RunMetadata(model=model), "autoencoder")
    assert "Unknown: [a/b](https://huggingface.co/a/b) states none that was found" in card
    assert "NEW has 8 latent channels." in card and "| verdict |" not in card
    assert "license" not in yaml.safe_load(card.split("---\n")[1]), "the base's is not this model's"


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ({"base_model": "a/b", "latent_space_changed": True}, "The latent space changed"),
        ({"base_model": "a/b"}, "may have changed"),
        ({"base_model": "a/b", "compatibility": "adapt"}, "not a\n> drop-in replacement"),
        ({"base_model": "a/b", "compatibility": "decoder-only"}, "decoder only"),
        ({"base_model": "a/b", "compatibility": "drop-in"}, "work with\n> this autoencoder unchanged"),
        ({}, "names no base model"),
        ({"padding_mode": "reflect"}, "`padding_mode=reflect`, which plain diffusers does not know"),
        ({"padding_mode": "zeros"}, "With plain diffusers"),
    ],
)
def test_warnings(model, text):
    card = render_model_card(RunMetadata(model=model), "autoencoder")
    assert text in card
    assert ("With plain diffusers" in card) == (model.get("padding_mode") != "reflect")


@pytest.mark.parametrize(
    ("model_class", "stock", "ours"),
    [
        (None, "AutoencoderKL", "AutoencoderKLEQ"),
        ("AutoencoderKL", "AutoencoderKL", "AutoencoderKLEQ"),
        ("AutoencoderKLEQ", "AutoencoderKL", "AutoencoderKLEQ"),
        ("AutoencoderTiny", "AutoencoderTiny", None),
    ],
)
def test_the_examples_name_classes_that_load_it(model_class, stock, ours):
    card = render_model_card(RunMetadata(model={"class": model_class}), "autoencoder")
    assert f"from diffusers import {stock}\n" in card
    assert ("from diffusers_eqvae import" in card) == (ours is not None)
    assert ours is None or f"from diffusers_eqvae import {ours}\n" in card


def test_the_pipeline_card_calls_with_its_labels_and_settings():
    labels = [f"name{i}" for i in range(12)]
    model = {"num_classes": 12, "labels": labels, "sampling": {"guidance_interval": (0.0, 0.75)}}
    card = render_model_card(RunMetadata(model=model), "pipeline", repo_id="me/sit")
    assert 'pipeline(class_labels=["name0"], guidance_interval=(0.0, 0.75))' in card
    assert "ids from 0 to 11, or names: `name0`" in card
    assert "`name9`, ..." in card
    assert "`name10`" not in card


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"model": {"clas": "AutoencoderKL"}}, "model of RunMetadata may hold name, class.*; got clas"),
        ({"model": {"compatibility": "maybe"}}, "compatibility must be one of.*got 'maybe'"),
        ({"model": {"compatibility": "drop-in", "latent_space_changed": True}}, "compatibility='adapt'"),
        ({"evaluation": {"metrics": [{"name": "PSNR", "value": 3.0}]}}, "Each of metrics needs how, name, value"),
        ({"evaluation": {"images": [{"caption": "x"}]}}, "Each of images needs path"),
    ],
)
def test_wrong_metadata_is_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        RunMetadata(**groups)


def test_metadata_is_written_for_publication(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-shape")
    provenance = {"command": "x --a hf_abcdefghijk --b a-token-of-another-shape"}
    replace(METADATA, data={"dataset": str(tmp_path)}, provenance=provenance).save(tmp_path / METADATA_FILE)
    assert [path.name for path in tmp_path.iterdir()] == [METADATA_FILE]
    read = RunMetadata.load(tmp_path / METADATA_FILE)
    assert asdict(read) == asdict(METADATA) | {
        "data": {"dataset": tmp_path.name},
        "provenance": {"command": "x --a [token] --b [token]"},
    }
    assert "datasets" not in ModelCard(render_model_card(read, "autoencoder")).data.to_dict()
    assert redact("nothing here") == "nothing here"


@pytest.mark.parametrize(
    ("version", "remedy"), [(2, "update diffusers_eqvae"), (0, "remove the file"), (None, "remove")]
)
def test_another_format_is_refused_with_a_remedy(version, remedy, tmp_path):
    METADATA.save(tmp_path / METADATA_FILE)
    content = json.loads((tmp_path / METADATA_FILE).read_text()) | {"format_version": version}
    if version is None:
        del content["format_version"]
    (tmp_path / METADATA_FILE).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"format_version {version}, .* than 1.*: {remedy}"):
        RunMetadata.load(tmp_path / METADATA_FILE)


def test_a_run_is_described_by_what_its_model_says(tmp_path, tiny_autoencoder_kl, caplog):
    """The statistics are often measured after training, so the config wins over run_metadata.json."""
    from diffusers_eqvae.latents import LatentNormalization

    run = tmp_path / "run"
    LatentNormalization(mean=(5.0,) * 4, std=(2.0,) * 4).apply_to(tiny_autoencoder_kl)
    tiny_autoencoder_kl.save_pretrained(run)
    images = [{"path": "missing.png"}]
    replace(METADATA, evaluation={"images": images}).save(run / METADATA_FILE)
    files, card = prepare_push(run, "me/x", license="apache-2.0")
    assert files == ["README.md", "config.json", "diffusion_pytorch_model.safetensors", METADATA_FILE]
    assert "| mean | 5, 5, 5, 5 |" in card
    assert "4321" not in card
    assert "license: apache-2.0" in card
    assert "## Images" not in card
    assert "missing.png" in caplog.text

    LatentNormalization(mean=(5.0,) * 4, std=(2.0,) * 4).save_json(run / "mean_std.json", num_samples=99)
    assert "measured on 99 images" in prepare_push(run)[1]
    LatentNormalization(mean=(6.0,) * 4, std=(2.0,) * 4).save_json(run / "mean_std.json", num_samples=99)
    assert "measured on" not in prepare_push(run)[1]


def test_an_incomplete_pipeline_is_refused(tmp_path, caplog):
    (tmp_path / "model_index.json").write_text('{"_class_name": "X", "vae": ["diffusers", "AutoencoderKL"]}')
    assert push_run(tmp_path, "me/x") is False
    assert "lacks the folders vae" in caplog.text


def test_a_wheel_carries_the_templates(repository, tmp_path):
    build = ["setup.py", "-q", "build", "--build-base", str(tmp_path / "build")]
    subprocess.run([sys.executable, *build], cwd=repository, check=True, capture_output=True)
    built = tmp_path / "build/lib/diffusers_eqvae/model_cards"
    templates = sorted((repository / "model_cards").iterdir())
    assert {"autoencoder.md", "health_card.html", "page.html"} <= {template.name for template in templates}
    for template in templates:
        assert (built / template.name).read_text() == template.read_text()
