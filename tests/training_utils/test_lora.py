"""Adapters: what they change and leave, what is saved of them, and what fusing gives."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import AutoencoderKL
from peft import PeftModel
from torch import nn

from diffusers_eqvae import AutoencoderKLEQ
from diffusers_eqvae.autoencoder_classes import class_of
from diffusers_eqvae.autoencoders import decode, encode, last_decoder_layer
from diffusers_eqvae.objectives._last_layer import LastLayer
from diffusers_eqvae.provenance import autoencoder_identity
from diffusers_eqvae.training_utils.autoencoder.trainable import freeze_all_but, keeps_latents
from diffusers_eqvae.training_utils.lora import LoraArguments, adaptable, adapters, add_adapters, fused, save_adapter

from ..faults.test_autoencoder_classes import TINY, tiny

SD = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


def both_halves(vae, side=16):
    """Moments of an image, and pixels of latents, without noise."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(2, 3, side, side, generator=generator, dtype=torch.float64).to(vae.dtype)
    posterior = encode(vae, pixels)
    return posterior.moments, decode(vae, posterior.mean)


def moved(vae):
    """As after training: no adapter is zero any more."""
    generator = torch.Generator().manual_seed(2)
    for layer in adapters(vae).values():
        weight = layer.lora_B["default"].weight
        weight.data = 0.05 * torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.dtype)
    return vae


@pytest.mark.parametrize("name", TINY)
def test_every_class_starts_as_the_function_that_it_was_and_ends_fused(name):
    vae = tiny(name)
    base = copy.deepcopy(vae).double()
    before, whole = both_halves(base), base.state_dict()
    ends = [class_of(vae).last_layer(half) for half in (vae.encoder, vae.decoder)]
    freeze_all_but(vae, ["lora"], LoraArguments(lora_rank=3, lora_alpha=6))
    vae.double()
    assert all(map(torch.equal, both_halves(vae), before))  # B = 0
    assert ends == [class_of(vae).last_layer(half) for half in (vae.encoder, vae.decoder)]
    trained = [key for key, weight in vae.named_parameters() if weight.requires_grad]
    assert trained and all(".lora_" in key for key in trained)
    changed = both_halves(moved(vae))
    plain = fused(vae)
    learns = [not keeps_latents(vae), True]  # the encoder of an AutoencoderRAE never does
    assert [(one - other).abs().max() > 1e-3 for one, other in zip(changed, before, strict=True)] == learns
    for one, other in zip(both_halves(plain), changed, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-10)
    assert plain.state_dict().keys() == whole.keys() and plain.config == vae.config
    kept = {key.replace(".base_layer", ""): value for key, value in vae.state_dict().items() if ".lora_" not in key}
    assert all(torch.equal(kept[key], value) for key, value in whole.items())


def test_the_change_is_alpha_over_rank_times_b_a():
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Flatten(), nn.Linear(5 * 16, 7)).double()
    add_adapters(model, LoraArguments(lora_rank=2, lora_alpha=6))
    moved(model)
    before = {name: layer.get_base_layer().weight.clone() for name, layer in adapters(model).items()}
    after = fused(model)
    for name, layer in adapters(model).items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        product = (b.flatten(1) @ a.flatten(1)).reshape(before[name].shape)
        assert torch.allclose(after.get_submodule(name).weight, before[name] + 3 * product, rtol=0, atol=1e-12)


@pytest.mark.parametrize("padding_mode", ["reflect", "circular"])
def test_adapters_pad_as_their_layers_do(padding_mode):
    torch.manual_seed(0)
    vae = AutoencoderKLEQ(norm_num_groups=4, block_out_channels=(8,), padding_mode=padding_mode)
    freeze_all_but(vae, ["lora"], LoraArguments(lora_rank=2))
    vae.double()
    for one, other in zip(both_halves(fused(moved(vae))), both_halves(vae), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-10)


def test_adapters_of_the_decoder_leave_latents(tiny_autoencoder_kl):
    vae, before = tiny_autoencoder_kl, autoencoder_identity(tiny_autoencoder_kl)
    freeze_all_but(vae, ["lora", "decoder"], LoraArguments(lora_rank=2))
    assert keeps_latents(vae) and all(name.startswith(("decoder.", "post_quant_conv")) for name in adapters(vae))
    after = autoencoder_identity(fused(moved(vae)))
    assert [key for key in before if before[key] != after[key]] == ["decoder"]


def test_the_layers_are_chosen_by_the_end_of_their_names(tiny_autoencoder_kl):
    chosen = copy.deepcopy(tiny_autoencoder_kl)
    freeze_all_but(chosen, ["lora", "encoder"], LoraArguments(lora_target_modules=["to_q", "to_out.0"]))
    assert set(adapters(chosen)) == {f"encoder.mid_block.attentions.0.{end}" for end in ("to_q", "to_out.0")}
    with pytest.raises(ValueError, match=r"--lora_target_modules to_query does not end the name .* are .*to_q"):
        freeze_all_but(tiny_autoencoder_kl, ["lora"], LoraArguments(lora_target_modules=["to_query"]))
    with pytest.raises(ValueError, match=r"has none; name another part, or leave lora out"):
        freeze_all_but(tiny_autoencoder_kl, ["lora", "encoder.conv_norm_out"])


def test_layers_that_peft_would_adapt_wrongly_get_none():
    model = nn.ModuleDict(
        {"plain": nn.Conv2d(4, 4, 3), "groups": nn.Conv2d(4, 4, 3, groups=2), "wide": nn.Conv2d(4, 4, 3, dilation=2)}
    )
    assert set(adaptable(model)) == {"plain"}


def test_peft_reads_what_is_saved_and_fuses_it_to_the_same(tmp_path, tiny_autoencoder_kl):
    base = copy.deepcopy(tiny_autoencoder_kl)
    vae = tiny_autoencoder_kl
    freeze_all_but(vae, ["lora"], LoraArguments(lora_rank=2, lora_alpha=1, lora_dropout=0.1))
    save_adapter(moved(vae).eval(), tmp_path / "lora", base=str(tmp_path / "private" / "base"))
    again = PeftModel.from_pretrained(base, str(tmp_path / "lora")).eval()
    assert all(map(torch.equal, both_halves(again.base_model.model), both_halves(vae)))
    merged = again.merge_and_unload().state_dict()
    assert all(torch.equal(merged[key], value) for key, value in fused(vae).state_dict().items())
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == ("base", 2, 1)


def test_the_adapter_of_an_autoencoder_of_sd_size_is_below_5_per_cent():
    with torch.device("meta"):
        vae = AutoencoderKL(**SD)
    weights = sum(weight.numel() for weight in vae.parameters())
    assert weights == 83_653_863
    rank = LoraArguments().lora_rank
    sizes = [
        rank * (layer.weight[0].numel() + layer.weight.shape[0]) for layer in adaptable(vae).values()
    ]  # A has the layer's inputs (times its kernel), B its outputs
    assert sum(sizes) / weights < 0.05


@pytest.mark.parametrize("name", ["tiny_sit", "tiny_maskgit"])
def test_generators_begin_as_they_were_and_end_fused(name, request):
    model = request.getfixturevalue(name).double().eval()
    side, labels = model.config.sample_size, torch.tensor([0, 1])
    tokens = torch.randint(8, (2, side, side)) if name == "tiny_maskgit" else None
    given = torch.randn(2, model.config.in_channels, side, side).double() if tokens is None else tokens
    times = None if tokens is not None else torch.tensor([900.0, 100.0], dtype=torch.float64)
    before = model(given, times, labels).sample
    add_adapters(model, LoraArguments(lora_rank=2))
    assert torch.equal(model(given, times, labels).sample, before)
    assert all(".lora_" in key for key, weight in model.named_parameters() if weight.requires_grad)
    changed = moved(model)(given, times, labels).sample
    assert (changed - before).abs().max() > 1e-3
    assert torch.allclose(fused(model)(given, times, labels).sample, changed, rtol=0, atol=1e-10)


@pytest.mark.parametrize("words", [["full"], ["lora"], ["lora", "decoder.conv_out"], ["lora", "encoder"]])
def test_adaptive_weights_compare_the_same_gradients(tiny_autoencoder_kl, words):
    """d loss / d weight of the last layer, whoever learns: B = 0 changes no function."""
    vae = tiny_autoencoder_kl
    raw_latents = encode(vae, torch.rand(2, 3, 16, 16)).mean
    layer = last_decoder_layer(vae)
    decode(vae, raw_latents.detach()).square().sum().backward()
    expected = layer.weight.grad.clone()
    freeze_all_but(vae, words, LoraArguments(lora_rank=2))
    end = LastLayer(last_decoder_layer(vae))
    encoded = encode(vae, torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))).mean
    loss = decode(vae, raw_latents.detach() + 0.0 * encoded).square().sum()
    assert torch.allclose(end.weight_gradient(loss), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
