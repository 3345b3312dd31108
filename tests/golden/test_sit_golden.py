"""SiTTransformer2DModel with converted weights against `sit_reference.sit_forward` (float64 numpy)."""

import numpy as np
import pytest
import torch

from diffusers_eqvae.conversion.sit import (
    convert_sit_state_dict,
    convert_sit_state_dict_to_published,
    infer_sit_config,
)
from diffusers_eqvae.models.transformer_sit import SiTTransformer2DModel, sincos_position_embedding

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


def converted_model(published: dict[str, torch.Tensor], family: str) -> SiTTransformer2DModel:
    config = infer_sit_config(published, family=family, num_attention_heads=HEADS)
    model = SiTTransformer2DModel(**config).eval()
    model.load_state_dict(convert_sit_state_dict(published, family=family))
    return model


def both(shape: dict[str, int], family: str, t: np.ndarray, timestep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(reference fed with t, our model fed with timestep) on the same weights and latents."""
    published = published_weights(shape)
    x, _, y = reference.random_inputs(**{k: shape[k] for k in ("channels", "height", "width")})
    arrays = {name: tensor.numpy() for name, tensor in published.items()}
    expected = reference.sit_forward(arrays, x, t, y, patch_size=shape["patch_size"], num_heads=HEADS)
    model = converted_model(published, family)
    with torch.no_grad():
        output = model(torch.from_numpy(x), torch.from_numpy(timestep), torch.from_numpy(y)).sample
    assert np.abs(expected).max() > 0.5
    return expected, output.numpy()


@pytest.mark.parametrize("shape", [SQUARE, RECTANGULAR])
def test_sit_weights_give_minus_the_published_velocity(shape):
    t = np.array([0.0, 0.3, 0.985])
    expected, output = both(shape, "SiT", t, 1000 * (1 - t))
    np.testing.assert_allclose(-output, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [SQUARE, RECTANGULAR])
def test_repa_weights_give_the_published_velocity_of_sigma(shape):
    sigma = np.array([0.02, 0.7, 1.0])
    expected, output = both(shape, "REPA", sigma, 1000 * sigma)
    np.testing.assert_allclose(output, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [SQUARE, RECTANGULAR])
def test_dit_weights_give_the_published_noise_at_integer_steps(shape):
    steps = np.array([0, 37, 999])
    expected, output = both(shape, "DiT", steps, steps)
    # An angle of 999 in float32 is up to 3e-5 away from float64, in the published network too.
    np.testing.assert_allclose(output, expected, atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(output[0], expected[0], atol=1e-5, rtol=1e-5)


def test_positions_are_the_published_table():
    expected = reference.positions_2d(48, 5, 7)
    np.testing.assert_allclose(sincos_position_embedding(5, 7, 48)[0].numpy(), expected, atol=1e-7)


@pytest.mark.parametrize("family", ["SiT", "REPA", "DiT"])
def test_conversion_back_is_the_identity(family):
    published = published_weights(RECTANGULAR)
    back = convert_sit_state_dict_to_published(
        convert_sit_state_dict(published, family=family), family=family, grid=(3, 1)
    )
    assert back.keys() == published.keys()
    for name, tensor in published.items():
        torch.testing.assert_close(back[name], tensor, atol=1e-7, rtol=1e-6, msg=name)


def test_config_comes_from_the_shapes():
    config = infer_sit_config(published_weights(RECTANGULAR), num_attention_heads=HEADS)
    assert config["sample_size"] == (12, 4)
    assert (config["patch_size"], config["in_channels"], config["num_layers"]) == (4, 3, 2)
    assert (config["attention_head_dim"], config["num_classes"], config["learn_sigma"]) == (8, 10, False)
    assert infer_sit_config(published_weights(SQUARE), num_attention_heads=HEADS)["learn_sigma"] is True


def test_config_refuses_unknown_heads_and_trained_positions():
    published = published_weights(SQUARE)
    with pytest.raises(ValueError, match="num_attention_heads"):
        infer_sit_config(published)
    published["pos_embed"] += torch.randn(published["pos_embed"].shape)
    with pytest.raises(ValueError, match="pos_embed"):
        infer_sit_config(published, num_attention_heads=HEADS)


def test_projectors_are_named_in_a_warning_and_belong_to_repa(caplog):
    published = published_weights(SQUARE) | {"projectors.0.0.weight": torch.ones(2, 2)}
    state_dict = convert_sit_state_dict(published, family="REPA")
    assert "projectors.0.0.weight" in caplog.text
    assert not any("projector" in name for name in state_dict)
    with pytest.raises(ValueError, match='family="REPA"'):
        convert_sit_state_dict(published)


def test_incomplete_and_foreign_state_dicts_are_refused():
    published = published_weights(SQUARE)
    without = {name: tensor for name, tensor in published.items() if "blocks.1.adaLN" not in name}
    with pytest.raises(ValueError, match=r"blocks\.1\.adaLN_modulation\.1"):
        convert_sit_state_dict(without)
    with pytest.raises(ValueError, match="'ema' or 'model'"):
        convert_sit_state_dict({"ema": torch.ones(1)})
    with pytest.raises(ValueError, match="family"):
        convert_sit_state_dict(published, family="PixArt")
