"""`eqvae convert` on files and directories, and a layout from a file outside the package."""

import argparse
import json
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file

import eqvae_command
from diffusers_eqvae import AutoencoderKLEQ, ClassConditionalPipeline, FlowMatchODEScheduler, SiTTransformer2DModel
from diffusers_eqvae.conversion import read_published
from tests.golden.test_sit_golden import HEADS, SQUARE, published_weights

OPTIONS = ["--config", f"num_attention_heads={HEADS}"]


def run(*words):
    return eqvae_command.main(["convert", *map(str, words)])


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def weights(seed=0):
    """As published, with the position table that a model of ours writes."""
    from diffusers_eqvae.models.positions import sincos_position_embedding

    return published_weights(SQUARE, seed) | {"pos_embed": sincos_position_embedding(4, 4, 32)}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_there_and_back_on_the_command_line(tmp_path, suffix, capsys):
    published, source = weights(), tmp_path / f"published.{suffix}"
    save_file(published, source) if suffix == "safetensors" else torch.save(published, source)
    assert run(source, tmp_path / "ours", "--from", "sit", *OPTIONS) == 0
    assert "SiTTransformer2DModel with 0.1 M parameters" in capsys.readouterr().out
    model = SiTTransformer2DModel.from_pretrained(tmp_path / "ours")
    assert torch.equal(model.proj_out.weight, -published["final_layer.linear.weight"])
    back = tmp_path / f"back.{suffix}"
    assert run(tmp_path / "ours", back, "--to", "sit") == 0
    assert same(load_file(back) if suffix == "safetensors" else torch.load(back, weights_only=True), published)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("num_attention_heads=[", r"A VALUE of --config must be YAML: .* in num_attention_heads=\[; quote text"),
        ("num_attention_heads", "--config takes KEY=VALUE words"),
        ("num_attention_heads=many", r"No SiTTransformer2DModel can be made of these options "),
    ],
)
def test_options_that_make_no_model_are_a_sentence(option, message, tmp_path, capsys):
    save_file(weights(), tmp_path / "published.safetensors")
    assert run(tmp_path / "published.safetensors", tmp_path / "ours", "--from", "sit", "--config", option) == 2
    assert re.search(message, said := capsys.readouterr().err) and "Traceback" not in said


def test_a_layout_that_must_be_chosen_is_chosen_by_a_flag(tmp_path, capsys):
    save_file(weights(), tmp_path / "published.safetensors")
    assert run(tmp_path / "published.safetensors", tmp_path / "ours", *OPTIONS) == 2
    assert re.search(r"the layouts dit and sit, which .* \(--from LAYOUT\)", capsys.readouterr().err, re.S)
    assert not (tmp_path / "ours").exists()


def test_the_transformer_of_a_pipeline_is_found(tmp_path, tiny_sit, tiny_autoencoder_kl):
    ClassConditionalPipeline(tiny_sit, tiny_autoencoder_kl, FlowMatchODEScheduler()).save_pretrained(tmp_path / "pipe")
    assert run(tmp_path / "pipe", tmp_path / "sit.safetensors", "--to", "sit") == 0
    tensors = load_file(tmp_path / "sit.safetensors")
    assert torch.equal(tensors["final_layer.linear.weight"], -tiny_sit.proj_out.weight)


def test_a_training_checkpoint_gives_its_average_unless_asked(tmp_path, caplog):
    caplog.set_level("INFO")
    model, ema = weights(0), weights(1)
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in model.items()}
    flags = argparse.Namespace(model="SiT-XL/2", lr=1e-4)
    torch.save({"model": wrapped, "ema": ema, "opt": {"state": {}}, "args": flags}, tmp_path / "0400000.pt")
    assert same(read_published(tmp_path / "0400000.pt"), ema)
    assert "Taking the entry 'ema' of 'model', 'ema', 'opt', 'args'." in caplog.text and "prefix" not in caplog.text
    assert same(read_published(tmp_path / "0400000.pt", weights="model"), model)
    assert "The prefix 'module._orig_mod.' of every name is removed." in caplog.text
    with pytest.raises(ValueError, match="has no entry 'averaged'; it has 'model', 'ema', 'opt'"):
        read_published(tmp_path / "0400000.pt", weights="averaged")
    torch.save({"model": model, "opt": {}}, tmp_path / "plain.pt")
    assert same(read_published(tmp_path / "plain.pt"), model)
    assert run(tmp_path / "0400000.pt", tmp_path / "out", "--from", "dit", "--weights", "model", *OPTIONS) == 0
    loaded = SiTTransformer2DModel.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.proj_out.weight, model["final_layer.linear.weight"])


class Evil:
    def __reduce__(self):
        return (open, ("executed", "w"))


def test_a_file_that_would_run_code_is_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.ones(1), "evil": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt is not read: it needs code to be read") as error:
        read_published(tmp_path / "evil.pt")
    assert "weights_only" not in str(error.value) and not (tmp_path / "executed").exists()
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="must hold tensors by name; it holds a list"):
        read_published(tmp_path / "list.pt")


@pytest.mark.parametrize("name", ["empty.pt", "cut.pt", "text.pt", "text.safetensors"])
def test_a_damaged_file_is_called_damaged(name, tmp_path):
    torch.save({"weight": torch.ones(1000)}, tmp_path / "whole.pt")
    content = {"empty": b"", "cut": (tmp_path / "whole.pt").read_bytes()[:2000], "text": b"<html>not found</html>"}
    (tmp_path / name).write_bytes(content[name.partition(".")[0]])
    with pytest.raises(ValueError, match=f"{name} is not read: it is damaged"):
        read_published(tmp_path / name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.pt", "out"], "nowhere.pt is not a file"),
        (["sit.pt", "full"], "full exists already"),
        (["sit.pt", "sit.pt"], "sit.pt exists already"),
        (["sit.pt", "out"], "fit the layouts dit and sit"),
        (["sit.pt", "out", "--from", "sit", "--config", "heads"], "--config takes KEY=VALUE words; got 'heads'"),
        (["vae", "out"], "vae is a directory; say which layout to write it in: --to diffusers_dit, dit, "),
        (["vae", "out.pt", "--to", "sit"], "vae does not hold a SiTTransformer2DModel"),
        (["vae", "out", "--to", "sit"], "the destination is a file"),
        (["vae", "out.pt", "--to", "sdxl"], "There is no converter 'sdxl'; there are diffusers_dit, dit, "),
    ],
)
def test_what_cannot_be_converted_ends_with_a_sentence(
    words, message, tmp_path, monkeypatch, capsys, tiny_autoencoder_kl
):
    monkeypatch.chdir(tmp_path)
    torch.save(weights(), "sit.pt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    tiny_autoencoder_kl.save_pretrained("vae")
    assert run(*words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.pt").exists()


EXTENSION = """
from diffusers_eqvae import AutoencoderKLEQ
from diffusers_eqvae.conversion import Converter, register_converter

CONFIG = {config}


@register_converter("reversed")
class Reversed(Converter):
    target = AutoencoderKLEQ
    idle = ("step",)

    def matches(self, shapes):
        return "rev.thgiew.ni_vnoc.redoced" in shapes

    def config(self, tensors, overrides):
        return {{**CONFIG, "latent_channels": len(tensors["rev.saib.vnoc_tnauq_tsop"]), **overrides}}

    def to_ours(self, tensors, config):
        return {{name[4:][::-1]: tensor for name, tensor in tensors.items() if name != "step"}}

    def from_ours(self, state_dict, config):
        return {{"rev." + name[::-1]: tensor for name, tensor in state_dict.items()}}
"""


def test_a_layout_from_a_file_outside_the_package(tmp_path, tiny_autoencoder_kl):
    """In a process of its own, as a user would: there, back, and a tensor that the layout does not know."""
    names = ("block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "norm_num_groups")
    config = {name: tiny_autoencoder_kl.config[name] for name in names}
    extension = tmp_path / "reversed_layout.py"
    extension.write_text(textwrap.dedent(EXTENSION).format(config=json.loads(json.dumps(config))))
    ours = tiny_autoencoder_kl.state_dict()
    published = {"rev." + name[::-1]: tensor.clone() for name, tensor in ours.items()}
    save_file(published | {"step": torch.ones(1)}, tmp_path / "published.safetensors")
    save_file(published | {"rev.extra": torch.ones(1)}, tmp_path / "odd.safetensors")

    def convert(*words):
        command = [sys.executable, "-m", "eqvae_command", "convert", *map(str, words), "--extension", str(extension)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    assert (done := convert("published.safetensors", "ours")).returncode == 0, done.stderr
    assert same(AutoencoderKLEQ.from_pretrained(tmp_path / "ours").state_dict(), ours)
    assert (done := convert("ours", "back.safetensors", "--to", "reversed")).returncode == 0, done.stderr
    assert same(load_file(tmp_path / "back.safetensors"), published)
    refused = convert("odd.safetensors", "out")
    assert refused.returncode == 2 and "holds rev.extra, which Reversed does not know" in refused.stderr


def test_weights_that_are_not_finite_are_converted_neither_way(tmp_path, tiny_autoencoder_kl, tiny_sit, capsys):
    published = weights()
    published["final_layer.linear.bias"][0] = torch.nan
    save_file(published, tmp_path / "published.safetensors")
    assert run(tmp_path / "published.safetensors", tmp_path / "ours", "--from", "sit", *OPTIONS) == 2
    assert "NaN or infinite (proj_out.bias of its SiTTransformer2DModel); take an earlier" in capsys.readouterr().err
    tiny_sit.proj_out.bias.data.fill_(torch.inf)
    tiny_sit.save_pretrained(tmp_path / "sit")
    assert run(tmp_path / "sit", tmp_path / "back.pt", "--to", "sit") == 2
    assert "NaN or infinite (proj_out.bias of its SiTTransformer2DModel)" in capsys.readouterr().err
    file = tmp_path / "sit" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:99])
    assert run(tmp_path / "sit", tmp_path / "back.pt", "--to", "sit") == 2
    assert "is cut short or damaged; save or download it again" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["published.safetensors", "sit"]


def test_where_nothing_can_be_written_is_said_before_the_work(tmp_path, tiny_sit, capsys):
    tiny_sit.save_pretrained(tmp_path / "sit")
    (tmp_path / "file").touch()
    assert run(tmp_path / "sit", tmp_path / "file" / "back.pt", "--to", "sit") == 2
    assert "cannot be written" in (said := capsys.readouterr().err) and "Name another place" in said
