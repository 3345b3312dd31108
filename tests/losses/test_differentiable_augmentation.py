"""DiffAugment against a transcription pixel by pixel, and its ranges."""

import numpy as np
import pytest
import torch

from diffusers_eqvae.losses.differentiable_augmentation import KINDS, augment


def by_hand(image: np.ndarray, u: np.ndarray, kinds) -> np.ndarray:
    """One image (C, H, W) in float64, with loops."""
    image = image.copy()
    channels, height, width = image.shape
    if "color" in kinds:
        image = image + (u[0] - 0.5)
        for y in range(height):
            for x in range(width):
                grey = image[:, y, x].sum() / channels
                image[:, y, x] = grey + 2 * u[1] * (image[:, y, x] - grey)
        mean = image.sum() / image.size
        image = mean + (u[2] + 0.5) * (image - mean)
    if "translation" in kinds:
        shifts = [int(u[3 + i] * (2 * (side // 8) + 1)) - side // 8 for i, side in enumerate((height, width))]
        moved = np.zeros_like(image)
        for y in range(height):
            for x in range(width):
                if 0 <= y + shifts[0] < height and 0 <= x + shifts[1] < width:
                    moved[:, y, x] = image[:, y + shifts[0], x + shifts[1]]
        image = moved
    if "cutout" in kinds:
        sizes = height // 2, width // 2
        centres = [int(u[5 + i] * (side + 1 - sizes[i] % 2)) for i, side in enumerate((height, width))]
        for dy in range(sizes[0]):
            for dx in range(sizes[1]):
                y, x = centres[0] - sizes[0] // 2 + dy, centres[1] - sizes[1] // 2 + dx
                if 0 <= y < height and 0 <= x < width:
                    image[:, y, x] = 0
    return image


@pytest.mark.parametrize("kinds", [(), *((kind,) for kind in KINDS), KINDS])
@pytest.mark.parametrize("sides", [(16, 24), (10, 18)])
def test_equals_a_transcription(kinds, sides):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, *sides, generator=generator, dtype=torch.float64) * 2 - 1
    uniforms = torch.rand(6, 7, generator=generator, dtype=torch.float64)
    uniforms[0], uniforms[1] = 0.0, 1 - 2**-53
    found = augment(images, uniforms, kinds)
    for image, u, ours in zip(images, uniforms, found, strict=True):
        np.testing.assert_allclose(ours.numpy(), by_hand(image.numpy(), u.numpy(), kinds), atol=1e-12)
    assert kinds or found is images


def test_shifts_and_cuts_reach_what_they_should_and_no_more():
    """Every shift of -2 .. 2 of 16 px, equally often; the cut rectangle inside has half the side."""
    grid = torch.linspace(0, 1, 501)[:-1]
    uniforms = torch.full((500, 7), 0.5)
    uniforms[:, 3] = grid
    spike = torch.zeros(500, 1, 16, 16)
    spike[:, :, 8, 8] = 1
    rows = augment(spike, uniforms, ("translation",)).amax((1, 3)).argmax(1)
    assert set(rows.tolist()) == {6, 7, 8, 9, 10} and rows.bincount()[6:].sub(100).abs().max() <= 1
    cut = augment(torch.ones(500, 1, 16, 16), uniforms, ("cutout",))
    assert (cut == 0).sum((1, 2, 3)).tolist() == [64] * 500


def test_gradients_pass_where_a_pixel_is_seen():
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    uniforms = torch.full((2, 7), 0.5)
    augment(images, uniforms, ("translation", "cutout")).sum().backward()
    assert images.grad.sum() == 2 * 3 * (16 * 16 - 8 * 8) and set(images.grad.unique().tolist()) == {0.0, 1.0}
