"""taming-transformers' VQ-GAN as functions of its published tensors, written from its layout for parity tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def normed(x, w, name):
    return F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)


def conv(x, w, name, **options):
    return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **options)


def swish(x):
    return x * torch.sigmoid(x)


def resnet(x, w, name):
    h = conv(swish(normed(x, w, f"{name}.norm1")), w, f"{name}.conv1", padding=1)
    h = conv(swish(normed(h, w, f"{name}.norm2")), w, f"{name}.conv2", padding=1)
    return h + (conv(x, w, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.weight" in w else x)


def attention(x, w, name):
    batch, channels, height, width = x.shape
    h = normed(x, w, f"{name}.norm")
    q, k, v = (conv(h, w, f"{name}.{part}").flatten(2) for part in ("q", "k", "v"))
    weights = torch.einsum("bci,bcj->bij", q, k).mul(channels**-0.5).softmax(2)
    mixed = torch.einsum("bij,bcj->bci", weights, v).view(batch, channels, height, width)
    return x + conv(mixed, w, f"{name}.proj_out")


def middle(x, w, half):
    return resnet(attention(resnet(x, w, f"{half}.mid.block_1"), w, f"{half}.mid.attn_1"), w, f"{half}.mid.block_2")


def level(x, w, name, blocks):
    for number in range(blocks):
        x = resnet(x, w, f"{name}.block.{number}")
        if f"{name}.attn.{number}.norm.weight" in w:
            x = attention(x, w, f"{name}.attn.{number}")
    return x


def encode(pixels, w, *, levels, blocks):
    """The latents before quantising."""
    x = conv(pixels, w, "encoder.conv_in", padding=1)
    for number in range(levels):
        x = level(x, w, f"encoder.down.{number}", blocks)
        if number < levels - 1:
            x = conv(F.pad(x, (0, 1, 0, 1)), w, f"encoder.down.{number}.downsample.conv", stride=2)
    x = conv(swish(normed(middle(x, w, "encoder"), w, "encoder.norm_out")), w, "encoder.conv_out", padding=1)
    return conv(x, w, "quant_conv")


def decode(tokens, w, *, levels, blocks):
    """Pixels of tokens (B, h, w)."""
    x = conv(w["quantize.embedding.weight"][tokens].permute(0, 3, 1, 2), w, "post_quant_conv")
    x = middle(conv(x, w, "decoder.conv_in", padding=1), w, "decoder")
    for number in reversed(range(levels)):
        x = level(x, w, f"decoder.up.{number}", blocks + 1)
        if number:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = conv(x, w, f"decoder.up.{number}.upsample.conv", padding=1)
    return conv(swish(normed(x, w, "decoder.norm_out")), w, "decoder.conv_out", padding=1)


def published_weights(widths=(32, 32, 64), *, blocks=2, attended=(2,), latent_channels=6, codebook=(20, 4)):
    """Random tensors in every layer, under the published names."""
    generator, w = torch.Generator().manual_seed(0), {}

    def add(name, out, into, kernel=3):
        w[f"{name}.weight"] = torch.randn((out, into, kernel, kernel), generator=generator) / (into**0.5 * kernel)
        w[f"{name}.bias"] = 0.3 * torch.randn(out, generator=generator)

    def add_norm(name, width):
        w[f"{name}.weight"] = 1 + 0.3 * torch.randn(width, generator=generator)
        w[f"{name}.bias"] = 0.3 * torch.randn(width, generator=generator)

    def add_resnet(name, into, out):
        add_norm(f"{name}.norm1", into)
        add(f"{name}.conv1", out, into)
        add_norm(f"{name}.norm2", out)
        add(f"{name}.conv2", out, out)
        if into != out:
            add(f"{name}.nin_shortcut", out, into, 1)

    def add_attention(name, width):
        add_norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            add(f"{name}.{part}", width, width, 1)

    def add_half(half, order, count, resample, width):
        for number in order:
            for block in range(count):
                add_resnet(f"{half}.{number}.block.{block}", width, widths[number])
                width = widths[number]
                if number in attended:
                    add_attention(f"{half}.{number}.attn.{block}", width)
            if number != order[-1]:
                add(f"{half}.{number}.{resample}.conv", width, width)

    def add_middle(half):
        add_resnet(f"{half}.mid.block_1", widths[-1], widths[-1])
        add_attention(f"{half}.mid.attn_1", widths[-1])
        add_resnet(f"{half}.mid.block_2", widths[-1], widths[-1])

    levels = list(range(len(widths)))
    add("encoder.conv_in", widths[0], 3)
    add_half("encoder.down", levels, blocks, "downsample", widths[0])
    add_middle("encoder")
    add_norm("encoder.norm_out", widths[-1])
    add("encoder.conv_out", latent_channels, widths[-1])
    add("quant_conv", codebook[1], latent_channels, 1)
    w["quantize.embedding.weight"] = torch.randn(codebook, generator=generator)
    add("post_quant_conv", latent_channels, codebook[1], 1)
    add("decoder.conv_in", widths[-1], latent_channels)
    add_middle("decoder")
    add_half("decoder.up", levels[::-1], blocks + 1, "upsample", widths[-1])
    add_norm("decoder.norm_out", widths[0])
    add("decoder.conv_out", 3, widths[0])
    return w
