"""Measurements with known answers: an equivariant autoencoder has error 0, a wrong one the value it must have."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusers_eqvae.metrics import measure_equivariance, psnr
from diffusers_eqvae.metrics.base import METRICS
from diffusers_eqvae.metrics.equivariance import BETTER


class AveragingAutoencoder(nn.Module):
    """Encodes a cell as the mean of its 4x4 pixels and decodes by repeating it; `shift` rolls the latents."""

    works_as = "AutoencoderTiny"

    def __init__(self, *, offset: float = 0.0, shift: int = 0) -> None:
        super().__init__()
        self.offset, self.shift = offset, shift
        self.config = {"encoder_block_out_channels": (1, 1, 1)}

    def encode(self, pixels):
        latents = F.avg_pool2d(pixels, 4) + self.offset
        return SimpleNamespace(latents=latents.roll(self.shift, -1))

    def decode(self, latents):
        return SimpleNamespace(sample=F.interpolate(latents - self.offset, scale_factor=4, mode="nearest"))


def images(count: int = 3, side: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_equivariant_map_has_no_rotation_error():
    measured = measure_equivariance(AveragingAutoencoder(), [images()])
    assert measured["equivariance_rotation"] == pytest.approx(0, abs=1e-10)
    assert measured["equivariance_scale"] > 0.01  # averaging then resizing is not resizing then averaging
    assert measured["psnr_rotated_latent"] == pytest.approx(measured["psnr"], abs=1e-4)


def test_rolled_latents_have_the_error_of_uncorrelated_ones():
    """Rolling by half an image makes tau(E(x)) and E(tau(x)) independent cells of one variance: ratio 2."""
    pixels = images(8, 128)
    measured = measure_equivariance(AveragingAutoencoder(shift=13), [pixels])
    # A half turn maps a roll to its opposite; with independent cells every rotation gives |a - b|^2 / |b|^2 = 2.
    assert measured["equivariance_rotation"] == pytest.approx(2.0, rel=0.1)


def test_an_offset_flatters_the_plain_error_only():
    plain, shifted = (
        measure_equivariance(AveragingAutoencoder(shift=13, offset=offset), [images(8, 64)]) for offset in (0.0, 5.0)
    )
    assert shifted["equivariance_rotation"] < 0.01 * plain["equivariance_rotation"]
    assert shifted["equivariance_rotation_centred"] == pytest.approx(plain["equivariance_rotation_centred"], rel=1e-3)


def test_no_image_is_encoded_twice():
    """The image, its three turns and three scales; the turned and the halved one serve two figures."""
    seen = []

    class Counting(AveragingAutoencoder):
        def encode(self, pixels):
            seen.append(pixels)
            return super().encode(pixels)

    measure_equivariance(Counting(), [images(1)])
    assert len(seen) == 7 and len({hash(each.numpy().tobytes()) for each in seen}) == 7


FACTOR = 4


def ramp(height: int, width: int) -> np.ndarray:
    """Another weight at every cell, so that nothing but the identity commutes with it."""
    return 0.5 + 0.05 * np.arange(height)[:, None] + 0.03 * np.arange(width)


class WeightedAutoencoder(nn.Module):
    """Cell means times a ramp, and pixels that repeat a cell times the ramp: linear and not equivariant."""

    config = {"encoder_block_out_channels": (1, 1, 1)}  # noqa: RUF012
    works_as = "AutoencoderTiny"

    def encode(self, pixels):
        means = F.avg_pool2d(pixels, FACTOR)
        return SimpleNamespace(latents=means * torch.from_numpy(ramp(*means.shape[-2:])).to(means))

    def decode(self, latents):
        weighted = latents * torch.from_numpy(ramp(*latents.shape[-2:])).to(latents)
        return SimpleNamespace(sample=F.interpolate(weighted, scale_factor=FACTOR, mode="nearest"))


class ByHand:
    """The same autoencoder, the transforms and the figures of one image (3, H, W), in float64 NumPy."""

    def __init__(self, image: np.ndarray) -> None:
        self.image = image
        self.latents = self.encode(image)

    @staticmethod
    def encode(image):
        channels, height, width = image.shape
        cells = image.reshape(channels, height // FACTOR, FACTOR, width // FACTOR, FACTOR).mean((2, 4))
        return cells * ramp(*cells.shape[1:])

    @staticmethod
    def decode(latents):
        return np.kron(latents * ramp(*latents.shape[1:]), np.ones((1, FACTOR, FACTOR)))

    @staticmethod
    def turn(images, quarter_turns):
        return np.rot90(images, quarter_turns, axes=(1, 2))

    @staticmethod
    def scale(images, scale):
        """Bilinear between pixel centres, without a low-pass."""
        for axis in (1, 2):
            side = images.shape[axis]
            places = (np.arange(round(side * scale)) + 0.5) / scale - 0.5
            weights = np.maximum(0, 1 - np.abs(places[:, None] - np.arange(side)))
            images = np.moveaxis(np.moveaxis(images, axis, -1) @ weights.T, -1, axis)
        return images

    def error(self, transform, values, *, centred=False):
        each = []
        for value in values:
            reference = self.encode(transform(self.image, value))
            difference = transform(self.latents, value) - reference
            offset = reference.mean((1, 2), keepdims=True) if centred else 0
            each.append((difference**2).sum() / ((reference - offset) ** 2).sum())
        return np.mean(each)

    def psnr(self, latents, target):
        return 10 * np.log10(4 / np.mean((self.decode(latents).clip(-1, 1) - target) ** 2))

    def means(self):
        numbers = {"psnr": self.psnr(self.latents, self.image)}
        for name, transform, values in (
            ("rotation", self.turn, (1, 2, 3)),
            ("scale", self.scale, (0.25, 0.5, 0.75)),
        ):
            numbers[f"equivariance_{name}"] = self.error(transform, values)
            numbers[f"equivariance_{name}_centred"] = self.error(transform, values, centred=True)
        for name, transform, value in (("rotated", self.turn, 1), ("halved", self.scale, 0.5)):
            target = transform(self.image, value)
            numbers[f"psnr_{name}_latent"] = self.psnr(transform(self.latents, value), target)
            numbers[f"psnr_{name}_pixels"] = self.psnr(self.encode(target), target)
        return numbers


def test_figures_of_a_map_that_is_not_equivariant_are_those_worked_out_by_hand():
    """R over {90, 180, 270} degrees, S over {.25, .5, .75}, one quarter turn, half the size: EQ-VAE, table 1."""
    pixels = F.interpolate(images(2, 8), size=(32, 32), mode="bilinear") + 0.1
    measured = measure_equivariance(WeightedAutoencoder(), [pixels])
    by_hand = [ByHand(image).means() for image in pixels.double().numpy()]
    expected = {name: np.mean([numbers[name] for numbers in by_hand]) for name in by_hand[0]}
    assert {name: measured[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert set(measured) == {*expected, "latent_std", "colour_shift", "sharpness", "grid"}


class PixelwiseAutoencoder(nn.Module):
    """One linear map at every pixel, which commutes with resizing and rotating."""

    config = {"encoder_block_out_channels": (1,)}  # noqa: RUF012
    works_as = "AutoencoderTiny"
    matrix = torch.tensor([[1.0, 0.5, -0.25], [0.0, 2.0, 0.5], [0.25, 0.0, 1.0]])

    def encode(self, pixels):
        return SimpleNamespace(latents=torch.einsum("ij,bjhw->bihw", self.matrix, pixels) + 0.5)

    def decode(self, latents):
        return SimpleNamespace(sample=torch.einsum("ij,bjhw->bihw", self.matrix.inverse(), latents - 0.5))


def test_a_map_of_pixels_has_no_error_at_all():
    measured = measure_equivariance(PixelwiseAutoencoder(), [images()])
    for name in ("rotation", "rotation_centred", "scale", "scale_centred"):
        assert measured[f"equivariance_{name}"] == pytest.approx(0, abs=1e-12)
    assert min(measured[f"psnr_{name}_latent"] for name in ("rotated", "halved")) > 100


def test_figures_do_not_depend_on_the_batches():
    pixels = images(6)
    together = measure_equivariance(AveragingAutoencoder(shift=1), [pixels])
    apart = measure_equivariance(AveragingAutoencoder(shift=1), pixels.split(4))
    assert together == pytest.approx(apart, rel=1e-6)


def test_mode_is_restored_and_no_images_are_refused():
    vae = AveragingAutoencoder().train()
    measure_equivariance(vae, [images(1)])
    assert vae.training
    with pytest.raises(ValueError, match="at least one image"):
        measure_equivariance(vae, [])


def test_psnr_of_a_known_error():
    target = torch.zeros(2, 3, 8, 8)
    reconstruction = torch.stack([target[0] + 0.2, target[0] + 3.0])  # the second is clamped to an error of 1
    expected = [10 * math.log10(4 / 0.04), 10 * math.log10(4 / 1.0)]
    assert psnr(reconstruction, target).tolist() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="equal shapes"):
        psnr(target, target[:1])


def test_what_is_better_is_said_of_what_is_measured_and_as_the_metric_says_it():
    vae, pixels = AveragingAutoencoder(shift=1), images()
    assert set(measure_equivariance(vae, [pixels])) - set(BETTER) == {"latent_std", "sharpness"}
    metric = METRICS["equivariance"]()
    posterior = SimpleNamespace(mode=lambda: vae.encode(pixels).latents)
    metric.update({"autoencoder": vae, "images": pixels, "posteriors": posterior}, range(len(pixels)))
    figures = metric.compute()
    shared = BETTER.keys() & figures.keys()
    assert len(shared) == 8 and all(BETTER[name] == figures[name].better for name in shared)
