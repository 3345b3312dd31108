"""The transcription itself is checked against pieces that can be stated without it."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from . import sit_reference as reference


def test_patchify_is_the_strided_convolution():
    params = reference.random_parameters(patch_size=2)
    x, _, _ = reference.random_inputs(height=6, width=10)
    weight, bias = (torch.from_numpy(params[f"x_embedder.proj.{name}"]).double() for name in ("weight", "bias"))
    expected = F.conv2d(torch.from_numpy(x).double(), weight, bias, stride=2).flatten(2).transpose(1, 2)
    np.testing.assert_allclose(reference.patchify(params, x, 2), expected.numpy(), atol=1e-12)


def test_unpatchify_puts_each_patch_where_it_came_from():
    image = np.arange(2 * 3 * 4 * 6, dtype=np.float64).reshape(2, 3, 4, 6)
    tokens = image.reshape(2, 3, 2, 2, 3, 2).transpose(0, 2, 4, 3, 5, 1).reshape(2, 6, 12)
    np.testing.assert_array_equal(reference.unpatchify(tokens, 2, 3, 2), image)


def test_attention_is_scaled_dot_product_attention():
    params = reference.random_parameters(hidden_size=32)
    x = np.random.default_rng(0).standard_normal((2, 5, 32))
    qkv = torch.from_numpy(reference.linear(params, "blocks.0.attn.qkv", x)).reshape(2, 5, 3, 4, 8)
    mixed = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in qkv.unbind(2)))
    expected = reference.linear(params, "blocks.0.attn.proj", mixed.transpose(1, 2).reshape(2, 5, 32).numpy())
    np.testing.assert_allclose(reference.attention(params, "blocks.0.attn", x, 4), expected, atol=1e-12)


def test_activations_and_norm_match_torch():
    x = np.random.default_rng(0).standard_normal((4, 32)) * 3
    tensor = torch.from_numpy(x)
    np.testing.assert_allclose(reference.silu(x), F.silu(tensor).numpy(), atol=1e-12)
    np.testing.assert_allclose(reference.gelu_tanh(x), F.gelu(tensor, approximate="tanh").numpy(), atol=1e-12)
    np.testing.assert_allclose(reference.layer_norm(x), F.layer_norm(tensor, (32,), eps=1e-6).numpy(), atol=1e-12)


def test_positions_of_the_first_half_are_the_columns():
    grid = reference.positions_2d(16, 2, 3).reshape(2, 3, 16)
    np.testing.assert_array_equal(grid[0, :, :8], grid[1, :, :8])
    np.testing.assert_array_equal(grid[:, 0, 8:], grid[:, 2, 8:])
    np.testing.assert_allclose(grid[1, 2, :4], np.sin(2 * 10_000.0 ** (-np.arange(4) / 4)), atol=1e-12)
    np.testing.assert_allclose(grid[1, 2, 12:], np.cos(10_000.0 ** (-np.arange(4) / 4)), atol=1e-12)


def test_zero_gates_and_zero_final_layer_give_zero():
    params = reference.random_parameters()
    params["final_layer.linear.weight"] *= 0
    params["final_layer.linear.bias"] *= 0
    output = reference.sit_forward(params, *reference.random_inputs(), patch_size=2, num_heads=4)
    np.testing.assert_array_equal(output, np.zeros((3, 4, 8, 8)))


@pytest.mark.parametrize("name", sorted(reference.random_parameters(depth=1)))
def test_every_parameter_matters(name):
    params = reference.random_parameters(depth=1)
    inputs = reference.random_inputs()
    before = reference.sit_forward(params, *inputs, patch_size=2, num_heads=4)
    params[name] = params[name] + np.float32(0.1) * np.random.default_rng(5).standard_normal(params[name].shape)
    after = reference.sit_forward(params, *inputs, patch_size=2, num_heads=4)
    assert np.abs(after - before).max() > 1e-6
