"""The PatchGAN: size, initialisation, output grid, and what its norms mix."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffusers_eqvae.models.discriminator import PatchDiscriminator


@pytest.fixture
def small():
    return lambda **options: PatchDiscriminator(base_channels=8, **options)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_published_parameter_count(norm):
    """3 layers of 64 filters. pix2pix prints 2.769 M for 6 input channels; 3 * 64 * 16 fewer are 2 765 633."""
    assert sum(p.numel() for p in PatchDiscriminator(norm=norm).parameters()) == 2_765_633
    assert sum(p.numel() for p in PatchDiscriminator(in_channels=6, norm=norm).parameters()) == 2_768_705


def test_weights_start_normal():
    model = PatchDiscriminator(norm="group")
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.mean().abs() < 1e-3
            torch.testing.assert_close(layer.weight.std(), torch.tensor(0.02), rtol=0.05, atol=0)
        elif isinstance(layer, nn.GroupNorm):
            assert 0.9 < layer.weight.mean() < 1.1 and 0 < layer.weight.std() < 0.04
        if getattr(layer, "bias", None) is not None:
            assert not layer.bias.any()


@pytest.mark.parametrize(
    ("num_layers", "size", "grid"), [(3, (256, 256), (30, 30)), (3, (64, 40), (6, 3)), (2, (32, 32), (6, 6))]
)
def test_output_grid(small, num_layers, size, grid):
    assert small(num_layers=num_layers)(torch.zeros(2, 3, *size)).shape == (2, 1, *grid)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_smallest_image_gives_one_logit_and_a_smaller_one_a_readable_error(small, num_layers):
    model = small(num_layers=num_layers, norm="group")
    side_px = model.min_size_px
    assert model(torch.zeros(1, 3, side_px, side_px)).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match=f"at least {side_px} px"):
        model(torch.zeros(1, 3, side_px - 1, side_px))
    with pytest.raises((RuntimeError, ValueError)):
        model.layers(torch.zeros(1, 3, side_px - 1, side_px - 1))


def test_a_logit_sees_seventy_pixels():
    model = PatchDiscriminator(base_channels=4, norm="group").eval()
    for layer in [layer for layer in model.layers if isinstance(layer, nn.GroupNorm)]:
        # A normalisation over the whole image would make every logit see everything.
        model.layers[list(model.layers).index(layer)] = nn.Identity()
    pixels = torch.randn(1, 3, 160, 160, requires_grad=True)
    model(pixels)[0, 0, 8, 8].backward()
    seen = pixels.grad.abs().sum((0, 1)) > 0
    assert seen.any(1).sum() == 70 and seen.any(0).sum() == 70


def test_group_norm_mixes_no_samples_and_batch_norm_does(small):
    pixels = torch.randn(3, 3, 32, 32)
    for norm, mixes in (("group", False), ("batch", True)):
        model = small(norm=norm).train()
        leaf = pixels.clone().requires_grad_()
        model(leaf)[0].sum().backward()
        assert bool(leaf.grad[1:].any()) is mixes
        assert leaf.grad[0].any()
    alone = small(norm="group")
    torch.testing.assert_close(alone(pixels)[:1], alone(pixels[:1]))


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_broken_batch_leaves_no_trace(small, norm):
    model, pixels = small(norm=norm), torch.randn(2, 3, 32, 32)
    before = model.train()(pixels)
    model(torch.full_like(pixels, float("nan")))
    assert torch.equal(model(pixels), before) and torch.equal(model.eval()(pixels), before)
    assert not list(model.buffers())


def test_every_parameter_learns(small):
    model = small()
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_save_and_load(small, tmp_path):
    model = small(norm="group", num_layers=2).eval()
    model.save_pretrained(tmp_path)
    loaded = PatchDiscriminator.from_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 32, 32)
    assert loaded.config.norm == "group" and loaded.min_size_px == 12
    assert torch.equal(loaded(pixels), model(pixels))


@pytest.mark.parametrize("options", [{"norm": "layer"}, {"num_layers": 0}])
def test_bad_options_are_refused(small, options):
    with pytest.raises(ValueError, match="got"):
        small(**options)
