"""A plain SiT and its training step, written the way published training code is: what gpu.py compares with.

The network of the papers (DiT, arXiv 2212.09748, section 3.2; SiT, arXiv 2401.08740) as a straightforward module: one
adaLN layer in every block, query-key-value reshapes, a fixed table at the input. The step updates AdamW in its
default form, the moving average parameter by parameter, and reads the loss back every time.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def shifted(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.second_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.adaptive = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def attention(self, x: Tensor) -> Tensor:
        size, tokens, width = x.shape
        parts = self.query_key_value(x).reshape(size, tokens, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.out(attended.transpose(1, 2).reshape(size, tokens, width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        a, b, c, d, e, f = self.adaptive(condition).chunk(6, dim=1)
        x = x + c.unsqueeze(1) * self.attention(shifted(self.first_norm(x), a, b))
        hidden = F.gelu(self.up(shifted(self.second_norm(x), d, e)), approximate="tanh")
        return x + f.unsqueeze(1) * self.down(hidden)


class PlainSiT(nn.Module):
    """(latents (B, C, h, w), t (B,), labels (B,)) -> velocity (B, C, h, w)."""

    def __init__(self, *, depth: int, width: int, heads: int, side: int, patch: int = 2, channels: int = 4) -> None:
        super().__init__()
        self.patch, self.channels, self.grid = patch, channels, side // patch
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, self.grid**2, width), requires_grad=False)
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.labels = nn.Embedding(1001, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.adaptive = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.out = nn.Linear(width, patch * patch * channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        angles = t[:, None] * frequencies
        condition = self.time(torch.cat([angles.cos(), angles.sin()], dim=1)) + self.labels(y)
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.adaptive(condition).chunk(2, dim=1)
        x = self.out(shifted(self.norm(x), shift, scale))
        x = x.reshape(len(x), self.grid, self.grid, self.patch, self.patch, self.channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), self.channels, *[self.grid * self.patch] * 2)


def plain_step(model: PlainSiT, latents: Tensor, labels: Tensor, *, bf16: bool) -> Callable[[], float]:
    """One step of training on these latents; gives the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def step() -> float:
        noise, t = torch.randn_like(latents), torch.rand(len(latents), device=latents.device)
        s = t.view(-1, 1, 1, 1)
        dropped = torch.rand(len(labels), device=labels.device) < 0.1
        y = torch.where(dropped, torch.full_like(labels, 1000), labels)
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=bf16):
            predicted = model(s * latents + (1 - s) * noise, t, y)
        loss = (predicted.float() - (latents - noise)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                average[name].mul_(0.9999).add_(parameter, alpha=1 - 0.9999)
        return loss.item()

    return step
