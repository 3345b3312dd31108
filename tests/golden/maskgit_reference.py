"""MaskGIT's transformer and loss in float64 numpy, from the paper's description and its PyTorch port's sizes.

Written sample by sample and head by head, with erf's GELU, so that nothing is shared with the implementation.
`weights` is a state dict as arrays under the names of `MaskGITTransformer2DModel`.
"""

from __future__ import annotations

import math

import numpy as np

_erf = np.vectorize(math.erf)


def layer_norm(x, weight, bias, eps):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * weight + bias


def gelu(x):
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def attention(x, weights, name, heads):
    width = x.shape[1]
    size = width // heads
    projected = linear(x, weights, f"{name}.to_qkv")
    query, key, value = projected[:, :width], projected[:, width : 2 * width], projected[:, 2 * width :]
    out = np.zeros_like(x)
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        scores = query[:, own] @ key[:, own].T / math.sqrt(size)
        scores = np.exp(scores - scores.max(1, keepdims=True))
        out[:, own] = (scores / scores.sum(1, keepdims=True)) @ value[:, own]
    return linear(out, weights, f"{name}.to_out")


def norm(x, weights, name, eps):
    return layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def forward(weights, tokens, label, *, codebook_size, num_layers, heads):
    """Logits (h * w, K) of one sample, and the states (h * w, D) after every block."""
    table = weights["token_embedder.weight"]
    sequence = [*np.ravel(tokens), codebook_size + 1 + label]
    x = table[sequence] + weights["pos_embed"][0]
    x = gelu(linear(norm(x, weights, "proj_in.0", 1e-12), weights, "proj_in.2"))
    x = linear(norm(x, weights, "proj_in.4", 1e-12), weights, "proj_in.6")
    states = []
    for number in range(num_layers):
        block = f"transformer_blocks.{number}"
        x = x + attention(norm(x, weights, f"{block}.norm1", 1e-5), weights, f"{block}.attn", heads)
        hidden = gelu(linear(norm(x, weights, f"{block}.norm2", 1e-5), weights, f"{block}.ff.0"))
        x = x + linear(hidden, weights, f"{block}.ff.3")
        states.append(x[:-1])
    x = gelu(linear(norm(x, weights, "proj_out.0", 1e-12), weights, "proj_out.2"))
    x = norm(x, weights, "proj_out.4", 1e-12)
    logits = x @ table.T + weights["logit_bias"]
    return logits[:-1, :codebook_size], states


def loss(logits, tokens, masked, smoothing):
    """Of one sample: cross-entropy of the masked tokens with a smoothed target, over their expected number."""
    total, vocabulary = 0.0, logits.shape[1]
    for scores, token, hidden in zip(logits, np.ravel(tokens), np.ravel(masked), strict=True):
        if hidden:
            log_p = scores - scores.max() - math.log(np.exp(scores - scores.max()).sum())
            target = np.full(vocabulary, smoothing / vocabulary)
            target[token] += 1 - smoothing
            total -= float((target * log_p).sum())
    return total / (np.size(tokens) * 2 / math.pi)
