"""SiTTransformer2DModel with converted weights against `sit_reference.sit_forward` (float64 numpy)."""

import numpy as np
import pytest
import torch

from diffusers_eqvae.conversion import from_published
from diffusers_eqvae.models.positions import sincos_position_embedding

from . import sit_reference as reference

HEADS = 4
SQUARE = {"height": 8, "width": 8, "patch_size": 2, "channels": 4, "out_channels": 8}
RECTANGULAR = {"height": 12, "width": 4, "patch_size": 4, "channels": 3, "out_channels": 3}


def published_weights(shape: dict[str, int], seed: int = 0) -> dict[str, torch.Tensor]:
    params = reference.random_parameters(
        seed, patch_size=shape["patch_size"], in_channels=shape["channels"], out_channels=shape["out_channels"]
    )
    grid = (shape["height"] // shape["patch_size"], shape["width"] // shape["patch_size"])
    table = reference.positions_2d(32, *grid).astype(np.float32)[None]
    return {name: torch.from_numpy(array) for name, array in {**params, "pos_embed": table}.items()}


def both(shape: dict[str, int], layout: str, t: np.ndarray, timestep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(reference fed with t, our model fed with timestep) on the same weights and latents."""
    published = published_weights(shape)
    x, _, y = reference.random_inputs(**{k: shape[k] for k in ("channels", "height", "width")})
    arrays = {name: tensor.numpy() for name, tensor in published.items()}
    expected = reference.sit_forward(arrays, x, t, y, patch_size=shape["patch_size"], num_heads=HEADS)
    model = from_published(published, layout=layout, num_attention_heads=HEADS)
    with torch.no_grad():
        output = model(torch.from_numpy(x), torch.from_numpy(timestep), torch.from_numpy(y)).sample
    assert np.abs(expected).max() > 0.5
    return expected, output.numpy()


@pytest.mark.parametrize("shape", [SQUARE, RECTANGULAR])
def test_sit_weights_give_minus_the_published_velocity(shape):
    t = np.array([0.0, 0.3, 0.985])
    expected, output = both(shape, "sit", t, 1000 * (1 - t))
    np.testing.assert_allclose(-output, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [SQUARE, RECTANGULAR])
def test_repa_weights_give_the_published_velocity_of_sigma(shape):
    sigma = np.array([0.02, 0.7, 1.0])
    expected, output = both(shape, "repa", sigma, 1000 * sigma)
    np.testing.assert_allclose(output, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [SQUARE, RECTANGULAR])
def test_dit_weights_give_the_published_noise_at_integer_steps(shape):
    steps = np.array([0, 37, 999])
    expected, output = both(shape, "dit", steps, steps)
    # An angle of 999 in float32 is up to 3e-5 away from float64, in the published network too.
    np.testing.assert_allclose(output, expected, atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(output[0], expected[0], atol=1e-5, rtol=1e-5)


def test_positions_are_the_published_table():
    expected = reference.positions_2d(48, 5, 7)
    np.testing.assert_allclose(sincos_position_embedding(5, 7, 48)[0].numpy(), expected, atol=1e-7)
