"""The published LightningDiT network, transcribed from its equations into float64 numpy.

It exists to be compared with, like sit_reference.py, whose formulas it shares where they are the same: it imports no
torch and nothing of the package, and takes the tensor names of the published checkpoints. LightningDiT (arXiv
2501.01423) is SiT's network with any of RMSNorm (arXiv 1910.07467), SwiGLU (arXiv 2002.05202), rotary positions (RoPE,
arXiv 2104.09864, on two axes as in EVA-02, arXiv 2303.11331) and normalised queries and keys (arXiv 2302.05442). Each
shows in the tensor names. The variant without shifts (four modulation vectors instead of six) is not covered.

Everything is float64. Their code computes three things in float32 whatever the weights are: the time code, the
rotation tables and the inside of RMSNorm; against it as it stands, differences of about 1e-7 are to be expected.
"""

from __future__ import annotations

import numpy as np

from . import sit_reference
from .sit_reference import (
    MAX_PERIOD,
    NORM_EPS,
    Parameters,
    embed_time,
    gelu_tanh,
    layer_norm,
    linear,
    modulate,
    patchify,
    silu,
    unpatchify,
)

AFFINE_NORM_EPS = 1e-5


def norm(params: Parameters, name: str, x: np.ndarray) -> np.ndarray:
    """The norm that the names tell, over the last axis.

    No weight: layer norm without affine parameters, eps 1e-6. A weight w alone: RMSNorm, w x / sqrt(mean(x^2) + eps),
    eps 1e-6. A weight and a bias b: layer norm w (x - mean) / sqrt(var + eps) + b, eps 1e-5.
    """
    if f"{name}.weight" not in params:
        return layer_norm(x)
    weight = params[f"{name}.weight"].astype(np.float64)
    if f"{name}.bias" not in params:
        return weight * x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + NORM_EPS)
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + AFFINE_NORM_EPS)
    return weight * scaled + params[f"{name}.bias"].astype(np.float64)


def rotary_angles(head_dim: int, height: int, width: int) -> np.ndarray:
    """Angles of an (h, w) grid, row-major, (h*w, d/2), one for each pair of channels (d divisible by 4).

    omega_i = 10000^(-i / (d/4)), i = 0 .. d/4 - 1: the first d/4 pairs turn by row * omega, the last by column * omega
    (rows first, unlike the additive positions, where the columns come first).
    """
    rows, columns = np.divmod(np.arange(height * width, dtype=np.float64), width)
    omega = MAX_PERIOD ** (-np.arange(head_dim // 4, dtype=np.float64) / (head_dim // 4))
    return np.concatenate([rows[:, None] * omega, columns[:, None] * omega], axis=1)


def rotate(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Turns each pair of neighbours (a, b) = (x_2i, x_2i+1) to (a cos - b sin, b cos + a sin); x (..., N, d)."""
    a, b, cos, sin = x[..., 0::2], x[..., 1::2], np.cos(angles), np.sin(angles)
    return np.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)


def attention(params: Parameters, prefix: str, x: np.ndarray, num_heads: int, angles: np.ndarray | None) -> np.ndarray:
    """softmax(q k^T / sqrt(d)) v by heads; q and k of each head are first normalised (if named), then turned."""
    batch, tokens, hidden = x.shape
    head_dim = hidden // num_heads
    qkv = linear(params, f"{prefix}.qkv", x).reshape(batch, tokens, 3, num_heads, head_dim)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)
    if f"{prefix}.q_norm.weight" in params:
        q, k = norm(params, f"{prefix}.q_norm", q), norm(params, f"{prefix}.k_norm", k)
    if angles is not None:
        q, k = rotate(q, angles), rotate(k, angles)
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(head_dim)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return linear(params, f"{prefix}.proj", (weights @ v).transpose(0, 2, 1, 3).reshape(batch, tokens, hidden))


def feed_forward(params: Parameters, prefix: str, x: np.ndarray) -> np.ndarray:
    """SwiGLU, W3 (silu(x W1) * x W2) with W1 and W2 stacked in w12, W1 first; else W2 gelu_tanh(W1 x). All biased."""
    if f"{prefix}.w12.weight" not in params:
        return linear(params, f"{prefix}.fc2", gelu_tanh(linear(params, f"{prefix}.fc1", x)))
    gate, value = np.split(linear(params, f"{prefix}.w12", x), 2, axis=-1)
    return linear(params, f"{prefix}.w3", silu(gate) * value)


def block(
    params: Parameters, index: int, x: np.ndarray, condition: np.ndarray, num_heads: int, angles: np.ndarray | None
) -> np.ndarray:
    """One adaLN-Zero block: two gated residual branches modulated by six vectors of the condition."""
    prefix = f"blocks.{index}"
    six = linear(params, f"{prefix}.adaLN_modulation.1", silu(condition))
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = np.split(six, 6, axis=1)
    branch = modulate(norm(params, f"{prefix}.norm1", x), shift_msa, scale_msa)
    x = x + gate_msa[:, None, :] * attention(params, f"{prefix}.attn", branch, num_heads, angles)
    branch = modulate(norm(params, f"{prefix}.norm2", x), shift_mlp, scale_mlp)
    return x + gate_mlp[:, None, :] * feed_forward(params, f"{prefix}.mlp", branch)


def lightningdit_forward(
    params: Parameters, x: np.ndarray, t: np.ndarray, y: np.ndarray, *, num_heads: int, use_rope: bool | None = None
) -> np.ndarray:
    """The network's output, the first C channels of it (a checkpoint with learned sigma computes 2C).

    Args:
        params: arrays under the published names; depth, patch size and options are read from them.
        x: latents (B, C, H, W) of the grid that `pos_embed` is for.
        t: (B,) in [0, 1], 1 = data; it is embedded as it is, without a factor of 1000.
        y: (B,) integer labels in 0 .. num_classes; num_classes is the null class.
        num_heads: number of attention heads.
        use_rope: whether queries and keys are turned; None: if the checkpoint has the buffer `feat_rope.freqs_cos`.
            The angles are computed here, not read from the (float32) buffers.

    Returns:
        (B, C, H, W) float64: the velocity (data - noise on the linear path).
    """
    patch_size = params["x_embedder.proj.weight"].shape[-1]
    rows, columns = x.shape[2] // patch_size, x.shape[3] // patch_size
    tokens = patchify(params, x, patch_size) + params["pos_embed"].astype(np.float64)
    condition = embed_time(params, t) + params["y_embedder.embedding_table.weight"].astype(np.float64)[y]
    if use_rope is None:
        use_rope = "feat_rope.freqs_cos" in params
    angles = rotary_angles(tokens.shape[2] // num_heads, rows, columns) if use_rope else None
    depth = 1 + max(int(name.split(".")[1]) for name in params if name.startswith("blocks."))
    for index in range(depth):
        tokens = block(params, index, tokens, condition, num_heads, angles)
    shift, scale = np.split(linear(params, "final_layer.adaLN_modulation.1", silu(condition)), 2, axis=1)
    tokens = modulate(norm(params, "final_layer.norm_final", tokens), shift, scale)
    image = unpatchify(linear(params, "final_layer.linear", tokens), rows, columns, patch_size)
    return image[:, : x.shape[1]]


def random_parameters(
    seed: int = 0,
    *,
    use_rmsnorm: bool = True,
    use_swiglu: bool = True,
    use_rope: bool = True,
    use_qknorm: bool = True,
    grid_size: int = 4,
    num_heads: int = 4,
    hidden_size: int = 48,
    depth: int = 2,
    patch_size: int = 1,
    in_channels: int = 4,
    out_channels: int = 4,
    num_classes: int = 10,
) -> Parameters:
    """Float32 arrays under the published names and shapes, buffers included; norms and positions are random too."""
    params = sit_reference.random_parameters(
        seed,
        hidden_size=hidden_size,
        depth=depth,
        patch_size=patch_size,
        in_channels=in_channels,
        out_channels=out_channels,
        num_classes=num_classes,
    )
    rng = np.random.default_rng(seed + 2)
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, grid_size**2, hidden_size)}
    if use_rmsnorm:
        shapes["final_layer.norm_final.weight"] = (hidden_size,)
    for prefix in (f"blocks.{index}" for index in range(depth)):
        if use_rmsnorm:
            shapes[f"{prefix}.norm1.weight"] = shapes[f"{prefix}.norm2.weight"] = (hidden_size,)
        for name in ("q_norm", "k_norm") if use_qknorm else ():
            for kind in ("weight",) if use_rmsnorm else ("weight", "bias"):
                shapes[f"{prefix}.attn.{name}.{kind}"] = (hidden_size // num_heads,)
        if use_swiglu:
            for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
                del params[f"{prefix}.mlp.{name}"]
            mlp = int(2 / 3 * 4 * hidden_size)
            shapes[f"{prefix}.mlp.w12.weight"], shapes[f"{prefix}.mlp.w12.bias"] = (2 * mlp, hidden_size), (2 * mlp,)
            shapes[f"{prefix}.mlp.w3.weight"], shapes[f"{prefix}.mlp.w3.bias"] = (hidden_size, mlp), (hidden_size,)
    for name, shape in shapes.items():
        scale = 1.0 / np.sqrt(shape[-1]) if len(shape) == 2 else 0.3
        offset = 1.0 if name.endswith("weight") and len(shape) == 1 else 0.0
        params[name] = (offset + scale * rng.standard_normal(shape)).astype(np.float32)
    if use_rope:
        angles = np.repeat(rotary_angles(hidden_size // num_heads, grid_size, grid_size), 2, axis=1)
        params["feat_rope.freqs_cos"] = np.cos(angles).astype(np.float32)
        params["feat_rope.freqs_sin"] = np.sin(angles).astype(np.float32)
    return params
