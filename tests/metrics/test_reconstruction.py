"""PSNR and SSIM against scikit-image, with the range and the window that this package fixes."""

from __future__ import annotations

import pytest
import torch

from diffusers_eqvae.metrics.reconstruction import psnr, ssim

skimage_metrics = pytest.importorskip("skimage.metrics")


def pair(side: tuple[int, int] = (37, 48), *, contrast: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth images and noisy copies, some values of which leave [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(3, 3, 8, 8, generator=generator) * 2 - 1
    target = torch.nn.functional.interpolate(target, side, mode="bilinear") * contrast
    return target + 0.2 * torch.randn(target.shape, generator=generator), target


@pytest.mark.parametrize("contrast", [1.0, 0.1])
def test_ssim_and_psnr_are_those_of_scikit_image(contrast):
    reconstruction, target = pair(contrast=contrast)
    clamped = reconstruction.clamp(-1, 1).double().numpy()
    for index in range(3):
        expected = skimage_metrics.structural_similarity(
            target[index].double().numpy(),
            clamped[index],
            data_range=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            channel_axis=0,
        )
        assert ssim(reconstruction, target)[index].item() == pytest.approx(expected, abs=1e-9)
        expected = skimage_metrics.peak_signal_noise_ratio(
            target[index].double().numpy(), clamped[index], data_range=2
        )
        assert psnr(reconstruction, target)[index].item() == pytest.approx(expected, abs=1e-4)


def test_ssim_of_equal_images_is_one_and_ignores_the_batch():
    reconstruction, target = pair((24, 24))
    assert ssim(target, target).tolist() == pytest.approx([1.0] * 3, abs=1e-12)
    alone = torch.cat([ssim(a[None], b[None]) for a, b in zip(reconstruction, target, strict=True)])
    assert torch.allclose(ssim(reconstruction, target), alone, atol=1e-12)


def test_ssim_refuses_what_it_cannot_compare():
    with pytest.raises(ValueError, match="equal shapes"):
        ssim(torch.zeros(1, 3, 16, 16), torch.zeros(2, 3, 16, 16))
    with pytest.raises(ValueError, match="at least 11 px"):
        ssim(torch.zeros(1, 3, 10, 16), torch.zeros(1, 3, 10, 16))
