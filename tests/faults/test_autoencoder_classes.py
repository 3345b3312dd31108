"""Every autoencoder of the installed diffusers is handled right or refused by name; a new one is refused."""

from __future__ import annotations

import inspect
import json
import math

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, ConsistencyDecoderVAE, ModelMixin

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
)
from diffusers_eqvae.latents import LatentNormalization, LatentStatistics
from diffusers_eqvae.models.autoencoder_kl_eq import AutoencoderKLEQ
from diffusers_eqvae.models.transformer_sit import SiTTransformer2DModel
from diffusers_eqvae.objectives.autoencoder import AutoencoderObjective
from diffusers_eqvae.pipelines.pipeline_class_conditional import ClassConditionalPipeline
from diffusers_eqvae.provenance import autoencoder_identity, require_same_autoencoder
from diffusers_eqvae.randomness import StepRandomness
from diffusers_eqvae.schedulers.scheduling_flow_match_ode import FlowMatchODEScheduler

KL = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
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
    return getattr(diffusers, name)(**TINY[name]).eval()


def test_the_listing_finds_the_classes():
    assert exported().keys() >= {*TINY, "AutoencoderKLFlux2", "ConsistencyDecoderVAE"} and len(REFUSED) > 20


@pytest.mark.parametrize("name", TINY)
def test_a_class_that_is_handled_goes_all_the_way(name, tmp_path):
    tiny(name).save_pretrained(tmp_path)
    vae = load_autoencoder(str(tmp_path))
    require_handled(vae)
    pixels = torch.rand(4, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        posterior = encode(vae, pixels)
        channels, stride = latent_channels(vae), downsampling_factor(vae)
        assert posterior.mean.shape == (4, channels, 16 // stride, 24 // stride)
        assert is_deterministic(vae) == (posterior.logvar is None)
        statistics = LatentStatistics()
        statistics.update(posterior.mean, posterior.logvar)
        measured = LatentNormalization.from_statistics(statistics)
        measured.apply_to(vae)
        normalization = LatentNormalization.from_vae(vae)
        assert normalization == measured
        latents = normalization.normalize(posterior.mode())
        decoded = decode(vae, normalization.denormalize(latents))
        torch.testing.assert_close(decoded, vae.decode(posterior.mode()).sample, rtol=1e-3, atol=1e-4)
    assert decoded.shape == pixels.shape
    identity = autoencoder_identity(vae)
    assert identity["class"] == name and identity["latent_channels"] == channels
    require_same_autoencoder(json.loads(json.dumps(identity)), vae)
    with torch.no_grad():
        last_encoder_layer(vae).weight.add_(0.1)
    with pytest.raises(ValueError, match="its encoder weights differ"):
        require_same_autoencoder(identity, vae)


@pytest.mark.parametrize("name", TINY)
def test_a_class_that_is_handled_can_be_trained(name):
    vae = tiny(name)
    objective = AutoencoderObjective(vae)
    batch = {"pixel_values": torch.rand(2, 3, 16, 16) * 2 - 1}
    output = objective(batch, objective.draw(batch, StepRandomness(seed=0)))
    (reconstruction, target, _), *_ = output["decodings"]
    ((reconstruction - target).square().mean() + output["idle"]).backward()
    for layer in (last_encoder_layer(vae), last_decoder_layer(vae)):
        assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0


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
        ("AutoencoderKLFlux2", "batch statistics of its own, which would stay the old ones"),
        ("AutoencoderKLQwenImage", "takes videos"),
        ("AutoencoderKLWan", "takes videos"),
        ("AutoencoderKLLTXVideo", "takes videos"),
        ("AutoencoderKLTemporalDecoder", "takes videos"),
        ("AutoencoderRAE", "frozen vision model"),
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


def flux2() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(**TINY["AutoencoderKL"], latent_channels=4).eval()


def test_an_objective_and_a_pipeline_refuse_it_too(tiny_sit):
    with pytest.raises(ValueError, match="AutoencoderKLFlux2, which normalises"):
        AutoencoderObjective(flux2())
    assert isinstance(tiny_sit, SiTTransformer2DModel)
    with pytest.raises(ValueError, match="AutoencoderKLFlux2, which normalises"):
        ClassConditionalPipeline(tiny_sit, flux2(), FlowMatchODEScheduler())


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
