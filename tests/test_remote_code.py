"""Code beside weights: what the generated file holds, who names it, and that it samples what the package does."""

from __future__ import annotations

import json
import os
import re
import sys
import types

import pytest
import torch
from diffusers import DiffusionPipeline

import diffusers_eqvae
from diffusers_eqvae import ClassConditionalPipeline, FlowMatchODEScheduler, remote_code
from diffusers_eqvae.remote_code import CODE, FILE, bundle, copy_with_code, with_code


@pytest.fixture
def saved(tmp_path, tiny_sit, tiny_autoencoder_kl):
    ClassConditionalPipeline(tiny_sit, tiny_autoencoder_kl, FlowMatchODEScheduler()).save_pretrained(tmp_path / "sit")
    return tmp_path / "sit"


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline([1, 2], num_inference_steps=2, guidance_scale=2.0, generator=generator, output_type="pt").images


@pytest.mark.filterwarnings("ignore")  # of diffusers, about the code that it runs
def test_a_copy_with_code_samples_the_same_by_code_of_its_own(saved, tmp_path):
    copy_with_code(saved, tmp_path / "code")
    own = DiffusionPipeline.from_pretrained(tmp_path / "code", trust_remote_code=True)
    package = type(own).__module__.partition(".")[0]
    assert re.fullmatch(r"diffusers_eqvae_code_[0-9a-f]{12}", package)
    for part in (own.transformer, own.scheduler):
        assert type(part).__module__.partition(".")[0] == package
    assert type(own.vae).__module__.startswith("diffusers.")
    assert torch.equal(draw(own), draw(ClassConditionalPipeline.from_pretrained(saved)))
    assert not isinstance(own, ClassConditionalPipeline)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tmp_path / "code")
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert os.path.samefile(saved / weights, tmp_path / "code" / weights), "linked, not copied"
    with pytest.raises(ValueError, match=r"code exists already; choose another directory"):
        copy_with_code(saved, tmp_path / "code")


def test_the_original_stays_plain_and_the_copy_names_the_file(saved, tmp_path):
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    config = json.loads((saved / "transformer" / "config.json").read_text())
    (saved / "transformer" / "config.json").write_text(json.dumps(config | {"_name_or_path": "/home/me/run"}))
    before[saved / "transformer" / "config.json"] = (saved / "transformer" / "config.json").read_bytes()
    copy_with_code(saved, tmp_path / "code")
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before
    index = json.loads((tmp_path / "code" / "model_index.json").read_text())
    assert index["_class_name"] == [CODE, "ClassConditionalPipeline"]
    assert index["transformer"] == [CODE, "SiTTransformer2DModel"] and index["vae"] == ["diffusers", "AutoencoderKL"]
    config = json.loads((tmp_path / "code" / "transformer" / "config.json").read_text())
    assert config["auto_map"] == {"AutoModel": f"{CODE}.SiTTransformer2DModel"} and "_name_or_path" not in config
    places = {path.parent.relative_to(tmp_path / "code").as_posix() for path in (tmp_path / "code").rglob(FILE)}
    assert places == {".", "transformer", "scheduler"}


def test_the_file_holds_sources_word_for_word_and_no_line_that_diffusers_would_take_for_an_import():
    text = bundle({"SiTTransformer2DModel": "models.transformer_sit"})
    found = {}
    exec(text.partition("\n\nclass _Sources")[0], found)
    assert {"models.transformer_sit", "models.backbone", "models.positions", "classes"} <= set(found["SOURCES"])
    for name, source in found["SOURCES"].items():
        assert source == (remote_code.HOME / f"{name.replace('.', '/')}.py").read_text()
        for line in re.findall(r"^\s*(?:from|import) +\.*([\w.]*)", source, re.MULTILINE):
            assert line.split(".")[0] != "diffusers_eqvae", f"{name} would need the installed package"
    imports = re.findall(r"^\s*(?:import|from)\s+(\S+)", text, re.MULTILINE)
    assert set(imports) == {"importlib", "importlib.abc", "importlib.util", "sys"}
    assert text == bundle({"SiTTransformer2DModel": "models.transformer_sit"})


@pytest.mark.parametrize("name", ["ClassConditionalPipeline", "AutoencoderKLEQ", "VQModelEQ", "MaskGITPipeline"])
def test_whatever_a_saved_file_may_name_can_be_bundled(name):
    module = getattr(diffusers_eqvae, name).__module__
    needed = remote_code._needed([module.partition(".")[2]])
    assert all((remote_code.HOME / remote_code._path(each)).is_file() for each in needed), needed


def test_what_opens_anywhere_and_what_comes_from_an_extension_are_refused(tmp_path, tiny_autoencoder_kl, monkeypatch):
    tiny_autoencoder_kl.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="opens with diffusers alone and needs no code beside it"):
        with_code(tmp_path / "vae")
    theirs = type("Theirs", (), {"__module__": "diffusers_eqvae.extensions.theirs"})
    monkeypatch.setitem(sys.modules, "diffusers_eqvae.extensions.theirs", types.ModuleType("theirs"))
    monkeypatch.setattr(diffusers_eqvae, "Theirs", theirs, raising=False)
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "Theirs"}')
    with pytest.raises(ValueError, match=r"from an extension, extensions\.theirs, which is not published"):
        with_code(tmp_path / "vae")
