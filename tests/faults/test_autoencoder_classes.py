"""Every autoencoder of the installed diffusers is handled right or refused by name; a new one is refused."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, ConsistencyDecoderVAE, ModelMixin

from diffusers_eqvae.autoencoders import (
    decode,
    downsampling_factor,
    encode,
    is_deterministic,
    last_decoder_layer,
    last_encoder_layer,
    latent_channels,
    load_autoencoder,
    require_handled,
    takes_any_size,
)
from diffusers_eqvae.equivariance import rotation, scaling
from diffusers_eqvae.latents import LatentNormalization, LatentStatistics
from diffusers_eqvae.models.autoencoder_kl_eq import AutoencoderKLEQ
from diffusers_eqvae.models.transformer_sit import SiTTransformer2DModel
from diffusers_eqvae.objectives._last_layer import LastLayer
from diffusers_eqvae.objectives.autoencoder import AutoencoderObjective
from diffusers_eqvae.pipelines.pipeline_class_conditional import ClassConditionalPipeline
from diffusers_eqvae.provenance import autoencoder_identity, require_same_autoencoder
from diffusers_eqvae.randomness import StepRandomness
from diffusers_eqvae.schedulers.scheduling_flow_match_ode import FlowMatchODEScheduler
from diffusers_eqvae.tokens import decode_with_terms
from diffusers_eqvae.training_utils.autoencoder.trainable import freeze_all_but

KL = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
FRAMES = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [True],
    "latents_mean": [0.1, -0.2, 0.3, 0.4],
    "latents_std": [2.0, 0.5, 1.5, 1.0],
}
# Of each class that is handled, constructor arguments of a tiny model: three widths, so a stride of 4.
TINY = {
    "AutoencoderKL": {**KL, "block_out_channels": (8, 8, 16), "norm_num_groups": 4},
    "AsymmetricAutoencoderKL": {
        **KL,
        "down_block_out_channels": (8, 8, 16),
        "up_block_out_channels": (8, 16, 16),
        "norm_num_groups": 4,
    },
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": (32, 32, 64),
        "layers_per_block": 1,
        "spatial_compression_ratio": 4,
        "sample_size": 16,
        "scaling_factor": 0.7,
    },
    "AutoencoderKLFlux2": {
        **KL,
        "block_out_channels": (8, 8, 16),
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 16,
    },
    "AutoencoderKLQwenImage": {
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 1, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True],
        "latents_mean": (0.1, -0.2, 0.3, 0.4),
        "latents_std": (2.0, 0.5, 1.5, 1.0),
    },
    "AutoencoderKLWan": {**FRAMES, "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12},
    "AutoencoderKLQwenImage21": {
        **FRAMES,
        "decoder_base_dim": 8,
        "is_residual": False,
        "in_channels": 3,
        "out_channels": 3,
    },
    "AutoencoderRAE": {
        "encoder_hidden_size": 64,
        "encoder_patch_size": 4,
        "encoder_num_hidden_layers": 1,
        "encoder_input_size": 16,
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 16,
        "patch_size": 4,
        "latents_mean": (torch.arange(64.0 * 16) / 512 - 1).view(64, 4, 4).tolist(),
        "latents_std": (torch.arange(64.0 * 16) / 512 + 0.5).view(64, 4, 4).tolist(),
        "scaling_factor": 1.5,
    },
    "VQModel": {**KL, "block_out_channels": (8, 8, 16), "norm_num_groups": 4, "num_vq_embeddings": 16},
    "AutoencoderTiny": {
        "encoder_block_out_channels": (8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8),
        "num_encoder_blocks": (1, 1, 1),
        "num_decoder_blocks": (1, 1, 1),
    },
    "AutoencoderDC": {
        "latent_channels": 4,
        "attention_head_dim": 8,
        "encoder_block_out_channels": (8, 16, 16),
        "decoder_block_out_channels": (8, 16, 16),
        "encoder_layers_per_block": (1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1),
        "encoder_qkv_multiscales": ((), (), ()),
        "decoder_qkv_multiscales": ((), (), ()),
    },
}


def exported() -> dict[str, type]:
    """The classes of diffusers that encode and decode, and those that are called autoencoders."""
    found = {name: getattr(diffusers, name) for name in dir(diffusers)}
    return {
        name: kind
        for name, kind in found.items()
        if inspect.isclass(kind)
        and issubclass(kind, ModelMixin)
        and kind.__module__.startswith("diffusers.")
        and ("autoencoder" in name.lower() or (hasattr(kind, "encode") and hasattr(kind, "decode")))
    }


REFUSED = sorted(exported().keys() - TINY.keys())


def tiny(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    vae = getattr(diffusers, name)(**TINY[name]).eval()
    if name == "AutoencoderKLFlux2":
        vae.bn.running_mean.copy_(torch.randn(16))
        vae.bn.running_var.copy_(torch.rand(16) + 0.1)
    return vae


def width(name: str) -> int:
    """Of images; one class takes squares of one size alone."""
    return 16 if name == "AutoencoderRAE" else 24


def test_the_listing_finds_the_classes():
    assert exported().keys() >= {*TINY, "ConsistencyDecoderVAE"} and len(REFUSED) > 20


def reconstructed(vae, pixels):
    """By diffusers alone: its own call, in the range and with the axes that its class takes."""
    if hasattr(vae, "temperal_downsample"):
        return vae(pixels[:, :, None]).sample[:, :, 0]
    if type(vae) is diffusers.AutoencoderRAE:
        return 2 * vae((pixels + 1) / 2).sample - 1
    if type(vae) is diffusers.AutoencoderTiny:  # its own call rounds latents to 8 bits
        return vae.decode(vae.encode(pixels).latents).sample
    return vae(pixels).sample


@pytest.mark.parametrize("name", TINY)
def test_a_class_that_is_handled_goes_all_the_way(name, tmp_path):
    tiny(name).save_pretrained(tmp_path)
    vae = load_autoencoder(str(tmp_path))
    require_handled(vae)
    pixels = torch.rand(4, 3, 16, width(name)) * 2 - 1
    with torch.no_grad():
        posterior = encode(vae, pixels)
        channels, stride = latent_channels(vae), downsampling_factor(vae)
        assert posterior.mean.shape == (4, channels, 16 // stride, width(name) // stride)
        assert is_deterministic(vae) == (posterior.logvar is None)
        statistics = LatentStatistics()
        statistics.update(posterior.mean, posterior.logvar)
        measured = LatentNormalization.from_statistics(statistics)
        measured.apply_to(vae)
        normalization = LatentNormalization.from_vae(vae)
        for one, other in zip(normalization.mean_and_std, measured.mean_and_std, strict=True):
            torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-5, atol=1e-6)
        latents = normalization.normalize(posterior.mode())
        per_channel = latents.transpose(0, 1).flatten(1)
        assert is_deterministic(vae) is False or per_channel.mean(1).abs().max() < 1e-3
        decoded = decode(vae, normalization.denormalize(latents))
        torch.testing.assert_close(decoded, reconstructed(vae, pixels), rtol=1e-3, atol=1e-4)
        vae.save_pretrained(tmp_path / "again")
        again = load_autoencoder(str(tmp_path / "again"))
        assert LatentNormalization.from_vae(again) == normalization
        torch.testing.assert_close(encode(again, pixels).mean, posterior.mean, rtol=1e-4, atol=1e-5)
        for tau in (rotation(posterior.mean.shape[-2:], 1), scaling(posterior.mean.shape[-2:], 0.5)):
            if takes_any_size(vae) or tau.quarter_turns:
                moved = decode(vae, tau.apply_to_latents(posterior.mode()))
                assert moved.shape == tau.apply_to_pixels(pixels, stride).shape
    assert decoded.shape == pixels.shape
    identity = autoencoder_identity(vae)
    assert identity["class"] == name and identity["latent_channels"] == channels
    require_same_autoencoder(json.loads(json.dumps(identity)), vae)
    with torch.no_grad():
        next(vae.encoder.parameters()).add_(0.1)
    with pytest.raises(ValueError, match="its encoder weights differ"):
        require_same_autoencoder(identity, vae)


@pytest.mark.parametrize("name", TINY)
def test_a_class_that_is_handled_can_be_trained(name):
    vae = tiny(name)
    freeze_all_but(vae, ["full"])
    objective = AutoencoderObjective(vae)
    batch = {"pixel_values": torch.rand(2, 3, 16, 16) * 2 - 1}
    output = objective(batch, objective.draw(batch, StepRandomness(seed=0)))
    (reconstruction, target, _), *_ = output["decodings"]
    assert not output["idle"].requires_grad, "what no gradient reaches is frozen, and what is trained is reached"
    terms = sum(output["terms"].values())  # of a codebook, which only these reach
    ((reconstruction - target).square().mean() + terms).backward()
    trained = dict(vae.named_parameters())
    assert all((each.grad is not None) == each.requires_grad for each in trained.values())
    halves = ["decoder"] if name == "AutoencoderRAE" else ["encoder", "decoder"]
    for half in halves:
        assert last_layer(vae, half).weight.grad.abs().sum() > 0


def last_layer(vae, half):
    return last_encoder_layer(vae) if half == "encoder" else last_decoder_layer(vae)


@pytest.mark.parametrize("name", TINY)
def test_the_gradient_at_the_last_layers_is_autograds(name):
    vae = tiny(name).requires_grad_(True)
    halves = ["decoder"] if name == "AutoencoderRAE" else ["encoder", "decoder"]
    ends = [LastLayer(last_layer(vae, half)) for half in halves]
    output = decode_with_terms(vae, encode(vae, torch.rand(2, 3, 16, 16) * 2 - 1).mean).pixels
    goal = torch.rand_like(output)
    expected = torch.autograd.grad(output, [end.layer.weight for end in ends], goal, retain_graph=True)
    for end, gradient in zip(ends, expected, strict=True):
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(end.weight_gradient(output, [goal]), gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_any_other_class_is_refused_before_its_weights_are_looked_for(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(
        ValueError, match=rf"{name}, (which|not an autoencoder).* (use AutoencoderKL,|name one)"
    ) as error:
        load_autoencoder(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("AutoencoderKLMochi", "takes videos"),
        ("AutoencoderKLLTXVideo", "takes videos"),
        ("AutoencoderKLTemporalDecoder", "takes videos"),
        ("ConsistencyDecoderVAE", "decodes by a diffusion process"),
        ("AutoencoderOobleck", "takes sound"),
    ],
)
def test_the_refusal_says_why(name, reason):
    with pytest.raises(ValueError, match=f"of the class {name}, which .*{reason}.*; use AutoencoderKL"):
        require_handled(getattr(diffusers, name))


def of_a_later_diffusers(base: type) -> type:
    return type("AutoencoderKLNext", (base,), {"__module__": "diffusers.models.autoencoders.autoencoder_next"})


@pytest.mark.parametrize("base", [ModelMixin, AutoencoderKL], ids=["of its own", "derived from one that is handled"])
def test_a_class_that_diffusers_adds_is_refused_until_it_is_known(base):
    with pytest.raises(ValueError, match="of the class AutoencoderKLNext, which is not known here"):
        require_handled(of_a_later_diffusers(base))


def test_a_class_of_yours_counts_as_what_it_derives_from():
    class Mine(AutoencoderKL):
        pass

    require_handled(Mine)
    require_handled(AutoencoderKLEQ)
    with pytest.raises(ValueError, match="of the class Decoder, which decodes by a diffusion process"):
        require_handled(type("Decoder", (ConsistencyDecoderVAE,), {}))


def test_an_objective_and_a_pipeline_refuse_it_too(tiny_sit):
    with pytest.raises(ValueError, match="AutoencoderKLTemporalDecoder, which takes videos"):
        AutoencoderObjective(diffusers.AutoencoderKLTemporalDecoder())
    assert isinstance(tiny_sit, SiTTransformer2DModel)
    with pytest.raises(ValueError, match="AutoencoderKLTemporalDecoder, which takes videos"):
        ClassConditionalPipeline(tiny_sit, diffusers.AutoencoderKLTemporalDecoder(), FlowMatchODEScheduler())


def test_the_kl_of_float64_is_float64():
    posterior = encode(tiny("AutoencoderKL").double(), torch.rand(1, 3, 16, 16, dtype=torch.float64))
    kl = posterior.kl()
    expected = 0.5 * (posterior.mean**2 + posterior.logvar.exp() - 1 - posterior.logvar).sum((1, 2, 3))
    assert kl.dtype == torch.float64 and math.isclose(kl.item(), expected.item(), rel_tol=1e-14)


@pytest.mark.parametrize(
    "names",
    [
        ["diffusion_pytorch_model.fp16.safetensors"],
        ["diffusion_pytorch_model.bf16.safetensors"],
        [
            "diffusion_pytorch_model.safetensors.index.fp16.json",
            "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
            "diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
        ],
    ],
    ids=["fp16", "bf16", "in shards"],
)
@pytest.mark.parametrize("subfolder", ["", "vae"], ids=["alone", "in a pipeline"])
def test_weights_in_one_variant_only_are_loaded(names, subfolder, tmp_path, caplog):
    vae, variant = tiny("AutoencoderKL"), "bf16" if "bf16" in names[0] else "fp16"
    vae.save_pretrained(tmp_path / subfolder, variant=variant, max_shard_size="10KB" if len(names) > 1 else "1GB")
    if subfolder:
        (tmp_path / "model_index.json").write_text("{}")
    assert not list(tmp_path.rglob("diffusion_pytorch_model.safetensors"))
    loaded = load_autoencoder(str(tmp_path))
    assert torch.equal(loaded.encoder.conv_in.weight, vae.encoder.conv_in.weight)
    assert f"weights of the variant {variant} only" in caplog.text


def test_several_variants_and_none_without_one_are_named(tmp_path):
    for variant in ("fp16", "ema"):
        tiny("AutoencoderKL").save_pretrained(tmp_path, variant=variant)
    with pytest.raises(OSError, match=r"variants ema, fp16 \(.*model\.ema\.safetensors.*; rename those that you mean"):
        load_autoencoder(str(tmp_path))


def changed(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"_class_name": "os.system"}, "needs the class os.system, which neither"),
        ({"norm_num_groups": 0}, "cannot be loaded as an autoencoder: "),
        ({"act_fn": "none"}, "cannot be loaded as an autoencoder: "),
        ({"down_block_types": ["Nothing"]}, "cannot be loaded as an autoencoder: "),
        ({"layers_per_block": 0}, r"holds weights that its config has no place for \(AutoencoderKL: .*use both files"),
        ({"layers_per_block": -3}, r"holds weights that its config has no place for .*use both files of one model"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_config_that_does_not_fit_the_weights_is_one_sentence(changes, said, tmp_path):
    tiny("AutoencoderKL").save_pretrained(tmp_path)
    changed(tmp_path, **changes)
    with pytest.raises(ValueError, match=said) as refused:
        load_autoencoder(str(tmp_path))
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)
    if said.endswith("autoencoder: "):
        assert "config.json or weights are not as they were saved; save or download" in str(refused.value)


def half(path):
    path.write_bytes(path.read_bytes()[:2000])


def a_folder(path):
    path.unlink()
    path.mkdir()


DAMAGED = {
    "cut": (half, r"model\.safetensors of .* is cut short or damaged; save or download it again"),
    "empty": (lambda path: path.write_bytes(b""), r"model\.safetensors of .* is cut short or damaged; save or"),
    "a page": (lambda path: path.write_bytes(b"<html>"), r"model\.safetensors of .* is cut short or damaged; save or"),
    "a folder": (a_folder, r"holds no weights .*model\.safetensors.*; save or download it again"),
    "not there": (Path.unlink, r"holds no weights .*model\.safetensors.*; save or download it again"),
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("subfolder", ["", "vae"], ids=["alone", "in a pipeline"])
def test_weights_that_are_not_whole_are_named_with_the_remedy(damage, subfolder, tmp_path, tiny_autoencoder_kl):
    tiny_autoencoder_kl.save_pretrained(tmp_path / subfolder)
    if subfolder:
        (tmp_path / "model_index.json").write_text("{}")
    break_it, said = DAMAGED[damage]
    break_it(tmp_path / subfolder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(OSError, match=said) as refused:
        load_autoencoder(str(tmp_path))
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize("value", [math.nan, -math.inf], ids=str)
@pytest.mark.parametrize("part", ["decoder.conv_in.weight", "quant_conv.bias"])
def test_weights_that_are_not_finite_are_refused_where_they_are_loaded(value, part, tmp_path, tiny_autoencoder_kl):
    tiny_autoencoder_kl.get_parameter(part).data.view(-1)[1] = value
    tiny_autoencoder_kl.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"NaN or infinite \({part} of its AutoencoderKL\); take an earlier"):
        load_autoencoder(str(tmp_path))


def test_weights_that_need_code_are_refused_with_a_remedy(tmp_path, tiny_autoencoder_kl):
    tiny_autoencoder_kl.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"encoder": print}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.bin of .* is not read: .*author save the tensors .*safetensors"):
        load_autoencoder(str(tmp_path))
