"""eqvae diagnose: every sickness is recognised where it was brought about, and nothing is found in a healthy run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from diffusers_eqvae.commands import diagnose as command
from diffusers_eqvae.training_utils.diagnosis import RULES, Curves, diagnose, read_curves

from ..invariants.trajectories import ROOT, as_flags, run_script

SCRIPT = ROOT / "training" / "train_autoencoder.py"
STEPS = 400
# Curves of a run in which all is well: at share t of the run.
HEALTHY = {
    "loss/nll": lambda t: 100 - 20 * t,
    "loss/reconstruction": lambda t: 60 - 10 * t,
    "loss/discriminator": lambda t: 0.6,
    "logits/real": lambda t: 0.5,
    "logits/fake": lambda t: -0.4,
    "adversarial_weight": lambda t: 3.0,
    "learning_rate": lambda t: 1e-4,
    "gradient_norm/objective": lambda t: 2.0,
    "gradient_norm/discriminator": lambda t: 1.0,
    "ema_distance/objective": lambda t: 0.1 + t,
    "nonfinite_steps": lambda t: 0.0,
    "latent_std/0": lambda t: 1.0,
    "latent_std/1": lambda t: 0.3,
    "codebook/dead": lambda t: 3.0,
    "codebook/perplexity": lambda t: 500.0,
    "validation/latent_std": lambda t: 1.0 + 0.1 * t,
    "validation/psnr": lambda t: 24 - 8 * t * (1 - t),
    "validation/colour_shift": lambda t: 0.01,
    "validation/sharpness": lambda t: 0.8 - 0.1 * t,
    "validation/grid": lambda t: 0.02,
    "validation/equivariance_rotation_centred": lambda t: 1 - 0.5 * t,
    "validation/equivariance_scale_centred": lambda t: 0.8 - 0.4 * t,
}
ARGUMENTS = {
    "pretrained_model_name_or_path": "vae",
    "regularizers": ["equivariance"],
    "disc_start": 0,
    "disc_weight": 0.5,
    "adaptive_disc_weight": True,
    "ema_decay": 0.95,
    "use_ema": True,
    "max_train_steps": STEPS,
}
# Symptom -> what is changed of the healthy run, and of its arguments.
SICK = {
    "collapse": ({"latent_std/0": lambda t: (1 - t) ** 2, "latent_std/1": lambda t: 0.3 * (1 - t) ** 2}, {}),
    "collapse of a channel": ({"latent_std/1": lambda t: 0.3 * (1 - t) ** 4}, {}),
    "std drift": ({"validation/latent_std": lambda t: 1.0 + 2 * t}, {}),
    "colour shift": ({"validation/colour_shift": lambda t: 0.01 + 0.1 * t}, {}),
    "blur": ({"validation/sharpness": lambda t: 0.8 - 0.5 * t}, {}),
    "grid": ({"validation/grid": lambda t: 0.02 + 0.3 * t}, {}),
    "discriminator too strong": (
        {
            "loss/discriminator": lambda t: 0.5 * (1 - t) ** 3,
            "logits/real": lambda t: 4 * t,
            "logits/fake": lambda t: -4 * t,
        },
        {},
    ),
    "discriminator too strong, weight": ({"adversarial_weight": lambda t: 5000.0}, {}),
    "discriminator too weak": (
        {"loss/discriminator": lambda t: 1.0, "logits/real": lambda t: 0.01, "logits/fake": lambda t: 0.0},
        {},
    ),
    "discriminator too weak, fooled": (
        {"loss/discriminator": lambda t: 1.1, "logits/real": lambda t: 0.1, "logits/fake": lambda t: 0.3},
        {},
    ),
    "dead codes": ({"codebook/dead": lambda t: 1000 * t, "codebook/perplexity": lambda t: 500 - 480 * t}, {}),
    "weights that do not move": ({"learning_rate": lambda t: 0.0}, {}),
    "weights that do not move, frozen": ({"gradient_norm/objective": lambda t: 0.0}, {}),
    "weights that do not move, still": ({"ema_distance/objective": lambda t: 0.0}, {}),
    "skipped steps": ({"nonfinite_steps": lambda t: 40 * t}, {}),
    "divergence": ({"loss/nll": lambda t: 100 - 50 * t + 600 * max(0.0, t - 0.6)}, {}),
    "moving average too slow": ({}, {"ema_decay": 0.9999}),
    "overfitting": ({"validation/psnr": lambda t: 20 + 20 * t if t < 0.4 else 28 - 4 * (t - 0.4)}, {}),
    "equivariance not learned": ({"validation/equivariance_scale_centred": lambda t: 0.8}, {}),
}


def records(curves: dict) -> list[dict]:
    """Lines as a run writes them: training every 10 steps, validation every 40 and at the start."""
    lines = []
    for step in range(0, STEPS + 1, 10):
        training = {name: curve(step / STEPS) for name, curve in curves.items() if not name.startswith("validation/")}
        validation = {name: curve(step / STEPS) for name, curve in curves.items() if name.startswith("validation/")}
        lines += [{"step": step, **validation}] if step % 40 == 0 else []
        lines += [{"step": step, **training}] if step else []
    return lines


def found(curves: dict, arguments: dict) -> list[str]:
    return [finding.symptom for finding in diagnose(Curves(records(curves), arguments))[0]]


def test_a_healthy_run_has_nothing():
    findings, unseen = diagnose(Curves(records(HEALTHY), ARGUMENTS))
    assert findings == [] and unseen == []


@pytest.mark.parametrize("sickness", SICK)
def test_a_sickness_is_recognised_and_no_other(sickness):
    changed, arguments = SICK[sickness]
    symptom = sickness.partition(",")[0].partition(" of a channel")[0]
    assert found(HEALTHY | changed, ARGUMENTS | arguments) == [symptom]


def test_every_rule_has_a_case_and_every_remedy_an_option_or_a_command():
    assert {name.partition(",")[0].partition(" of a channel")[0] for name in SICK} == {rule.symptom for rule in RULES}
    assert all("--" in rule.remedy or "eqvae" in rule.remedy for rule in RULES)


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_run_that_has_hardly_begun_is_not_sick(cut):
    assert diagnose(Curves(records(HEALTHY)[:cut], ARGUMENTS))[0] == []


def test_what_starts_low_or_changes_by_design_is_not_sick():
    """New weights, whose latents grow; no equivariance asked for; a young discriminator; a tint that goes."""
    scratch = {"pretrained_model_name_or_path": None, "regularizers": ["none"], "disc_start": 390}
    changed = {
        "validation/latent_std": lambda t: 0.2 + t,
        "validation/equivariance_scale_centred": lambda t: 0.8 + t,
        "loss/discriminator": lambda t: 1.0,
        "logits/real": lambda t: 0.0,
        "logits/fake": lambda t: 0.0,
        "validation/colour_shift": lambda t: 0.2 - 0.14 * t,
    }
    assert found(HEALTHY | changed, ARGUMENTS | scratch) == []


def write_run(folder: Path, curves: dict, arguments: dict) -> Path:
    folder.mkdir()
    lines = "".join(json.dumps(record) + "\n" for record in records(curves))
    (folder / "metrics.jsonl").write_text(lines + '{"step": 410, "lo')
    (folder / "resolved_arguments.yaml").write_text(yaml.safe_dump(arguments))
    return folder


def test_the_command_says_symptom_evidence_remedy_and_what_it_could_not_see(tmp_path, capsys):
    curves = {name: curve for name, curve in HEALTHY.items() if not name.startswith("codebook")}
    run = write_run(tmp_path / "sick", curves | SICK["colour shift"][0], ARGUMENTS)
    assert command.main([str(run)]) == 1
    said = capsys.readouterr().out
    assert "400 steps, 13 sicknesses looked for, 1 found" in said
    assert "colour shift\n  evidence: reconstructions are off by 14.0 of 255 levels" in said
    assert "remedy: Lower --disc_weight" in said and "Not looked for, since the logs do not say: dead codes." in said
    assert command.main([str(write_run(tmp_path / "well", curves, ARGUMENTS))]) == 0
    assert "0 found" in capsys.readouterr().out


def test_a_directory_without_logs_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no metrics\.jsonl, which a training run writes; name the directory"):
        command.main([str(tmp_path)])
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="the run has logged nothing yet"):
        command.main([str(tmp_path)])


def drawn(kind: str, rng: np.random.Generator) -> Image.Image:
    """An image that shows a sickness, or cures of it: coarse colours, noise, one colour, or that with a pattern."""
    side = {"noise": 40, "coarse": 4, "very coarse": 2}.get(kind, 1)
    colours = rng.integers(60, 190, (side, side, 3)) if side == 1 else rng.integers(0, 256, (side, side, 3))
    pixels = 40 if kind in ("coarse", "noise") else 16
    image = Image.fromarray(colours.astype(np.uint8)).resize((pixels, pixels), Image.Resampling.BICUBIC)
    if kind == "red":
        return Image.new("RGB", (40, 40), (250, 20, 20))
    if kind == "striped":  # as wide as a latent cell
        stripes = np.array([60, 0, -60, 0] * 4)[:, None, None]
        image = Image.fromarray((np.asarray(image) + stripes).astype(np.uint8))
    return image


@pytest.fixture
def trained(tmp_path, tiny_autoencoder_kl):
    """Trains a tiny autoencoder on some images with some options, and gives the symptoms of the run."""

    def run(kind: str = "coarse", validated: str | None = None, count: int = 6, vae=None, **options) -> dict[str, str]:
        rng = np.random.default_rng(0)
        folders = {"images": (kind, count)} | ({"validation": (validated, 6)} if validated else {})
        for folder, (what, number) in folders.items():
            (tmp_path / folder).mkdir()
            for each in range(number):
                drawn(what, rng).save(tmp_path / f"{folder}/{each}.png")
        (vae or tiny_autoencoder_kl).save_pretrained(tmp_path / "vae")
        defaults = {
            "pretrained_model_name_or_path": tmp_path / "vae",
            "train_data_dir": tmp_path / "images",
            "output_dir": tmp_path / "run",
            "regularizers": "none",
            "resolution": 16,
            "reduction": "mean",
            "perceptual_weight": 0,
            "disc_weight": 0,
            "train_batch_size": 2,
            "max_train_steps": 24,
            "learning_rate": 2e-3,
            "ema_decay": 0.5,
            "report_to": "none",
            "logging_steps": 2,
            "validation_steps": 6,
            "checkpointing_steps": 0,
            "num_validation_images": 4 if count >= 4 else 6,
            "num_normalization_images": 4,
            "cache_dir": tmp_path / "cache",
        }
        if validated:
            defaults["validation_data_dir"] = tmp_path / "validation"
        run_script(SCRIPT, as_flags({**defaults, **options}))
        return {each.symptom: each.evidence for each in diagnose(read_curves(tmp_path / "run"))[0]}

    return run


def test_a_real_run_that_is_well(trained):
    assert trained() == {}


@pytest.mark.slow
def test_a_real_run_whose_latents_collapse(trained):
    """The explicit penalty brings it about, as its paper says."""
    options = {"regularizers": "explicit", "explicit_weight": 1e5, "explicit_smallest_std": 0, "learning_rate": 5e-3}
    found = trained(**options, max_train_steps=120, logging_steps=1, validation_steps=0)
    assert "fell from" in found["collapse"]


def test_a_real_run_whose_weights_do_not_move(trained):
    assert trained(learning_rate=0)["weights that do not move"] == "learning_rate is 0 in every step"


def test_a_real_run_whose_average_is_too_slow(trained):
    told = trained(ema_decay=0.9999)["moving average too slow"]
    assert told.startswith("with ema_decay 0.9999, 100% of the average after 24 steps")


def test_a_real_run_that_blurs(trained):
    """Noise of single pixels does not fit into the latents, and a distance in pixels alone asks for its mean."""
    found = trained("noise")
    assert list(found) == ["blur"] and "reconstructions hold 1" in found["blur"]


def test_a_real_run_that_draws_a_grid(trained):
    """Learned from stripes as wide as a latent cell, and drawn into images that have none."""
    options = {"center_crop": True, "max_train_steps": 60, "validation_steps": 20, "learning_rate": 5e-3}
    found = trained("striped", "plain", **options)
    assert list(found) == ["grid"] and "of the error's variance repeats in every latent cell" in found["grid"]


@pytest.mark.slow
def test_a_real_run_that_shifts_colours(trained):
    assert "of 255 levels" in trained("red", "coarse", max_train_steps=40, validation_steps=10)["colour shift"]


@pytest.mark.slow
def test_a_real_run_whose_latents_grow(trained):
    found = trained(max_train_steps=80, learning_rate=1e-2, validation_steps=20)
    assert "the standard deviation of the latents went from" in found["std drift"] and "collapse" not in found


# The discriminator of a few steps.
GAME = {"disc_weight": 0.5, "disc_num_layers": 1, "disc_channels": 8, "disc_norm": "group", "validation_steps": 0}


@pytest.mark.slow
def test_a_real_run_whose_discriminator_wins(trained):
    found = trained(**GAME, disc_learning_rate=1e-2, learning_rate=1e-6, max_train_steps=60)
    assert list(found) == ["discriminator too strong"] and "of real and -" in found["discriminator too strong"]


@pytest.mark.slow
def test_a_real_run_whose_discriminator_knows_nothing(trained):
    """It does not learn, so that the autoencoder soon fools it: fakes are called more real than the images."""
    found = trained(**GAME, disc_learning_rate=0, max_train_steps=220, logging_steps=10)
    assert "does not tell real" in found["discriminator too weak"]


@pytest.mark.slow
def test_a_real_run_whose_codes_die(trained, tiny_vq_model):
    """Latents that all fall to one vector; the others have gone unused for a hundred steps."""
    found = trained(vae=tiny_vq_model, max_train_steps=120, validation_steps=0, logging_steps=10)
    assert "vectors have gone unused" in found["dead codes"]


@pytest.mark.slow
def test_a_real_run_that_overfits(trained):
    """Two images, and others to validate on."""
    options = {"learning_rate": 3e-4, "max_train_steps": 160, "validation_steps": 8, "logging_steps": 8}
    found = trained("very coarse", "very coarse", count=2, center_crop=True, **options)
    assert list(found) == ["overfitting"] and "validation/psnr fell from" in found["overfitting"]


@pytest.mark.parametrize("line", ["[1]", "7", '{"step": "a", "loss": 1}', '{"step": 1, "loss": "b"}', '{"step": [1]}'])
def test_lines_that_no_run_writes_are_named(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"Line 2 of .*metrics\.jsonl is not a training run's"):
        read_curves(tmp_path)


def test_what_is_not_text_and_options_without_names_are_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl is empty"):
        read_curves(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (tmp_path / "resolved_arguments.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="does not hold options by name"):
        read_curves(tmp_path)
