"""The presets of train_autoencoder.py: each begins a run, and says what its row of the paper is."""

from __future__ import annotations

import re

import numpy as np
import pytest
import yaml
from diffusers import VQModel
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from diffusers_eqvae.regularizers.base import build_regularizers
from diffusers_eqvae.training_utils.autoencoder.arguments import AutoencoderOptions

from ..invariants.trajectories import ROOT, as_flags, run_script

SCRIPT = ROOT / "training" / "train_autoencoder.py"
PRESETS = {
    path.stem: path
    for path in sorted((ROOT / "training" / "configs").glob("*.yaml"))
    if "model" not in yaml.safe_load(path.read_text())
}
ROWS = [name for name in PRESETS if name.startswith(("eqvae", "reals"))]

FAST = ("eqvae_t1_sdxl", "eqvae_reals", "vqgan_f16")  # a row with a base, one with a teacher, one with a codebook


def read(name: str) -> AutoencoderOptions:
    return AutoencoderOptions.parse([str(PRESETS[name]), "--output_dir", "run"], description=None, script=str(SCRIPT))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Flags that make any preset small: its size, what it starts from and what it reads."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "images").mkdir()
    for number in range(4):
        image = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"images/{number}.png")
    Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    ).save_pretrained(folder / "teacher")
    VQModel(num_vq_embeddings=8, block_out_channels=[32]).save_pretrained(folder / "vq")
    return folder


@pytest.mark.parametrize("name", PRESETS)
def test_it_parses(name):
    read(name)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in PRESETS]
)
def test_it_begins_a_run(name, small, tiny_autoencoder_kl, capsys):
    """A dry run goes through the loop for a few steps, on a tiny autoencoder in place of the row's."""
    tiny_autoencoder_kl.save_pretrained(small / "kl")
    given = read(name)
    words = {
        "train_data_dir": small / "images",
        "output_dir": small / "run",
        "resolution": 32,
        "perceptual_weight": 0,
        "train_batch_size": 2,
        "disc_num_layers": 1,
        "report_to": "none",
        "num_validation_images": 2,
        "validation_resolution": 32,
        "mixed_precision": "no",
        "cache_dir": small / "cache",
    }
    if given.model.model_config is None:
        words["pretrained_model_name_or_path"] = small / ("vq" if name.startswith("vqgan") else "kl")
    if "alignment" in given.regularizing.regularizers:
        words |= {"alignment_teacher": small / "teacher", "alignment_image_size": 28}
    with pytest.raises(SystemExit) as ended:
        run_script(SCRIPT, [str(PRESETS[name]), *as_flags(words), "--dry_run"])
    assert ended.value.code == 0 and "Memory per device, estimated:" in capsys.readouterr().out


def test_every_published_row_is_there_with_its_source_and_figure():
    assert [
        "eqvae_ema",
        "eqvae_reals",
        *(f"eqvae_t1_{name}" for name in ("f16", "sd", "sd3", "sdxl")),
        *(f"eqvae_t5_{name}" for name in ("anisotropic", "rotation", "rotation_scale", "scale")),
        "eqvae_t6_plain",
        "eqvae_t7_explicit",
        "eqvae_t7_explicit_stop_gradient",
        *(f"eqvae_t8_prior_{share}" for share in (30, 50, 70)),
        *("reals", "reals_base", "reals_giant", "reals_global", "reals_patch"),
    ] == ROWS
    for name in ROWS:
        first, second, *_ = PRESETS[name].read_text().splitlines()
        assert "EQ-VAE" in first or "ReaLS" in first
        assert re.search(r"FID|figure", second), name


def test_the_rows_of_equivariance_are_those_of_the_tables(tiny_autoencoder_kl):
    """Table 5 by what tau does, table 8 by how often the plain objective is kept, table 7 by the side that moves."""

    def regularizer(row: str):
        given = read(f"eqvae_{row}")
        ((_, built),) = build_regularizers(given.regularizing.regularizers, given.methods, tiny_autoencoder_kl).items()
        return built

    tau = {
        "t1_sd": (True, "isotropic"),
        "t5_rotation": (True, "none"),
        "t5_scale": (False, "isotropic"),
        "t5_rotation_scale": (True, "isotropic"),
        "t5_anisotropic": (True, "uniform_anisotropic"),
    }
    drawn = {row: regularizer(row).distribution for row in tau}
    assert {row: (each.rotation, each.scale) for row, each in drawn.items()} == tau
    for share in (30, 50, 70):
        row = regularizer(f"t8_prior_{share}")
        assert 1 - row.p_equivariance == pytest.approx(share / 100) and row.p_low_resolution == 0
    explicit = regularizer("t7_explicit"), regularizer("t7_explicit_stop_gradient")
    assert [(row.weight, row.stop_gradient, row.smallest_std) for row in explicit] == [(0.1, False, 0), (0.1, True, 0)]
    assert read("eqvae_t6_plain").regularizing.regularizers == ["none"]


def test_the_rows_of_reals_are_its_readmes():
    rows = {name: read(name) for name in ROWS if "reals" in name}
    teachers = {
        name: given.methods["alignment"].alignment_teacher.removeprefix("facebook/") for name, given in rows.items()
    }
    assert {name: teacher for name, teacher in teachers.items() if teacher != teachers["reals"]} == {
        "reals_base": "dinov2-base",
        "reals_giant": "dinov2-with-registers-giant",
    }
    assert teachers["reals"] == "dinov2-with-registers-large"
    for given in rows.values():
        assert given.methods["alignment"].alignment_image_size == 448 and given.evaluation.normalization == "scalar"
        assert (given.run.learning_rate, given.run.num_train_epochs, given.run.train_batch_size) == (5e-5, 10, 8)
    assert rows["eqvae_reals"].regularizing.regularizers == ["equivariance", "alignment"]
