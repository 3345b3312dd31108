"""The published SiT/DiT network, transcribed from its equations into float64 numpy.

It exists to be compared with: it imports no torch and nothing of the package, is written for reading rather than
speed, and takes the parameter names of the published checkpoints. Sources of the equations: DiT (arXiv 2212.09748,
section 3.2, figure 3: adaLN-Zero), SiT (arXiv 2401.08740: the same network on raw t in [0, 1]), the sinusoidal
embeddings of "Attention is all you need" (arXiv 1706.03762, section 3.5) and MAE's fixed 2-D positions (arXiv
2111.06377, appendix A.1).

Golden numbers: `random_parameters(seed)` and `random_inputs(seed)` are deterministic (numpy's PCG64), so a test feeds
the same arrays to this file and to the class under test.
"""

from __future__ import annotations

import numpy as np

FREQUENCY_EMBEDDING_SIZE = 256
MAX_PERIOD = 10_000.0
NORM_EPS = 1e-6

Parameters = dict[str, np.ndarray]


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x)."""
    return x / (1.0 + np.exp(-x))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) (arXiv 1606.08415, section 2)."""
    return 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))


def layer_norm(x: np.ndarray) -> np.ndarray:
    """(x - mean) / sqrt(var + eps) over the last axis, population variance, without affine parameters."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + NORM_EPS)


def linear(params: Parameters, name: str, x: np.ndarray) -> np.ndarray:
    """x W^T + b, in float64."""
    return x @ params[f"{name}.weight"].astype(np.float64).T + params[f"{name}.bias"].astype(np.float64)


def modulate(x: np.ndarray, shift: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """x (1 + scale) + shift; x (B, N, D), shift and scale (B, D)."""
    return x * (1.0 + scale[:, None, :]) + shift[:, None, :]


def sincos_1d(size: int, positions: np.ndarray) -> np.ndarray:
    """[sin(p omega_i) | cos(p omega_i)], omega_i = 10000^(-i / (size/2)), i = 0 .. size/2 - 1; (N,) -> (N, size)."""
    half = size // 2
    omega = MAX_PERIOD ** (-np.arange(half, dtype=np.float64) / half)
    angles = positions[:, None].astype(np.float64) * omega[None, :]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def positions_2d(hidden_size: int, height: int, width: int) -> np.ndarray:
    """Fixed positions of an (h, w) grid, row-major, (h*w, D): first D/2 channels the column, last D/2 the row."""
    rows, columns = np.divmod(np.arange(height * width), width)
    return np.concatenate([sincos_1d(hidden_size // 2, columns), sincos_1d(hidden_size // 2, rows)], axis=1)


def embed_time(params: Parameters, t: np.ndarray) -> np.ndarray:
    """(B,) -> (B, D): the 256-d [cos | sin] code of t, then Linear-SiLU-Linear. SiT gives t in [0, 1], DiT 0..999."""
    half = FREQUENCY_EMBEDDING_SIZE // 2
    frequencies = np.exp(-np.log(MAX_PERIOD) * np.arange(half, dtype=np.float64) / half)
    angles = t.astype(np.float64)[:, None] * frequencies[None, :]
    code = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    return linear(params, "t_embedder.mlp.2", silu(linear(params, "t_embedder.mlp.0", code)))


def patchify(params: Parameters, x: np.ndarray, patch_size: int) -> np.ndarray:
    """The stride-p p x p convolution as a matrix product; (B, C, H, W) -> tokens (B, H/p * W/p, D), row-major."""
    batch, channels, height, width = x.shape
    rows, columns = height // patch_size, width // patch_size
    patches = x.astype(np.float64).reshape(batch, channels, rows, patch_size, columns, patch_size)
    patches = patches.transpose(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)
    weight = params["x_embedder.proj.weight"].astype(np.float64)
    return patches @ weight.reshape(weight.shape[0], -1).T + params["x_embedder.proj.bias"].astype(np.float64)


def unpatchify(tokens: np.ndarray, rows: int, columns: int, patch_size: int) -> np.ndarray:
    """Tokens (B, N, p*p*c), each laid out (p, q, c) with the channel last, -> (B, c, rows*p, columns*p)."""
    batch, _, features = tokens.shape
    channels = features // patch_size**2
    grid = tokens.reshape(batch, rows, columns, patch_size, patch_size, channels)
    return grid.transpose(0, 5, 1, 3, 2, 4).reshape(batch, channels, rows * patch_size, columns * patch_size)


def attention(params: Parameters, prefix: str, x: np.ndarray, num_heads: int) -> np.ndarray:
    """softmax(q k^T / sqrt(d)) v with the fused qkv laid out (3, heads, d), then the output projection."""
    batch, tokens, hidden = x.shape
    qkv = linear(params, f"{prefix}.qkv", x).reshape(batch, tokens, 3, num_heads, hidden // num_heads)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(hidden // num_heads)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return linear(params, f"{prefix}.proj", (weights @ v).transpose(0, 2, 1, 3).reshape(batch, tokens, hidden))


def block(params: Parameters, index: int, x: np.ndarray, condition: np.ndarray, num_heads: int) -> np.ndarray:
    """One adaLN-Zero block (DiT figure 3): two gated residual branches modulated by six vectors of the condition."""
    prefix = f"blocks.{index}"
    six = linear(params, f"{prefix}.adaLN_modulation.1", silu(condition))
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = np.split(six, 6, axis=1)
    branch = attention(params, f"{prefix}.attn", modulate(layer_norm(x), shift_msa, scale_msa), num_heads)
    x = x + gate_msa[:, None, :] * branch
    hidden = gelu_tanh(linear(params, f"{prefix}.mlp.fc1", modulate(layer_norm(x), shift_mlp, scale_mlp)))
    return x + gate_mlp[:, None, :] * linear(params, f"{prefix}.mlp.fc2", hidden)


def sit_forward(
    params: Parameters, x: np.ndarray, t: np.ndarray, y: np.ndarray, *, patch_size: int, num_heads: int
) -> np.ndarray:
    """The network's output, every channel of it (a checkpoint with learned sigma gives 2C; SiT keeps the first C).

    Args:
        params: arrays under the published names; the depth is read from them.
        x: latents (B, C, H, W), H and W divisible by the patch size.
        t: (B,) what the network embeds: SiT's t in [0, 1] (1 = data), or DiT's integer step.
        y: (B,) integer labels in 0 .. num_classes; num_classes is the null class.

    Returns:
        (B, out_channels, H, W) float64: SiT's own velocity (data - noise on the linear path), or DiT's noise.
    """
    rows, columns = x.shape[2] // patch_size, x.shape[3] // patch_size
    tokens = patchify(params, x, patch_size)
    tokens = tokens + positions_2d(tokens.shape[2], rows, columns)[None]
    condition = embed_time(params, t) + params["y_embedder.embedding_table.weight"].astype(np.float64)[y]
    depth = 1 + max(int(name.split(".")[1]) for name in params if name.startswith("blocks."))
    for index in range(depth):
        tokens = block(params, index, tokens, condition, num_heads)
    shift, scale = np.split(linear(params, "final_layer.adaLN_modulation.1", silu(condition)), 2, axis=1)
    tokens = linear(params, "final_layer.linear", modulate(layer_norm(tokens), shift, scale))
    return unpatchify(tokens, rows, columns, patch_size)


def random_parameters(
    seed: int = 0,
    *,
    hidden_size: int = 32,
    depth: int = 2,
    patch_size: int = 2,
    in_channels: int = 4,
    out_channels: int = 4,
    num_classes: int = 10,
    mlp_ratio: float = 4.0,
) -> Parameters:
    """Float32 arrays under the published names and shapes; nothing zero, so that every path reaches the output."""
    mlp = int(hidden_size * mlp_ratio)
    shapes: dict[str, tuple[int, ...]] = {"x_embedder.proj": (hidden_size, in_channels, patch_size, patch_size)}
    shapes["t_embedder.mlp.0"] = (hidden_size, FREQUENCY_EMBEDDING_SIZE)
    shapes["t_embedder.mlp.2"] = (hidden_size, hidden_size)
    for index in range(depth):
        shapes[f"blocks.{index}.attn.qkv"] = (3 * hidden_size, hidden_size)
        shapes[f"blocks.{index}.attn.proj"] = (hidden_size, hidden_size)
        shapes[f"blocks.{index}.mlp.fc1"] = (mlp, hidden_size)
        shapes[f"blocks.{index}.mlp.fc2"] = (hidden_size, mlp)
        shapes[f"blocks.{index}.adaLN_modulation.1"] = (6 * hidden_size, hidden_size)
    shapes["final_layer.linear"] = (patch_size**2 * out_channels, hidden_size)
    shapes["final_layer.adaLN_modulation.1"] = (2 * hidden_size, hidden_size)
    rng = np.random.default_rng(seed)
    params: Parameters = {}
    for name, shape in shapes.items():
        fan_in = int(np.prod(shape[1:]))
        params[f"{name}.weight"] = (rng.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)
        params[f"{name}.bias"] = (0.1 * rng.standard_normal(shape[0])).astype(np.float32)
    table = rng.standard_normal((num_classes + 1, hidden_size))
    params["y_embedder.embedding_table.weight"] = table.astype(np.float32)
    return params


def random_inputs(
    seed: int = 0, *, batch: int = 3, channels: int = 4, height: int = 8, width: int = 8, num_classes: int = 10
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Float32 latents (B, C, H, W), float32 t (B,) in (0, 1), and integer labels (B,) that include the null class."""
    rng = np.random.default_rng(seed + 1)
    x = rng.standard_normal((batch, channels, height, width)).astype(np.float32)
    t = rng.uniform(size=batch).astype(np.float32)
    y = rng.integers(0, num_classes, size=batch)
    y[-1] = num_classes
    return x, t, y
