"""LPIPS: its formula in float64, its gradients, its weights files, and the published figure on real weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffusers_eqvae.losses.perceptual import BACKBONES, LPIPS

SIDE_PX = 40


@pytest.fixture(scope="module", params=["vgg", "alex", "squeeze"])
def lpips(request) -> LPIPS:
    return LPIPS.random(request.param, seed=3)


def images(batch: int = 2, seed: int = 0, side_px: int = SIDE_PX) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.rand(2, batch, 3, side_px, side_px, generator=generator) * 2 - 1
    return first, second


def tap_outputs(net: str, features: torch.nn.Module, images: torch.Tensor) -> list[np.ndarray]:
    """Activations by the names the paper and the authors' package give them, found by counting ReLUs and blocks."""
    relus, fires, wanted = 0, 0, []
    block = {"vgg": (2, 4, 7, 10, 13), "alex": (1, 2, 3, 4, 5)}.get(net)
    for layer in features:
        images = layer(images)
        kind = type(layer).__name__
        relus += kind == "ReLU"
        fires += kind == "Fire"
        if (kind == "ReLU" and (relus == 1 if block is None else relus in block)) or (
            kind == "Fire" and fires in (2, 4, 5, 6, 7, 8)
        ):
            wanted.append(images.double().numpy().copy())
    return wanted


def test_is_the_papers_formula_in_float64(lpips):
    first, second = images()
    shift = np.array([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1)
    scale = np.array([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1)
    with torch.no_grad():
        both = [
            tap_outputs(lpips.net, lpips.features, torch.from_numpy((x.numpy() - shift) / scale).float())
            for x in (first, second)
        ]
    expected = np.zeros(2)
    for a, b, head in zip(*both, lpips.heads, strict=True):
        a, b = (x / (np.sqrt((x**2).sum(1, keepdims=True)) + 1e-10) for x in (a, b))
        weighted = (a - b) ** 2 * head.detach().double().numpy().reshape(1, -1, 1, 1)
        expected += weighted.sum(1).mean((1, 2))
    np.testing.assert_allclose(lpips(first, second).numpy(), expected, rtol=2e-5)


def test_equal_images_have_distance_zero_and_a_finite_gradient(lpips):
    first, _ = images()
    first.requires_grad_()
    distance = lpips(first, first.detach().clone())
    assert torch.equal(distance, torch.zeros(2))
    distance.sum().backward()
    assert torch.equal(first.grad, torch.zeros_like(first))


def test_is_symmetric_positive_and_per_image(lpips):
    first, second = images()
    distance = lpips(first, second)
    assert distance.shape == (2,) and (distance > 0).all()
    torch.testing.assert_close(distance, lpips(second, first))
    torch.testing.assert_close(distance[1:], lpips(first[1:], second[1:]))


def test_a_single_channel_is_seen_three_times(lpips):
    first, second = torch.rand(2, 2, 1, 64, 64, generator=torch.Generator().manual_seed(3)) * 2 - 1
    assert torch.equal(lpips(first, second), lpips(first.repeat(1, 3, 1, 1), second.repeat(1, 3, 1, 1)))


def test_gradient_reaches_the_image_and_not_the_weights(lpips):
    first, second = images()
    first.requires_grad_()
    lpips(first, second).sum().backward()
    assert torch.isfinite(first.grad).all()
    assert (first.grad.flatten(2).norm(dim=2) > 0).all()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in lpips.parameters())


def test_gradient_is_that_of_finite_differences():
    lpips = LPIPS.random("squeeze").double()
    first, second = (x.double() for x in images(batch=1, side_px=20))
    direction = torch.randn(first.shape, dtype=torch.float64)
    first.requires_grad_()
    lpips(first, second).sum().backward()
    step = 1e-6
    with torch.no_grad():
        rise = (lpips(first + step * direction, second) - lpips(first - step * direction, second)) / (2 * step)
    torch.testing.assert_close((first.grad * direction).sum(), rise[0], rtol=1e-4, atol=1e-9)


def test_dead_places_give_no_nan():
    """A layer whose activations are all 0 at a place, where the norm has no derivative."""
    lpips = LPIPS.random("squeeze")
    lpips.features[0].bias.fill_(-100.0)
    first, second = images()
    first.requires_grad_()
    lpips(first, second).sum().backward()
    assert torch.isfinite(first.grad).all()


def test_stays_in_eval_mode_inside_a_training_module(lpips):
    parent = torch.nn.Sequential(lpips).train()
    assert parent.training
    assert not any(module.training for module in lpips.modules())


def test_distances_are_float32_under_autocast():
    lpips = LPIPS.random("squeeze")
    first, second = images()
    exact = lpips(first, second)
    with torch.autocast("cpu", torch.bfloat16):
        distance = lpips(first.bfloat16(), second.bfloat16())
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, exact, rtol=0.05, atol=0)


def test_smallest_size_is_the_layers_own(lpips):
    side_px = lpips.min_size_px
    assert lpips(*images(1, side_px=side_px)).shape == (1,)
    with pytest.raises(ValueError, match=f"at least {side_px} px"):
        lpips(*images(1, side_px=side_px - 1))
    with pytest.raises(RuntimeError):
        lpips.features(torch.zeros(1, 3, side_px - 1, side_px - 1))


def test_unequal_images_and_unknown_nets_are_refused(lpips):
    with pytest.raises(ValueError, match="equal shapes"):
        lpips(torch.zeros(2, 3, SIDE_PX, SIDE_PX), torch.zeros(1, 3, SIDE_PX, SIDE_PX))
    with pytest.raises(ValueError, match="vgg, alex, squeeze"):
        LPIPS("resnet")


def write_weights(lpips: LPIPS, folder) -> tuple[str, str]:
    """The two files in the published layouts: torchvision's state dict, and the authors' heads."""
    backbone = {f"features.{key}": value.contiguous() for key, value in lpips.features.state_dict().items()}
    backbone["classifier.1.weight"] = torch.zeros(3)
    save_file(backbone, folder / "backbone.safetensors")
    heads = {f"lin{i}.model.1.weight": head.detach().view(1, -1, 1, 1) for i, head in enumerate(lpips.heads)}
    torch.save(heads, folder / "heads.pth")
    return str(folder / "backbone.safetensors"), str(folder / "heads.pth")


def test_loads_both_published_layouts(lpips, tmp_path):
    backbone, heads = write_weights(lpips, tmp_path)
    loaded = LPIPS.from_pretrained(lpips.net, backbone_weights=backbone, linear_weights=heads)
    assert torch.equal(loaded(*images()), lpips(*images()))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_weights_of_another_net_are_refused(tmp_path):
    backbone, heads = write_weights(LPIPS.random("squeeze"), tmp_path)
    with pytest.raises(ValueError, match="alexnet weights"):
        LPIPS.from_pretrained("alex", backbone_weights=backbone, linear_weights=heads)


def test_missing_weights_name_the_file_the_place_and_the_flag(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"vgg16-397923af\.pth.*checkpoints.*backbone_weights"):
        LPIPS.from_pretrained("vgg")
    backbone, _ = write_weights(LPIPS.random("squeeze"), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"lpips-v0\.1-squeeze\.pth.*linear_weights"):
        LPIPS.from_pretrained("squeeze", backbone_weights=backbone)
    with pytest.raises(FileNotFoundError, match="backbone_weights must name a file"):
        LPIPS.from_pretrained("squeeze", backbone_weights=tmp_path / "absent.pth")


def test_cached_weights_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    lpips = LPIPS.random("squeeze", seed=9)
    backbone, heads = write_weights(lpips, tmp_path)
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (cache / "lpips-v0.1-squeeze.pth").write_bytes((tmp_path / "heads.pth").read_bytes())
    loaded = LPIPS.from_pretrained("squeeze", backbone_weights=backbone)
    assert torch.equal(loaded(*images()), lpips(*images()))
    assert heads


@pytest.mark.parametrize("net", sorted(BACKBONES))
def test_published_heads_fit_and_are_not_negative(shared_data, net):
    path = shared_data / "weights" / "lpips" / f"{net}.pth"
    lpips = LPIPS(net)
    lpips.load_heads(torch.load(path, map_location="cpu", weights_only=True), source=str(path))
    assert all((head >= 0).all() and head.any() for head in lpips.heads)


@pytest.mark.parametrize(
    ("images_used", "crop_px", "published", "tolerance"),
    [
        pytest.param(2, 256, 0.0783, 5e-4, id="two_crops"),
        pytest.param(24, None, 0.077, 5e-4, id="kodak", marks=pytest.mark.slow),
    ],
)
def test_published_figure_of_taesd_on_kodak(shared_data, images_used, crop_px, published, tolerance):
    """LPIPS-squeeze of TAESD on Kodak is .077 on full-size images; the crops' figure was made with the same code."""
    from diffusers import AutoencoderTiny

    weights = shared_data / "weights"
    lpips = LPIPS.from_pretrained(
        "squeeze",
        backbone_weights=weights / "squeezenet1_1" / "squeezenet1_1_imagenet_fp16.safetensors",
        linear_weights=weights / "lpips" / "squeeze.pth",
    )
    vae = AutoencoderTiny.from_pretrained(weights / "taesd").eval()
    distances = []
    for path in sorted((shared_data / "kodak").glob("*.png"))[:images_used]:
        pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None] / 127.5 - 1
        pixels = pixels[..., :crop_px, :crop_px]
        with torch.no_grad():
            distances.append(lpips(vae.decode(vae.encode(pixels).latents).sample.clamp(-1, 1), pixels).item())
    assert np.mean(distances) == pytest.approx(published, abs=tolerance)
