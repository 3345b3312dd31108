"""Images as tokens: which vector of a VQ autoencoder's codebook lies nearest to each raw latent (arXiv 1711.00937).

    token = argmin_k |z - e_k|,    z what the encoder gives before it is quantised (the raw latents)

Any autoencoder with diffusers' `quantize` (VQModel, `VQModelEQ`) has a codebook; nothing here asks for its class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .autoencoders import Autoencoder, Decoded, decode, encode

DEAD_AFTER_STEPS = 100


def has_codebook(vae: Autoencoder) -> bool:
    """Whether an autoencoder quantises its latents, so that images can be tokens."""
    return hasattr(vae, "quantize")


def codebook(vae: Autoencoder) -> Tensor:
    """The vectors e_k of the codebook, (K, D).

    Raises:
        ValueError: an autoencoder without one.

    Example:
        >>> codebook(VQModelEQ.from_pretrained("runs/eq-vqgan")).shape
        torch.Size([1024, 256])
    """
    if not has_codebook(vae):
        raise ValueError(f"Tokens need an autoencoder with a codebook (VQModel); {type(vae).__name__} has none.")
    return vae.quantize.embedding.weight


@dataclass(frozen=True)
class Quantized:
    """Raw latents (B, D, h, w) at the nearest vectors of a codebook.

    Args:
        codes: (B, D, h, w), those vectors; gradients reach the codebook.
        tokens: (B, h, w) int64, their numbers.
    """

    codes: Tensor
    tokens: Tensor


def quantize(raw_latents: Tensor, vectors: Tensor) -> Quantized:
    """The nearest of `vectors` (K, D) to each raw latent of (B, D, h, w); ties go to the lower number.

    Example:
        >>> quantize(torch.tensor([[[[0.2, 0.9]]]]), torch.tensor([[0.0], [1.0]])).tokens
        tensor([[[0, 1]]])
    """
    batch_size, channels, height, width = raw_latents.shape
    flat = raw_latents.permute(0, 2, 3, 1).reshape(-1, channels).to(_math_dtype(raw_latents))
    tokens = torch.cdist(flat.detach(), vectors.detach().to(flat.dtype)).argmin(1).view(batch_size, height, width)
    return Quantized(F.embedding(tokens, vectors).permute(0, 3, 1, 2), tokens)


def encode_tokens(vae: Autoencoder, pixels: Tensor) -> Tensor:
    """Tokens (B, h, w) int64 of pixels (B, 3, H, W) in [-1, 1].

    Example:
        >>> encode_tokens(vae, torch.zeros(1, 3, 256, 256)).shape
        torch.Size([1, 16, 16])
    """
    return quantize(encode(vae, pixels).mode(), codebook(vae)).tokens


def decode_tokens(vae: Autoencoder, tokens: Tensor) -> Tensor:
    """Pixels (B, 3, H, W), nominally in [-1, 1] and not clamped, of tokens (B, h, w).

    Raises:
        ValueError: a token that is not a number of the codebook, such as one still masked.

    Example:
        >>> decode_tokens(vae, encode_tokens(vae, pixels))
    """
    vectors = codebook(vae)
    if tokens.numel() and not 0 <= tokens.min() <= tokens.max() < len(vectors):
        raise ValueError(
            f"Tokens must lie in 0 .. {len(vectors) - 1}, the numbers of the codebook; got {int(tokens.min())} .. "
            f"{int(tokens.max())}. They belong to another autoencoder, or sampling has not finished."
        )
    if vae.config.lookup_from_codebook:
        return vae.decode(tokens, force_not_quantize=True, shape=(*tokens.shape, vectors.shape[1])).sample
    codes = F.embedding(tokens.to(vectors.device), vectors).permute(0, 3, 1, 2).to(tokens.device)
    return vae.decode(codes, force_not_quantize=True).sample


def decode_with_terms(vae: Autoencoder, raw_latents: Tensor) -> Decoded:
    """A decoding to train on: pixels, and of a codebook its two losses and the tokens (VQ-VAE, eq. 3).

        codebook   = mean |sg(z) - e|^2           moves the vectors to the latents
        commitment = beta * mean |z - sg(e)|^2    keeps the latents near their vectors, beta = `vae.quantize.beta`

    with the straight-through gradient d e / d z = 1. A continuous autoencoder has no terms.

    Differs from the reference: taming-transformers and diffusers' own loss multiply the codebook's term by beta and
    leave the commitment's alone ("legacy"), the reverse of the paper; here they stand as in the paper.
    """
    if not has_codebook(vae):
        return Decoded(decode(vae, raw_latents))
    quantized = quantize(raw_latents, codebook(vae))
    dtype = _math_dtype(raw_latents)
    latents, codes = raw_latents.to(dtype), quantized.codes.to(dtype)
    terms = {
        "codebook": F.mse_loss(codes, latents.detach()),
        "commitment": vae.quantize.beta * F.mse_loss(latents, codes.detach()),
    }
    passed = latents + (codes - latents).detach()
    spatial = passed if vae.config.norm_type == "spatial" else None
    return Decoded(vae.decoder(vae.post_quant_conv(passed), spatial), terms, quantized.tokens)


def perplexity(shares: Tensor) -> Tensor:
    """exp(entropy) of shares (K,) that sum to 1: K where all vectors are used alike, 1 where only one is."""
    return torch.special.entr(shares).sum().exp()


def describe_usage(counts: Sequence[int]) -> str:
    """In words, how much of a codebook is used, from how often each vector is.

    Example:
        >>> describe_usage([3, 3, 0])
        '2 of 3 vectors of the codebook are used, perplexity 2.0'
    """
    numbers = torch.tensor(counts, dtype=torch.float64)
    used, effective = int((numbers > 0).sum()), perplexity(numbers / numbers.sum()).item()
    return f"{used} of {len(counts)} vectors of the codebook are used, perplexity {effective:.1f}"


class CodebookUsage:
    """How much of a codebook is in use, from the tokens of each step; without waiting for the device.

    Args:
        size: K.

    Example:
        >>> CodebookUsage(4).figures(torch.tensor([0.5, 0.5, 0.0, 0.0]), step=0)["codebook/perplexity"]
        tensor(2.)
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._last_used: Tensor | None = None

    def shares(self, tokens: Tensor) -> Tensor:
        """(K,) float32: which share of the tokens each vector has. The mean over ranks is that of the whole batch."""
        counts = torch.zeros(self.size, device=tokens.device)
        return counts.scatter_add_(0, tokens.flatten(), torch.ones_like(tokens.flatten(), dtype=counts.dtype)) / (
            tokens.numel()
        )

    def figures(self, shares: Tensor, step: int) -> dict[str, Tensor]:
        """Of a step's shares over all ranks.

        Returns:
            `codebook/usage`, the share of vectors used in this step; `codebook/perplexity`, exp(entropy of shares),
            K where all are used alike; `codebook/dead`, how many vectors no step has used for `DEAD_AFTER_STEPS`
            (those of a run that has just begun, or been resumed, count as used then).
        """
        if self._last_used is None:
            self._last_used = torch.full_like(shares, step)
        used = shares > 0
        self._last_used = torch.where(used, step, self._last_used)
        return {
            "codebook/usage": used.float().mean(),
            "codebook/perplexity": perplexity(shares),
            "codebook/dead": (step - self._last_used >= DEAD_AFTER_STEPS).sum(),
        }


def _math_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
