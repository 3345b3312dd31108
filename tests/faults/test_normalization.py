"""Numbers about latents: what a file states is read in one place, and what is measured decides whether to warn."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from diffusers_eqvae.autoencoders import load_autoencoder
from diffusers_eqvae.classes import ClassTable
from diffusers_eqvae.data.latent_data import CHECKED_IMAGES, LatentData
from diffusers_eqvae.latents import LatentNormalization as Normalization
from diffusers_eqvae.latents import LatentStatistics
from diffusers_eqvae.randomness import StepRandomness
from diffusers_eqvae.stated_normalization import scale_complaint
from diffusers_eqvae.training_utils.autoencoder.arguments import AutoencoderEvaluationArguments
from diffusers_eqvae.training_utils.autoencoder.save import settle_normalization

MEAN, STD = [0.1, -0.2, 0.3, 0.0], [0.9, 1.1, 1.0, 1.2]
CHANNELS = {"latents_mean": MEAN, "latents_std": STD}


def columns(values, *, batch: bool = False):
    nested = [[[value]] for value in values]
    return [nested] if batch else nested


@pytest.fixture
def saved(tmp_path, tiny_autoencoder_kl):
    """Saves the tiny autoencoder with these statements in its config and its mean_std.json."""

    def save(config=None, file=None):
        tiny_autoencoder_kl.save_pretrained(tmp_path / "vae")
        stated = json.loads((tmp_path / "vae" / "config.json").read_text())
        for key in ("scaling_factor", "shift_factor", "latents_mean", "latents_std"):
            stated.pop(key, None)
        (tmp_path / "vae" / "config.json").write_text(json.dumps(stated | (config or {})))
        if file is not None:
            (tmp_path / "vae" / "mean_std.json").write_text(file if isinstance(file, str) else json.dumps(file))
        return str(tmp_path / "vae")

    return save


@pytest.mark.parametrize(
    "shaped",
    [MEAN, tuple(MEAN), columns(MEAN), columns(MEAN, batch=True), np.array(MEAN)],
    ids=["C", "tuple", "(C,1,1)", "(1,C,1,1)", "array"],
)
def test_one_value_per_channel_is_read_in_these_shapes(shaped):
    read = Normalization.from_config({"latents_mean": shaped, "latents_std": STD})
    assert read == Normalization(tuple(MEAN), tuple(STD))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"latents_mean": [MEAN, MEAN], "latents_std": STD}, r"latents_mean must be .*; it has the shape \(2, 4\)"),
        ({"latents_mean": [MEAN], "latents_std": STD}, r"latents_mean must be .*; it has the shape \(1, 4\)"),
        ({"latents_mean": [columns(MEAN)[:2], columns(MEAN)[2:]], "latents_std": STD}, r"the shape \(2, 2, 1, 1\)"),
        ({"latents_mean": MEAN, "latents_std": [[1.0], [1.0, 2.0]]}, "latents_std must be .*; it has no numbers"),
        ({"latents_mean": ["a", "b"], "latents_std": STD}, "latents_mean must be .*; it has no numbers"),
        ({"latents_mean": [], "latents_std": []}, r"latents_mean must be"),
        ({"scaling_factor": [0.5]}, r"scaling_factor must be one number; got \[0.5\] of shape \(1,\)"),
        ({"shift_factor": MEAN}, r"shift_factor must be one number"),
        ({"scaling_factor": True}, r"scaling_factor must be .*; it has no numbers"),
    ],
    ids=["two rows", "one row", "a grid", "ragged", "words", "empty", "list as factor", "list as shift", "boolean"],
)
def test_anything_else_is_one_sentence_with_key_and_shape(config, words):
    with pytest.raises(ValueError, match=words):
        Normalization.from_config(config)


@pytest.mark.parametrize(
    ("config", "file", "expected"),
    [
        ({}, None, Normalization(scaling_factor=0.18215)),
        ({"scaling_factor": 0.5}, None, Normalization(scaling_factor=0.5)),
        (CHANNELS, None, Normalization(tuple(MEAN), tuple(STD))),
        ({**CHANNELS, "scaling_factor": 0.5}, None, Normalization(tuple(MEAN), tuple(STD), 0.5)),
        ({}, {"mean": 0.3, "std": 2.0}, Normalization((0.3,) * 4, (2.0,) * 4)),
        ({"scaling_factor": 0.5}, {"mean": 0.3, "std": 4.0}, Normalization((0.3,) * 4, (4.0,) * 4)),
        ({"scaling_factor": 0.5}, {"mean": 0.0, "std": 2.0}, Normalization(scaling_factor=0.5)),
        ({"scaling_factor": 0.5, "shift_factor": 0.1}, CHANNELS, Normalization(tuple(MEAN), tuple(STD))),
        ({}, {"mean": 9.0, "std": 9.0, **CHANNELS}, Normalization(tuple(MEAN), tuple(STD))),
        ({}, {"latents_mean": columns(MEAN, batch=True), "latents_std": columns(STD)}, None),
        (CHANNELS, {"mean": 0.05, "std": 1.0728}, Normalization(tuple(MEAN), tuple(STD))),
        (CHANNELS, {**CHANNELS, "latents_std": [value * 1.005 for value in STD]}, None),
        ({**CHANNELS, "scaling_factor": 0.18215}, CHANNELS, Normalization(tuple(MEAN), tuple(STD))),
    ],
    ids=[
        "nothing stated",
        "factor",
        "channels without a factor",
        "channels and a factor",
        "scalar file",
        "scalar file wins over a factor",
        "file says the same as the factor",
        "channels of a file win over factor and shift",
        "channels before scalars",
        "file of another shape",
        "scalars of the same channels",
        "within 1 %",
        "file decides between the readings of a factor on top",
    ],
)
def test_what_the_files_state_is_in_the_config_afterwards(saved, config, file, expected, tmp_path):
    vae = load_autoencoder(saved(config, file))
    assert Normalization.from_vae(vae) == (expected or Normalization(tuple(MEAN), tuple(STD)))
    vae.save_pretrained(tmp_path / "again")  # whoever reads it next needs no other file
    assert Normalization.from_vae(AutoencoderKL.from_pretrained(tmp_path / "again")) == Normalization.from_vae(vae)


def test_what_a_file_replaces_is_said(saved, caplog):
    load_autoencoder(saved({"scaling_factor": 0.18215}, {"mean": 0.3, "std": 4.0}))
    assert "mean_std.json (latents_mean 0.3, latents_std 4.0) normalises, not the config (scaling_factor 0.18" in (
        caplog.text
    )


def test_a_factor_that_only_the_class_fills_in_is_said(saved, caplog):
    load_autoencoder(saved(CHANNELS))
    assert "latents_mean and latents_std normalise alone: AutoencoderKL fills in scaling_factor=0.18215" in caplog.text


@pytest.mark.parametrize(
    ("config", "file", "words"),
    [
        (CHANNELS, {"mean": 0.05, "std": 2.0}, "contradict each other: .*; correct one of them, or remove it"),
        (CHANNELS, {**CHANNELS, "latents_std": [1.02 * value for value in STD]}, "contradict each other"),
        (CHANNELS, {**CHANNELS, "latents_mean": [value + 0.02 for value in MEAN]}, "contradict each other"),
        ({}, {"latents_mean": MEAN[:3], "latents_std": STD[:3]}, r"mean_std\.json: .*latents of 3 channels; got 4"),
        ({}, {"mean": [[1.0, 2.0]], "std": 1.0}, r"mean_std\.json: mean must be .* the shape \(1, 2\)"),
        ({}, {"mean": 0.0, "std": 0.0}, r"mean_std\.json: .*latents_std positive"),
        ({}, {"mean": 0.0}, r"mean_std\.json must hold"),
        ({}, "{", r"mean_std\.json is not a whole JSON file"),
        ({}, "[]", r"mean_std\.json must hold a JSON object"),
    ],
    ids=["other std", "2 %", "other mean", "3 channels", "shape", "zero std", "half", "no JSON", "a list"],
)
def test_files_that_contradict_or_cannot_be_read_are_named(saved, config, file, words):
    with pytest.raises(ValueError, match=words):
        load_autoencoder(saved(config, file))


def test_a_file_beside_the_autoencoder_of_a_pipeline_is_read(saved, tmp_path):
    saved({}, {"mean": 0.3, "std": 2.0})
    (tmp_path / "model_index.json").write_text("{}")
    assert Normalization.from_vae(load_autoencoder(str(tmp_path))).mean == (0.3,) * 4


def statistics(std: float = 1.0, mean: float = 0.0) -> LatentStatistics:
    measured = LatentStatistics()
    measured.update(mean + std * torch.randn(64, 4, 8, 8))
    return measured


@pytest.mark.parametrize(
    ("normalization", "std", "words"),
    [
        (Normalization((0.0,), (1.0,), 0.18215), 1.0, r"of 0\.18., .*latents_mean and latents_std alone would give 1"),
        (
            Normalization(scaling_factor=0.18215),
            1.0,
            r"of 0\.18., .*\(scaling_factor 0\.18.* measured .* would give 1",
        ),
        (Normalization((0.0,), (1.0,)), 5.0, r"deviation of 5.*, where a generator expects about 1"),
        (Normalization(), 0.4, r"deviation of 0\.4"),
    ],
    ids=["factor on top", "factor of another", "std of another", "none at all"],
)
def test_latents_far_from_1_are_complained_of_with_both_readings(normalization, std, words):
    complaint = scale_complaint(normalization, statistics(std))
    assert complaint is not None and re.search(words, complaint), complaint


@pytest.mark.parametrize("std", [0.6, 1.0, 1.9])
def test_latents_near_1_are_not(std):
    assert scale_complaint(Normalization(), statistics(std)) is None


class Images(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 200


@pytest.mark.parametrize("factor", [0.01, None], ids=["far", "near"])
def test_the_first_batches_on_the_fly_decide_whether_to_warn(factor, tiny_autoencoder_kl, caplog):
    pixels = torch.rand(16, 3, 16, 16) * 2 - 1
    normalization = Normalization(scaling_factor=factor) if factor else None
    if normalization is None:
        measured = LatentStatistics()
        with torch.no_grad():
            posterior = tiny_autoencoder_kl.encode(pixels).latent_dist
        measured.update(posterior.mean, posterior.logvar)
        normalization = Normalization.from_statistics(measured)
    normalization.apply_to(tiny_autoencoder_kl)
    classes = ClassTable(("image",), (200,))
    latents = LatentData(
        Images(), tiny_autoencoder_kl, classes, (4, 4, 4), name=None, scale_remedy="The flag decides."
    )
    for _ in range(2 * CHECKED_IMAGES // len(pixels)):
        latents.read({"pixel_values": pixels}, StepRandomness(seed=0))
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == (1 if factor else 0)
    assert all("expects about 1" in text and text.endswith("The flag decides.") for text in warned)


class Pixels:
    def __len__(self) -> int:
        return 16

    def evenly(self, count: int) -> Iterator[torch.Tensor]:
        return (torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(each)) * 2 - 1 for each in range(16))


@pytest.mark.parametrize(
    ("came", "chosen", "pretrained", "kind"),
    [
        ({"scaling_factor": 0.5}, None, True, "config"),
        (CHANNELS, None, True, "channel"),
        ({"scaling_factor": 0.5}, None, False, "channel"),
        ({"scaling_factor": 0.5}, "channel", True, "channel"),
        ({"scaling_factor": 0.5}, "scalar", True, "scalar"),
        (CHANNELS, "scalar", True, "scalar"),
        (CHANNELS, "config", True, "config"),
    ],
)
def test_what_a_finished_autoencoder_says(came, chosen, pretrained, kind, tiny_autoencoder_kl, caplog):
    Normalization.from_config(came).apply_to(tiny_autoencoder_kl)
    tiny_autoencoder_kl.quant_conv.bias.data[:4] += 1.0  # a mean that matters
    before = Normalization.from_vae(tiny_autoencoder_kl)
    evaluation = AutoencoderEvaluationArguments(normalization=chosen)
    measured_on = settle_normalization(tiny_autoencoder_kl, Pixels(), evaluation, pretrained=pretrained)
    config, after = tiny_autoencoder_kl.config, Normalization.from_vae(tiny_autoencoder_kl)
    if kind == "config":
        assert after == before and measured_on is None
        return
    assert measured_on == 16
    if kind == "scalar":
        assert config.latents_mean is None and config.latents_std is None and after.mean is None
        assert config.shift_factor != 0.0 and config.scaling_factor > 0
        assert "of Stable Diffusion 1.5 and SDXL do not read shift_factor" in caplog.text
    else:
        assert len(config.latents_mean) == 4 and config.scaling_factor == 1.0
        assert "Stable Diffusion 1.5, Stable Diffusion 3, FLUX and Sana do not read latents_mean" in caplog.text
        assert "use --normalization config or scalar" in caplog.text


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"latents_mean": [0.0, 0.0], "latents_std": [1.0, 1.0]}, "for latents of 2 channels; got 4"),
        ({"scaling_factor": 1e300}, "scaling_factor must be positive .*as float32 holds"),
        ({"scaling_factor": 1e-300}, "scaling_factor must be positive .*as float32 holds"),
        ({"shift_factor": 1e300}, "shift_factor finite, as float32 holds"),
        ({"latents_mean": [1e39] * 4, "latents_std": [1.0] * 4}, "latents_mean must be finite .*as float32 holds"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1e-50] * 4}, "latents_std positive, as float32 holds"),
    ],
    ids=["of another autoencoder", "factor", "small factor", "shift", "mean", "std"],
)
def test_numbers_that_no_latents_can_have_are_refused_where_they_are_read(config, words, saved):
    with pytest.raises(ValueError, match=words):
        load_autoencoder(saved({"scaling_factor": 1.0, **config}))
