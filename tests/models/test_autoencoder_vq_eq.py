"""VQModelEQ and tokens: the paper's losses, the straight-through gradient, usage, and the stock artefact."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import VQModel

from diffusers_eqvae.autoencoders import decode, downsampling_factor, encode, is_deterministic, latent_channels
from diffusers_eqvae.latents import LatentNormalization
from diffusers_eqvae.models.autoencoder_vq_eq import VQModelEQ
from diffusers_eqvae.objectives.autoencoder import AutoencoderObjective
from diffusers_eqvae.provenance import autoencoder_identity, require_same_autoencoder
from diffusers_eqvae.randomness import StepRandomness
from diffusers_eqvae.regularizers import EquivarianceRegularizer
from diffusers_eqvae.tokens import (
    DEAD_AFTER_STEPS,
    CodebookUsage,
    codebook,
    decode_tokens,
    decode_with_terms,
    encode_tokens,
    has_codebook,
    quantize,
)

OPTIONS = {
    "block_out_channels": (8, 8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "vq_embed_dim": 6,
    "num_vq_embeddings": 32,
    "mid_block_add_attention": False,
}


def build(cls=VQModelEQ, **options):
    torch.manual_seed(0)
    vae = cls(**OPTIONS | options).eval()
    torch.nn.init.normal_(vae.quantize.embedding.weight)
    return vae


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(3, 3, 32, 24) * 2 - 1


def paper(latents: np.ndarray, vectors: np.ndarray, beta: float):
    """VQ-VAE, eqs. 1-3, one latent at a time: token, |sg(z) - e|^2 and beta |z - sg(e)|^2, and the gradient in z."""
    tokens, distances = np.zeros(len(latents), dtype=int), np.zeros(len(latents))
    gradient = np.zeros_like(latents)
    for n, z in enumerate(latents):
        squares = [sum((a - b) ** 2 for a, b in zip(z, e, strict=True)) for e in vectors]
        tokens[n] = min(range(len(vectors)), key=squares.__getitem__)
        distances[n] = squares[tokens[n]]
        gradient[n] = 2 * beta * (z - vectors[tokens[n]]) / latents.size
    mean = distances.sum() / latents.size
    return tokens, mean, beta * mean, gradient


def test_the_losses_are_the_papers_in_float64(pixels):
    vae = build(commitment_weight=0.3).double()
    raw_latents = encode(vae, pixels.double()).mode().detach().requires_grad_()
    decoded = decode_with_terms(vae, raw_latents)
    flat = raw_latents.detach().permute(0, 2, 3, 1).reshape(-1, 6).numpy()
    tokens, by_codebook, by_commitment, gradient = paper(flat, codebook(vae).detach().numpy(), 0.3)
    assert decoded.tokens.flatten().tolist() == tokens.tolist()
    assert decoded.terms["codebook"].item() == pytest.approx(by_codebook, rel=1e-12)
    assert decoded.terms["commitment"].item() == pytest.approx(by_commitment, rel=1e-12)
    # Each moves what it should: the commitment the latents alone, the codebook's term the vectors alone.
    (to_latents,) = torch.autograd.grad(decoded.terms["commitment"], raw_latents, retain_graph=True)
    np.testing.assert_allclose(to_latents.permute(0, 2, 3, 1).reshape(-1, 6).numpy(), gradient, rtol=1e-10)
    vectors = codebook(vae)
    assert torch.autograd.grad(decoded.terms["commitment"], vectors, retain_graph=True, allow_unused=True) == (None,)
    assert torch.autograd.grad(decoded.terms["codebook"], raw_latents, retain_graph=True, allow_unused=True) == (None,)
    (to_vectors,) = torch.autograd.grad(decoded.terms["codebook"], vectors)
    used = np.unique(tokens)
    assert to_vectors.abs().sum(1).nonzero().flatten().tolist() == used.tolist()


def test_diffusers_gives_beta_to_the_other_term(pixels):
    """So its default is not used: with it a codebook of beta .25 learns at a quarter of the rate."""
    stock, ours = build(VQModel).double(), build().double()
    raw_latents = encode(ours, pixels.double()).mode()
    terms = decode_with_terms(ours, raw_latents).terms
    ratio = 0.25
    assert stock.quantize.legacy and not ours.quantize.legacy
    swapped = ratio * terms["codebook"] + terms["commitment"] / ratio
    assert stock.decode(raw_latents).commit_loss.item() == pytest.approx(swapped.item(), rel=1e-12)
    assert ours.decode(raw_latents).commit_loss.item() == pytest.approx(sum(terms.values()).item(), rel=1e-12)
    gradients = [
        torch.autograd.grad(loss, vae.quantize.embedding.weight)[0]
        for vae, loss in ((stock, stock.decode(raw_latents).commit_loss), (ours, terms["codebook"]))
    ]
    torch.testing.assert_close(gradients[0], 0.25 * gradients[1])


SPATIAL = {"norm_type": "spatial", "block_out_channels": (32, 32, 32), "vq_embed_dim": None}


@pytest.mark.parametrize("options", [{}, SPATIAL], ids=["group", "spatial"])
def test_the_gradient_of_the_pixels_passes_straight_through(pixels, options):
    vae = build(**options).double()
    raw_latents = encode(vae, pixels.double()).mode().detach().requires_grad_()
    decoded = decode_with_terms(vae, raw_latents)
    codes = quantize(raw_latents, codebook(vae)).codes.detach().requires_grad_()
    spatial = codes if options else None
    direct = vae.decoder(vae.post_quant_conv(codes), spatial)
    torch.testing.assert_close(decoded.pixels, direct)
    weights = torch.randn_like(direct)
    (ours,) = torch.autograd.grad((decoded.pixels * weights).sum(), raw_latents)
    (at_codes,) = torch.autograd.grad((direct * weights).sum(), codes)
    torch.testing.assert_close(ours, at_codes)
    assert ours.abs().sum() > 0


@torch.no_grad()
def test_tokens_are_those_that_decode_quantises_to(pixels):
    vae = build()
    raw_latents = encode(vae, pixels).mode()
    assert raw_latents.shape == (3, latent_channels(vae), 8, 6) and latent_channels(vae) == 6
    assert is_deterministic(vae) and has_codebook(vae)
    tokens = vae.encode_tokens(pixels)
    assert tokens.shape == (3, 8, 6) and tokens.dtype == torch.int64
    assert torch.equal(tokens.flatten(), vae.quantize(raw_latents)[2][2])
    torch.testing.assert_close(vae.decode_tokens(tokens), decode(vae, raw_latents), rtol=1e-4, atol=1e-5)
    looked_up = build(lookup_from_codebook=True)
    torch.testing.assert_close(looked_up.decode_tokens(tokens), vae.decode_tokens(tokens))
    assert torch.equal(encode_tokens(vae.to(memory_format=torch.channels_last), pixels), tokens)


def test_what_are_not_tokens_of_this_codebook_is_refused(pixels, tiny_autoencoder_kl):
    vae = build()
    for wrong in (32, -1):
        with pytest.raises(ValueError, match=r"Tokens must lie in 0 \.\. 31.*belong to another autoencoder, or sampl"):
            decode_tokens(vae, torch.full((1, 4, 4), wrong))
    with pytest.raises(ValueError, match=r"need an autoencoder with a codebook \(VQModel\); AutoencoderKL has none"):
        encode_tokens(tiny_autoencoder_kl, pixels)


def test_usage_perplexity_and_dead_vectors():
    usage = CodebookUsage(8)
    shares = usage.shares(torch.tensor([[[0, 1], [2, 3]]]))
    assert shares.tolist() == [0.25] * 4 + [0.0] * 4
    for step in (0, DEAD_AFTER_STEPS - 1):
        figures = {name: value.item() for name, value in usage.figures(shares, step).items()}
        assert figures == pytest.approx({"codebook/usage": 0.5, "codebook/perplexity": 4.0, "codebook/dead": 0})
    uneven = usage.shares(torch.tensor([0, 0, 0, 1]))
    figures = usage.figures(uneven, DEAD_AFTER_STEPS)
    assert figures["codebook/dead"].item() == 4  # 2 and 3 were used one step ago
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert figures["codebook/perplexity"].item() == pytest.approx(math.exp(entropy))
    # The mean of two ranks' shares is the share of both ranks' tokens together.
    first, second = torch.randint(8, (2, 3, 5, 5))
    together = usage.shares(torch.cat([first, second]))
    torch.testing.assert_close((usage.shares(first) + usage.shares(second)) / 2, together)


def test_a_saved_model_is_a_stock_one(tmp_path, pixels):
    vae = build(padding_mode="zeros")
    LatentNormalization(mean=(0.1,) * 6, std=(2.0,) * 6).apply_to(vae)
    vae.save_pretrained(tmp_path)
    stock = VQModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(stock(pixels).sample, vae(pixels).sample)
    code = f"""
import diffusers_eqvae, torch
from diffusers import AutoModel
vae = AutoModel.from_pretrained({str(tmp_path)!r})
assert type(vae) is diffusers_eqvae.VQModelEQ and not vae.quantize.legacy and vae.quantize.beta == 0.25
assert diffusers_eqvae.LatentNormalization.from_vae(vae).std == (2.0,) * 6
print(vae.encode_tokens(torch.zeros(1, 3, 16, 16)).flatten().tolist())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(vae.encode_tokens(torch.zeros(1, 3, 16, 16)).flatten().tolist())


def test_the_codebook_is_part_of_the_identity():
    vae, other = build(), build()
    require_same_autoencoder(autoencoder_identity(vae), other)
    with torch.no_grad():
        other.quantize.embedding.weight[3] += 0.5
    with pytest.raises(ValueError, match="its codebook differ; use the autoencoder that"):
        require_same_autoencoder(autoencoder_identity(vae), other)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_tau_acts_before_quantising_and_the_terms_are_of_what_was_decoded(reduction):
    vae, pixels = build(), torch.rand(2, 3, 32, 32) * 2 - 1
    regularizers = {"equivariance": EquivarianceRegularizer(4, p_equivariance=1.0)}
    objective = AutoencoderObjective(vae, regularizers, reduction=reduction)
    batch = {"pixel_values": pixels}
    draw = objective.draw(batch, StepRandomness(seed=1))
    tau = draw["regularizers"]["equivariance"].tau
    output = objective(batch, draw)
    transformed = tau.apply_to_latents(encode(vae, pixels).mode())
    quantized = quantize(transformed, codebook(vae))
    assert torch.equal(output["tokens"], quantized.tokens)
    reconstruction, target, _ = output["decodings"][0]
    torch.testing.assert_close(reconstruction, decode_tokens(vae, quantized.tokens), rtol=1e-4, atol=1e-5)
    assert torch.equal(target, tau.apply_to_pixels(pixels, 4))
    elements = transformed[0].numel() if reduction == "sum" else 1
    expected = elements * (transformed - quantized.codes).square().mean()
    torch.testing.assert_close(output["terms"]["codebook"], expected)


def test_the_preset_is_the_f16_of_taming(repository):
    config = json.loads((repository / "training" / "configs" / "vqgan_f16.json").read_text())
    with torch.device("meta"):
        vae = VQModelEQ.from_config(config)
    assert downsampling_factor(vae) == 16 and codebook(vae).shape == (1024, 256)
    attentions = [name for name, module in vae.named_modules() if type(module).__name__ == "Attention"]
    assert len(attentions) == (2 + 1) + (1 + 3)  # at 16x16: two blocks and the middle, the middle and three blocks


def test_padding_changes_the_function(pixels):
    with torch.no_grad():
        assert not torch.equal(build(padding_mode="reflect")(pixels).sample, build()(pixels).sample)
    with pytest.raises(ValueError, match="padding_mode must be one of"):
        VQModelEQ(padding_mode="none")
