"""The layouts of the discrete line: VQ-GAN's and MaskGIT's weights, the same function and the same bits both ways."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffusers_eqvae.commands.convert import main as convert
from diffusers_eqvae.conversion import from_published, read_published, to_published
from diffusers_eqvae.models.autoencoder_vq_eq import VQModelEQ
from diffusers_eqvae.models.transformer_maskgit import MaskGITTransformer2DModel
from diffusers_eqvae.tokens import quantize
from tests.golden import vqgan_reference as reference

SIZES = {"levels": 3, "blocks": 2}


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_a_vqgan_is_the_same_function(dtype, tolerance):
    published = {name: tensor.to(dtype) for name, tensor in reference.published_weights().items()}
    vae = from_published(published).to(dtype)
    pixels = (torch.rand(2, 3, 16, 24) * 2 - 1).to(dtype)
    latents = reference.encode(pixels, published, **SIZES)
    ours = vae.encode(pixels).latents
    assert (ours - latents).norm() / latents.norm() <= tolerance
    tokens = quantize(latents, published["quantize.embedding.weight"]).tokens
    assert torch.equal(vae.encode_tokens(pixels), tokens)
    images = reference.decode(tokens, published, **SIZES)
    assert (vae.decode_tokens(tokens) - images).norm() / images.norm() <= tolerance


def test_a_vqgan_written_back_is_the_same_bits():
    published = reference.published_weights()
    vae = from_published(published)
    assert type(vae) is VQModelEQ and vae.config.vq_embed_dim == 4 and vae.config.num_vq_embeddings == 20
    assert list(vae.config.down_block_types) == ["DownEncoderBlock2D"] * 2 + ["AttnDownEncoderBlock2D"]
    assert list(vae.config.up_block_types) == ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 2
    back = to_published(vae, "vqgan")
    assert back.keys() == published.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in published.items())


def test_what_served_training_is_left_out_and_the_rest_refused(tmp_path, caplog):
    published = reference.published_weights(attended=())
    torch.save({"state_dict": published | {"loss.discriminator.main.0.bias": torch.zeros(3)}}, tmp_path / "last.ckpt")
    vae = from_published(read_published(tmp_path / "last.ckpt"))
    assert "left out: loss.discriminator.main.0.bias" in caplog.text
    assert torch.equal(vae.quantize.embedding.weight, published["quantize.embedding.weight"])
    with pytest.raises(ValueError, match=r"holds encoder\.temporal\.weight, which VQGANConverter does not know"):
        from_published(published | {"encoder.temporal.weight": torch.zeros(1)}, layout="vqgan")
    del published["decoder.up.1.block.2.conv1.bias"]
    with pytest.raises(ValueError, match=r"lacks decoder\.up\.1\.block\.2\.conv1\.bias"):
        from_published(published)


def test_the_command_goes_both_ways(tmp_path, capsys):
    published = reference.published_weights()
    torch.save({"state_dict": published}, tmp_path / "last.ckpt")
    assert convert([str(tmp_path / "last.ckpt"), str(tmp_path / "vq")]) == 0
    assert convert([str(tmp_path / "vq"), str(tmp_path / "back.safetensors"), "--to", "vqgan"]) == 0
    back = read_published(tmp_path / "back.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in published.items())
    assert "VQModelEQ with" in capsys.readouterr().out


PORT = {"width": 16, "heads": 2, "layers": 2, "tokens": 9, "codebook": 12, "classes": 5}


def port_weights():
    """The port's tensors, random in every layer."""
    generator, width = torch.Generator().manual_seed(0), PORT["width"]
    rows = PORT["codebook"] + 1 + PORT["classes"] + 1
    shapes = {"tok_emb.weight": (rows, width), "pos_emb": (1, PORT["tokens"] + 1, width)}
    shapes["bias"] = (PORT["tokens"] + 1, rows)
    for layer, linears in (("first_layer", (2, 6)), ("last_layer", (2,))):
        shapes |= {f"{layer}.{n}.weight": (width, width) for n in linears}
        shapes |= {f"{layer}.{n}.weight": (width,) for n in (0, 4)}
        shapes |= {f"{layer}.{n}.bias": (width,) for n in (0, 4, *linears)}
    for number in range(PORT["layers"]):
        block = f"transformer.layers.{number}"
        shapes |= {f"{block}.{half}.norm.{kind}": (width,) for half in (0, 1) for kind in ("weight", "bias")}
        shapes |= {
            f"{block}.0.fn.mha.in_proj_weight": (3 * width, width),
            f"{block}.0.fn.mha.in_proj_bias": (3 * width,),
        }
        shapes |= {f"{block}.0.fn.mha.out_proj.weight": (width, width), f"{block}.0.fn.mha.out_proj.bias": (width,)}
        shapes |= {f"{block}.1.fn.net.0.weight": (4 * width, width), f"{block}.1.fn.net.0.bias": (4 * width,)}
        shapes |= {f"{block}.1.fn.net.3.weight": (width, 4 * width), f"{block}.1.fn.net.3.bias": (width,)}
    return {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def port_forward(w, tokens, label):
    """Logits (B, N, K) as torch's own attention gives them."""
    width, codebook = PORT["width"], PORT["codebook"]

    def norm(x, name, eps):
        return F.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    x = w["tok_emb.weight"][torch.cat([tokens.flatten(1), label[:, None] + codebook + 1], 1)] + w["pos_emb"]
    x = norm(F.gelu(linear(norm(x, "first_layer.0", 1e-12), "first_layer.2")), "first_layer.4", 1e-12)
    x = linear(x, "first_layer.6")
    for number in range(PORT["layers"]):
        block = f"transformer.layers.{number}"
        attention = torch.nn.MultiheadAttention(width, PORT["heads"], batch_first=True, dtype=x.dtype)
        attention.load_state_dict(
            {name.split(".mha.")[1]: each for name, each in w.items() if name.startswith(f"{block}.0.fn.mha.")}
        )
        h = norm(x, f"{block}.0.norm", 1e-5)
        x = x + attention(h, h, h, need_weights=False)[0]
        x = x + linear(F.gelu(linear(norm(x, f"{block}.1.norm", 1e-5), f"{block}.1.fn.net.0")), f"{block}.1.fn.net.3")
    x = norm(F.gelu(linear(norm(x, "last_layer.0", 1e-12), "last_layer.2")), "last_layer.4", 1e-12)
    return (x @ w["tok_emb.weight"].T + w["bias"])[:, :-1, :codebook]


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_a_maskgit_is_the_same_function_and_the_same_bits(dtype, tolerance):
    published = {name: tensor.to(dtype) for name, tensor in port_weights().items()}
    model = from_published(published, num_attention_heads=PORT["heads"], num_classes=PORT["classes"]).to(dtype)
    assert type(model) is MaskGITTransformer2DModel
    tokens, labels = torch.randint(PORT["codebook"] + 1, (3, 3, 3)), torch.tensor([0, 4, 5])
    ours = model(tokens, None, labels).sample.flatten(2).transpose(1, 2)
    theirs = port_forward(published, tokens, labels)
    assert (ours - theirs).norm() / theirs.norm() <= tolerance
    back = to_published(model, "maskgit")
    assert back.keys() == published.keys()
    assert all(np.array_equal(back[name].numpy(), tensor.numpy()) for name, tensor in published.items())


def test_what_shapes_of_a_maskgit_do_not_tell_must_be_said(caplog):
    published = port_weights()
    with pytest.raises(ValueError, match="No preset is 16 wide, so the heads are unknown"):
        from_published(published)
    with pytest.raises(ValueError, match=r"A table of 19 rows has no place for 1000 classes\. Give num_classes"):
        from_published(published, num_attention_heads=2)
    assert "is taken as 1000 classes" in caplog.text
