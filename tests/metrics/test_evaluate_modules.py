"""The metric modules load by path, offline, and give what the functions give."""

from __future__ import annotations

import pytest
import torch

from diffusers_eqvae.equivariance import equivariance_error
from diffusers_eqvae.metrics.diffusability import channel_normalized, spectral_energy
from diffusers_eqvae.metrics.evaluate_modules import NAMES, module_path
from diffusers_eqvae.metrics.latent_statistics import intrinsic_dimension

evaluate = pytest.importorskip("evaluate")


@pytest.fixture
def load(tmp_path):
    return lambda name: evaluate.load(module_path(name), cache_dir=str(tmp_path))


@pytest.mark.parametrize("name", ["equivariance_error", "latent_health"])
def test_a_module_describes_itself(name, load):
    metric = load(name)
    assert metric.description and metric.inputs_description.startswith("Args:\n    predictions: ")


def latents(count: int, side: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 4, side, side, generator=torch.Generator().manual_seed(seed)) + 0.5


def test_equivariance_error_over_batches_of_different_sizes(load):
    """The scales of S give latents of different sizes, which one evaluation must take in."""
    metric = load("equivariance_error")
    expected = []
    for side in (4, 8):
        transformed, encoded = latents(3, side, side), latents(3, side, side + 1)
        metric.add_batch(predictions=transformed.numpy(), references=encoded.numpy())
        expected.append([equivariance_error(encoded, transformed, centred=c).mean() for c in (False, True)])
    result = metric.compute()
    plain, centred = torch.tensor(expected).mean(0).tolist()
    assert result["equivariance_error"] == pytest.approx(plain, rel=1e-5)
    assert result["equivariance_error_centred"] == pytest.approx(centred, rel=1e-5)
    assert centred > plain
    same = latents(2, 4, 0).numpy()
    assert metric.compute(predictions=same, references=same)["equivariance_error"] == 0


def test_latent_health(load):
    metric, values = load("latent_health"), latents(12, 8, 0)
    for batch in values.split(5):
        metric.add_batch(predictions=batch.numpy())
    result = metric.compute()
    assert result["num_samples"] == 12
    assert result["mean"] == pytest.approx(values.mean((0, 2, 3)).tolist(), rel=1e-4)
    assert len(result["std"]) == len(result["kurtosis"]) == 4
    assert result["intrinsic_dimension"] == pytest.approx(intrinsic_dimension(values.flatten(1)), rel=1e-9)
    assert 0.7 < result["high_frequency"] < 0.9
    assert result["viv"] is None and "left out, which have fewer than 18 latents" in result["caveats"]["viv"]
    assert result["sec"] == pytest.approx(spectral_energy(channel_normalized(values)).mean().item(), rel=1e-4)
    assert metric.compute(predictions=latents(40, 8, 1).numpy())["viv_per_dimension"] == pytest.approx(1.5708, abs=0.2)
    assert metric.compute(predictions=values[:3].numpy())["intrinsic_dimension"] is None


def test_the_names_are_listed():
    assert set(NAMES) == {"equivariance_error", "gfid", "latent_health", "rfid"}
    with pytest.raises(ValueError, match="equivariance_error, gfid, latent_health"):
        module_path("fid")
