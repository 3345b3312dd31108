"""Single files of latent diffusion's KL autoencoder, against diffusers' reader and what others look for."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

import eqvae_command
from diffusers_eqvae.conversion import from_published, read_published, to_published
from diffusers_eqvae.latents import LatentNormalization
from diffusers_eqvae.models.autoencoder_kl_eq import AutoencoderKLEQ
from tests.golden import vqgan_reference

LEVELS = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
SIZES = {"layers_per_block": 2, "norm_num_groups": 8, "mid_block_add_attention": True}
FAMILIES = {
    "SD": {"latent_channels": 4, "scaling_factor": 0.18215},
    "SDXL": {"latent_channels": 4, "scaling_factor": 0.13025},
    "SD3": {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    "FLUX": {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
}
MARKS = {
    "SD": "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    "SDXL": "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",
    "SD3": "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight",
    "FLUX": "model.diffusion_model.double_blocks.0.img_attn.qkv.weight",
}


def run(*words):
    return eqvae_command.main(["convert", *map(str, words)])


def tiny(family="SD", **options):
    """A small autoencoder of a family, with weights that differ in every layer."""
    torch.manual_seed(0)
    quant = FAMILIES[family]["latent_channels"] == 4
    options = {**LEVELS, **SIZES, **FAMILIES[family], "use_quant_conv": quant, "use_post_quant_conv": quant} | options
    vae = AutoencoderKL(block_out_channels=(8, 8, 16, 16), **options).eval()
    for weight in vae.parameters():
        weight.data.normal_(std=0.2)
    return vae


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_diffusers_reads_and_what_is_read_back_is_the_same_bits(family, tmp_path):
    vae = tiny(family)
    vae.save_pretrained(tmp_path / "vae")
    assert run(tmp_path / "vae", tmp_path / "one.safetensors", "--to", "ldm") == 0
    file = str(tmp_path / "one.safetensors")
    theirs = AutoencoderKL.from_single_file(file, config=str(tmp_path / "vae"), local_files_only=True)
    assert same(theirs.state_dict(), vae.state_dict())
    given = [f"{key}={value}" for key, value in FAMILIES[family].items() if key != "latent_channels"]
    assert run(file, tmp_path / "back", "--config", "norm_num_groups=8", *given) == 0
    back = AutoencoderKL.from_pretrained(tmp_path / "back")
    assert same(back.state_dict(), vae.state_dict())
    configs = [
        json.loads(json.dumps({key: each for key, each in kind.config.items() if key[0] != "_"}))
        for kind in (vae, back)
    ]
    assert {key for key, value in configs[0].items() if configs[1][key] != value} == {"sample_size"}
    assert same(to_published(AutoencoderKLEQ.from_pretrained(tmp_path / "back"), "ldm"), load_file(file))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae."])
def test_it_is_found_in_a_whole_checkpoint_which_says_the_family(family, prefix, tmp_path, caplog):
    vae = tiny(family)
    vae.save_pretrained(tmp_path / "vae")
    inner = to_published(AutoencoderKLEQ.from_pretrained(tmp_path / "vae"), "ldm")
    whole = {prefix + name: tensor.contiguous() for name, tensor in inner.items()} | {MARKS[family]: torch.ones(2)}
    save_file(whole, tmp_path / "whole.safetensors")
    assert run(tmp_path / "whole.safetensors", tmp_path / "out", "--config", "norm_num_groups=8") == 0
    loaded = AutoencoderKL.from_pretrained(tmp_path / "out")
    assert same(loaded.state_dict(), vae.state_dict())
    assert LatentNormalization.from_vae(loaded) == LatentNormalization.from_vae(vae)
    said = caplog.text
    assert f"1 of {len(whole)} tensors are of other networks, and left out" in said
    assert f"the autoencoder is that of {family}: scaling_factor={FAMILIES[family]['scaling_factor']}" in said


def test_the_scale_that_a_checkpoint_measured_wins():
    whole = {f"first_stage_model.{name}": each for name, each in published().items()}
    whole |= {"scale_factor": torch.tensor(0.25), MARKS["SD"]: torch.ones(1)}
    assert from_published(whole, norm_num_groups=8).config.scaling_factor == 0.25


def published(family="SD"):
    ours = AutoencoderKLEQ.from_config(tiny(family).config)
    ours.load_state_dict(tiny(family).state_dict())
    return to_published(ours, "ldm")


def test_what_the_weights_do_not_say_is_said_or_refused(caplog):
    assert from_published(published(), norm_num_groups=8).config.scaling_factor == 0.18215
    assert "taken as scaling_factor=0.18215 (SD); of an SDXL autoencoder give scaling_factor=0.13025" in caplog.text
    with pytest.raises(ValueError, match=r"scaling_factor=1\.5305 shift_factor=0\.0609 \(SD3\), .*0\.1159 \(FLUX\)"):
        from_published(published("FLUX"), norm_num_groups=8)


@torch.no_grad()
def test_attention_in_the_levels_as_of_kl_f16_is_the_same_function(tmp_path):
    """The reference's encoder and decoder with attention at the lowest level; the moments come from quant_conv."""
    weights = vqgan_reference.published_weights(latent_channels=4)
    channels = weights["encoder.conv_out.weight"].shape[0]
    del weights["quantize.embedding.weight"]
    for name in ("encoder.conv_out", "quant_conv"):  # twice as many outputs: mean and logvar
        for kind in ("weight", "bias"):
            weights[f"{name}.{kind}"] = torch.cat([weights[f"{name}.{kind}"]] * 2)
    weights["quant_conv.weight"] = torch.cat([weights["quant_conv.weight"]] * 2, dim=1) / 2
    vae = from_published(weights, scaling_factor=1.0)
    assert list(vae.config.down_block_types)[-1] == "AttnDownEncoderBlock2D" and vae.config.latent_channels == channels
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    expected = vqgan_reference.encode(pixels, weights, levels=3, blocks=2)[:, :channels]
    assert (vae.encode(pixels).latent_dist.mean - expected).norm() <= 1e-5 * expected.norm()
    assert same(to_published(vae, "ldm"), weights)


def lightning_checkpoint(path, weights, averaged, *, code=None):
    """As latent-diffusion's trainer saves it: state_dict with the average beside, and the trainer's own objects."""

    class ModelCheckpoint:
        def __init__(self):
            self.best = float("inf")

    ModelCheckpoint.__module__ = "pytorch_lightning.callbacks.model_checkpoint"
    ModelCheckpoint.__qualname__ = "ModelCheckpoint"
    names = ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint")
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    sys.modules[names[-1]].ModelCheckpoint = ModelCheckpoint
    try:
        average = {f"model_ema.{name.replace('.', '')}": each for name, each in averaged.items()}
        content = {
            "state_dict": {**weights, **average, "model_ema.decay": torch.tensor(0.9999)},
            "loss.discriminator": code,
            "callbacks": {ModelCheckpoint: {"best_model_score": torch.tensor(1.0)}, "other": ModelCheckpoint()},
            "epoch": 3,
        }
        torch.save(content, path)
    finally:
        for name in names:
            del sys.modules[name]


def test_a_lightning_checkpoint_gives_its_average_unless_asked(tmp_path, caplog):
    caplog.set_level("INFO")
    weights, averaged = published(), {name: each + 1 for name, each in published().items()}
    lightning_checkpoint(tmp_path / "last.ckpt", weights | {"loss.logvar": torch.zeros(1)}, averaged)
    for words, expected in (([], averaged), (["--weights", "ema"], averaged), (["--weights", "model"], weights)):
        out = tmp_path / "-".join(["out", *words])
        assert run(tmp_path / "last.ckpt", out, *words, "--config", "norm_num_groups=8") == 0
        assert same(to_published(AutoencoderKLEQ.from_pretrained(out), "ldm"), expected)
        said = caplog.text
        caplog.clear()
        assert ("Taking the moving average (model_ema.*) of" in said) == ("model" not in words)
        assert "left out: loss.logvar" in said
    torch.save({"state_dict": weights}, tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="has no entry 'ema'; it has 'state_dict'"):
        read_published(tmp_path / "plain.ckpt", weights="ema")


class Evil:
    def __reduce__(self):
        return (open, ("executed", "w"))


def test_a_checkpoint_with_code_among_the_trainers_objects_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lightning_checkpoint(tmp_path / "evil.ckpt", published(), {}, code=Evil())
    with pytest.raises(ValueError, match=r"evil\.ckpt is not read: it needs code to be read"):
        read_published(tmp_path / "evil.ckpt")
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_of_another_architecture_is_refused_by_name():
    with pytest.raises(ValueError, match=r"holds encoder\.time\.weight, which LDMConverter does not know"):
        from_published(published() | {"encoder.time.weight": torch.zeros(1)}, norm_num_groups=8)
    lacking = published()
    del lacking["decoder.up.1.block.2.conv1.bias"]
    with pytest.raises(ValueError, match=r"lacks decoder\.up\.1\.block\.2\.conv1\.bias"):
        from_published(lacking, norm_num_groups=8)
    other = published() | {"post_quant_conv.weight": torch.zeros(4, 3, 1, 1)}
    with pytest.raises(ValueError, match=r"post_quant_conv\.weight has shape \(4, 3, 1, 1\), .* needs \(4, 4, 1, 1\)"):
        from_published(other, norm_num_groups=8)


def test_sds_own_sizes_give_the_names_that_other_programs_look_for():
    """ComfyUI (comfy/sd.py) tells the family by these; sd-scripts reads the same names."""
    full = {**LEVELS, "layers_per_block": 2, "block_out_channels": [128, 256, 512, 512]}
    with torch.device("meta"):
        vae = AutoencoderKLEQ(**full)
        flux = AutoencoderKLEQ(**full, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
    names = {name: tuple(each.shape) for name, each in to_published(vae, "ldm").items()}
    assert len(names) == 248 and sum(torch.Size(each).numel() for each in names.values()) == 83_653_863
    assert names["decoder.conv_in.weight"][1] == 4 and names["post_quant_conv.weight"] == (4, 4, 1, 1)
    assert {"encoder.down.2.downsample.conv.weight", "decoder.up.3.upsample.conv.weight"} <= names.keys()
    assert names["encoder.mid.attn_1.q.weight"] == (512, 512, 1, 1)  # 1x1 convolutions there
    assert not any("down_blocks" in name or "to_q" in name for name in names)
    names = to_published(flux, "ldm")
    assert len(names) == 244 and not any("quant_conv" in name for name in names)
    assert names["decoder.conv_in.weight"].shape[1] == 16


def test_the_flags_to_paste_are_printed(tmp_path, capsys):
    vae = AutoencoderKLEQ.from_config(tiny().config, padding_mode="reflect")
    LatentNormalization(scaling_factor=0.1406, shift_factor=-0.4743).apply_to(vae)
    vae.save_pretrained(tmp_path / "vae")
    assert run(tmp_path / "vae", tmp_path / "one.safetensors", "--to", "ldm") == 0
    said = capsys.readouterr().out
    assert "--vae_custom_scale 0.1406 --vae_custom_shift -0.4743 --vae_reflection_padding\n" in said
    assert "padding_mode reflect is not in the file" in said
    assert "widths [8, 8, 16, 16]" in said and "they will not load it" in said


def test_a_mean_per_channel_is_given_over_all_channels_and_said(tmp_path, capsys):
    tiny().save_pretrained(tmp_path / "vae")
    content = {"mean": 0.5, "std": 2.5, "latents_mean": [2.0, -1.0, 0.5, 0.5], "latents_std": [2.0] * 4}
    (tmp_path / "vae" / "mean_std.json").write_text(json.dumps(content))
    assert run(tmp_path / "vae", tmp_path / "one.safetensors", "--to", "ldm") == 0
    said = capsys.readouterr().out
    std = (4 + (1.5**2 + 1.5**2) / 4) ** 0.5
    assert (
        f"--vae_custom_scale {1 / std:.6g} --vae_custom_shift 0.5\n" in said
        and "Mean and std per channel are not in the file" in said
    )


def test_a_pipelines_autoencoder_is_found(tmp_path):
    tiny().save_pretrained(tmp_path / "pipe" / "vae")
    index = {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index))
    assert run(tmp_path / "pipe", tmp_path / "one.safetensors", "--to", "ldm") == 0
    assert same(load_file(tmp_path / "one.safetensors"), published())
