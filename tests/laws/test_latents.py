"""Laws of the normalisation, its files and configs, exact and streaming statistics."""

from __future__ import annotations

import itertools
import json
import logging

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from diffusers_eqvae.latents import LatentNormalization, LatentStatistics

SD = LatentNormalization(scaling_factor=0.18215)
SD3 = LatentNormalization(scaling_factor=1.5305, shift_factor=0.0609)
SDXL = LatentNormalization(mean=(0.1, -0.2, 0.3, 1.0), std=(0.5, 1.5, 4.0, 2.0), scaling_factor=0.5)
SCALAR = LatentNormalization(mean=(0.25,), std=(4.0,))
CONVENTIONS = [SD, SD3, SDXL, SCALAR]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tiny_kl() -> AutoencoderKL:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4, sample_size=16, **blocks)


def tiny_taesd() -> AutoencoderTiny:
    torch.manual_seed(0)
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), latent_channels=4, **blocks
    )


@pytest.mark.parametrize("normalization", CONVENTIONS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
def test_denormalize_inverts_normalize_in_the_dtype_that_came(normalization, dtype, tolerance):
    raw = randn(2, 4, 5, 6).to(dtype)
    latents = normalization.normalize(raw)
    assert latents.dtype == dtype
    assert torch.allclose(normalization.denormalize(latents), raw, atol=tolerance)
    assert torch.allclose(normalization.normalize(normalization.denormalize(raw)), raw, atol=tolerance)


def test_conventions_are_diffusers_own():
    raw = randn(2, 4, 3, 3, dtype=torch.float64)
    assert torch.allclose(SD.normalize(raw), raw * 0.18215)
    assert torch.allclose(SD3.normalize(raw), (raw - 0.0609) * 1.5305)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 4, 1, 1) for v in (SDXL.mean, SDXL.std))
    assert torch.allclose(SDXL.normalize(raw), (raw - mean) * 0.5 / std)
    assert torch.allclose(SDXL.denormalize(raw), raw * std / 0.5 + mean)
    assert torch.allclose(SCALAR.normalize(raw), (raw - 0.25) / 4.0)


def test_half_precision_is_rounded_once():
    raw = (100 + randn(1, 4, 8, 8)).bfloat16()
    normalization = LatentNormalization(mean=(100.0,) * 4, std=(0.37,) * 4)
    assert torch.equal(normalization.normalize(raw), ((raw.float() - 100.0) * (1 / 0.37)).bfloat16())


def test_a_kept_constant_serves_training_after_inference_mode():
    normalization = LatentNormalization(mean=(0.123,) * 4, std=(0.456,) * 4)
    with torch.inference_mode():
        normalization.normalize(torch.zeros(1, 4, 2, 2))
    raw = randn(1, 4, 2, 2).requires_grad_()
    normalization.normalize(raw).square().sum().backward()
    assert raw.grad is not None and raw.grad.abs().sum() > 0


@pytest.mark.parametrize("build", [tiny_kl, tiny_taesd])
@pytest.mark.parametrize("normalization", CONVENTIONS)
def test_the_config_carries_the_normalisation_through_save_and_load(build, normalization, tmp_path, caplog):
    vae = build()
    normalization.apply_to(vae)
    with caplog.at_level(logging.ERROR):
        vae.save_pretrained(tmp_path)
        loaded = type(vae).from_pretrained(tmp_path)
    raw = randn(2, 4, 3, 3)
    restored = LatentNormalization.from_vae(loaded)
    assert restored == LatentNormalization.from_vae(vae)
    assert torch.equal(restored.normalize(raw), normalization.normalize(raw))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["latents_mean"] is None or len(config["latents_mean"]) == len(config["latents_std"]) == 4


def test_defaults_of_published_configs():
    assert LatentNormalization.from_config({"scaling_factor": 0.18215, "shift_factor": None}) == SD
    assert LatentNormalization.from_config({}) == LatentNormalization()
    assert LatentNormalization.from_vae(tiny_kl()) == SD
    for normalization in CONVENTIONS:
        assert LatentNormalization.from_config(normalization.to_config()) == normalization


@pytest.mark.parametrize("normalization", CONVENTIONS)
def test_mean_std_json_holds_the_same_map(normalization, tmp_path):
    path = tmp_path / "mean_std.json"
    normalization.save_json(path, num_samples=7)
    raw = randn(2, 4, 3, 3, dtype=torch.float64)
    assert torch.allclose(LatentNormalization.from_json(path).normalize(raw), normalization.normalize(raw))
    content = json.loads(path.read_text())
    assert content["num_samples"] == 7 and isinstance(content["mean"], float) and isinstance(content["std"], float)
    assert [p.name for p in tmp_path.iterdir()] == ["mean_std.json"]


def test_realss_plain_scalar_file_is_read(tmp_path):
    path = tmp_path / "mean_std.json"
    path.write_text('{"mean": 0.25, "std": 4}')
    assert LatentNormalization.from_json(path) == SCALAR


def test_statistics_normalise_to_zero_mean_and_unit_variance(tmp_path):
    raw = 3 + torch.tensor([1.0, 5.0, 0.1, 2.0]).view(1, 4, 1, 1) * randn(50, 4, 4, 4)
    statistics = LatentStatistics()
    statistics.update(raw)
    for scalar, dims in ((False, (0, 2, 3)), (True, (0, 1, 2, 3))):
        normalization = LatentNormalization.from_statistics(statistics, scalar=scalar)
        latents = normalization.normalize(raw.double())
        assert latents.mean(dims).abs().max() < 1e-10
        assert torch.allclose(latents.var(dims, correction=0), torch.ones(1, dtype=torch.float64), atol=1e-10)
    normalization = LatentNormalization.from_statistics(statistics)
    normalization.save_json(tmp_path / "mean_std.json", num_samples=statistics.num_samples)
    content = json.loads((tmp_path / "mean_std.json").read_text())
    values = raw.double().numpy()
    assert (content["mean"], content["std"]) == pytest.approx((values.mean(), values.std()), rel=1e-12)


def test_streaming_statistics_equal_numpy_over_everything():
    batches = [1e3 + randn(n, 3, h, 5, seed=n) * (1 + n) for n, h in ((1, 2), (7, 4), (16, 3), (5, 8))]
    statistics = LatentStatistics()
    for batch in batches:
        statistics.update(batch)
    everything = np.concatenate([b.double().numpy().transpose(1, 0, 2, 3).reshape(3, -1) for b in batches], axis=1)
    assert statistics.mean == pytest.approx(everything.mean(1), rel=1e-13)
    assert statistics.std == pytest.approx(everything.std(1), rel=1e-12)
    assert statistics.scalar_mean == pytest.approx(everything.mean(), rel=1e-13)
    assert statistics.scalar_std == pytest.approx(everything.std(), rel=1e-12)
    assert statistics.num_samples == 29


def test_merging_does_not_depend_on_the_order_or_the_split():
    batches = [(50 + randn(n, 4, 3, 3, seed=n), randn(n, 4, 3, 3, seed=100 + n)) for n in (1, 2, 5, 11)]
    single = LatentStatistics()
    for mean, logvar in batches:
        single.update(mean, logvar)
    for order in itertools.permutations(range(4)):
        parts = [LatentStatistics() for _ in range(4)]
        for part, index in zip(parts, order, strict=True):
            part.update(*batches[index])
        total = LatentStatistics()
        total.merge(LatentStatistics())
        for part in parts:
            total.merge(LatentStatistics.from_state_dict(json.loads(json.dumps(part.state_dict()))))
        assert total.mean == pytest.approx(single.mean, rel=1e-12)
        assert total.std == pytest.approx(single.std, rel=1e-12)
        assert total.num_samples == single.num_samples


def test_the_posterior_variance_enters_as_if_sampled():
    mean, logvar = 0.3 * randn(40, 2, 4, 4), 0.5 * randn(40, 2, 4, 4, seed=1)
    exact = LatentStatistics()
    exact.update(mean, logvar)
    draws = mean + (0.5 * logvar).exp() * randn(2000, 40, 2, 4, 4, seed=2)
    assert exact.std == pytest.approx(draws.transpose(0, 2).flatten(1).std(1).tolist(), rel=2e-3)
    without = LatentStatistics()
    without.update(mean)
    assert all(a > 2 * b for a, b in zip(exact.std, without.std, strict=True))


def test_state_of_nothing_survives():
    statistics = LatentStatistics.from_state_dict(LatentStatistics().state_dict())
    statistics.update(torch.tensor([[[[1.0, 3.0]]]]))
    assert (statistics.mean, statistics.std) == ([2.0], [1.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LatentNormalization(mean=(0.0,)), "given together"),
        (lambda: LatentNormalization(mean=(0.0,), std=(1.0, 1.0)), "one value per channel"),
        (lambda: LatentNormalization(mean=(), std=()), "one value per channel"),
        (lambda: LatentNormalization(mean=(0.0,), std=(0.0,)), "latents_std positive"),
        (lambda: LatentNormalization(mean=(float("nan"),), std=(1.0,)), "must be finite"),
        (lambda: LatentNormalization(scaling_factor=0.0), "scaling_factor must be positive"),
        (lambda: LatentNormalization(mean=(0.0,), std=(1.0,), shift_factor=0.1), "both shift the latents"),
        (lambda: SDXL.normalize(torch.zeros(1, 16, 2, 2)), "latents of 4 channels; got 16"),
        (lambda: LatentNormalization((0.0,) * 16, (1.0,) * 16).apply_to(tiny_kl()), "16 channels; got 4"),
        (lambda: LatentStatistics().mean, "at least one posterior"),
        (lambda: LatentStatistics().update(torch.zeros(4, 2, 2)), "posterior mean"),
        (lambda: LatentStatistics().update(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 1)), "same shape"),
    ],
)
def test_bad_arguments_are_one_readable_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_file_without_mean_and_std_and_channels_that_differ_are_refused(tmp_path):
    path = tmp_path / "mean_std.json"
    path.write_text('{"mean": 1.0}')
    with pytest.raises(ValueError, match="must hold"):
        LatentNormalization.from_json(path)
    three, four = LatentStatistics(), LatentStatistics()
    three.update(torch.zeros(1, 3, 2, 2))
    four.update(torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match="equally many latent channels"):
        three.merge(four)


def test_statistics_leave_what_they_are_given():
    mean, logvar = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    before = mean.clone(), logvar.clone()
    LatentStatistics().update(mean, logvar)
    assert torch.equal(mean, before[0]) and torch.equal(logvar, before[1])
