"""The presets of train_autoencoder.py: each parses, and says what its row of the paper is."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from diffusers_eqvae.regularizers.base import build_regularizers
from diffusers_eqvae.training_utils.arguments import DataArguments, RunArguments
from diffusers_eqvae.training_utils.autoencoder import arguments as cli
from diffusers_eqvae.training_utils.command_line import parse

PRESETS = {
    path.stem: path
    for path in sorted((Path(__file__).resolve().parents[2] / "training" / "configs").glob("*.yaml"))
    if "model" not in yaml.safe_load(path.read_text())
}
ROWS = sorted(name for name in PRESETS if name.startswith("eqvae_"))


def read(name: str, *words: str):
    return parse(
        cli.AutoencoderArguments,
        cli.AutoencoderLossArguments,
        cli.RegularizerArguments,
        cli.AutoencoderEvaluationArguments,
        DataArguments,
        RunArguments,
        argv=[str(PRESETS[name]), "--output_dir", "run", *words],
        choices=cli.autoencoder_choices,
    )


@pytest.mark.parametrize("name", PRESETS)
def test_it_parses(name):
    read(name)


def test_every_row_of_the_ablations_is_there_with_its_source():
    assert [name.removeprefix("eqvae_") for name in ROWS] == [
        "t5_anisotropic",
        "t5_none",
        "t5_rotation",
        "t5_rotation_scale",
        "t5_scale",
        "t7_explicit",
        "t7_explicit_stop_gradient",
        "t8_prior_30",
        "t8_prior_50",
        "t8_prior_70",
    ]
    for name in ROWS:
        comment = [line for line in PRESETS[name].read_text().splitlines() if line.startswith("#")]
        assert "arXiv 2502.09509), table" in comment[0] and ("gFID" in comment[1] or "not available" in comment[1])


def regularizer_of(name: str, vae):
    _, _, regularizing, _, _, _, methods = read(name)
    ((_, regularizer),) = build_regularizers(regularizing.regularizers, methods, vae).items()
    return regularizer


def test_the_rows_are_those_of_the_tables(tiny_autoencoder_kl):
    """Table 5 by what tau does, table 8 by how often the plain objective is kept, table 7 by the side that moves."""
    rows = {
        name.removeprefix("eqvae_"): regularizer_of(name, tiny_autoencoder_kl) for name in ROWS if "none" not in name
    }
    assert {
        name: (row.distribution.rotation, row.distribution.scale) for name, row in rows.items() if "t5" in name
    } == {
        "t5_rotation": (True, "none"),
        "t5_scale": (False, "isotropic"),
        "t5_rotation_scale": (True, "isotropic"),
        "t5_anisotropic": (True, "uniform_anisotropic"),
    }
    for share in (30, 50, 70):
        row = rows[f"t8_prior_{share}"]
        assert 1 - row.p_equivariance == pytest.approx(share / 100) and row.p_low_resolution == 0
    explicit = rows["t7_explicit"], rows["t7_explicit_stop_gradient"]
    assert [(row.weight, row.stop_gradient, row.smallest_std) for row in explicit] == [(0.1, False, 0), (0.1, True, 0)]
