"""--trainable lora of both training scripts: adapters learn, the base stays, and what is saved is plain."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from peft import PeftModel

from diffusers_eqvae.hub import prepare_push
from diffusers_eqvae.model_card import RunMetadata
from diffusers_eqvae.pipelines.pipeline_class_conditional import ClassConditionalPipeline
from diffusers_eqvae.schedulers.scheduling_flow_match_ode import FlowMatchODEScheduler

from ..invariants import test_transformer_trajectories as generator
from ..invariants.trajectories import ROOT, as_flags, assert_equal, last_checkpoint, run_script
from .test_train_autoencoder import SCRIPT, flags, folder

__all__ = ["folder", "store"]
store = generator.store
LORA = {"trainable": "lora", "lora_rank": 2, "lora_alpha": 8, "validation_steps": 0, "ema_decay": 0.5}


def test_adapters_alone_learn_and_the_finished_autoencoder_is_plain(folder, tiny_autoencoder_kl):
    options = {**LORA, "regularizers": ["equivariance", "explicit"], "max_train_steps": 3}
    options |= {"checkpointing_steps": 1, "lora_dropout": 0.1, "normalization": "config"}
    arguments = flags(folder, tiny_autoencoder_kl, **options)
    run_script(SCRIPT, arguments)
    run = folder / "run"
    whole = last_checkpoint(run, "objective")
    trained = [name for name in whole["ema"] if name.startswith("model.")]  # explicit's guard keeps a number beside
    assert set(whole["module"]) == set(whole["ema"]) and all(".lora_" in name for name in trained)
    assert all(whole["ema"][name].abs().max() > 0 for name in trained if ".lora_B." in name)
    assert {name.split(".")[1] for name in trained} == {"encoder", "decoder", "quant_conv", "post_quant_conv"}

    plain = AutoencoderKL.from_pretrained(run)
    again = PeftModel.from_pretrained(AutoencoderKL.from_pretrained(folder / "vae"), str(run / "lora"))
    for name, value in again.base_model.model.state_dict().items():
        if ".lora_" in name:
            assert torch.equal(value, whole["ema"][f"model.{name}"])
    pixels = torch.rand(2, 3, 32, 32).double()
    models = again.base_model.model.eval(), plain, tiny_autoencoder_kl
    unfused, fused, base = (copy.deepcopy(model).double()(pixels).sample for model in models)
    assert (fused - unfused).abs().max() < 1e-6 < 1e-4 < (fused - base).abs().max()
    merged = again.merge_and_unload().state_dict()
    assert all(torch.equal(merged[name], value) for name, value in plain.state_dict().items())

    assert "lora" in json.loads((run / ".eqvae.json").read_text())["names"]
    files, card = prepare_push(run, "me/eq-vae")
    assert {"lora/adapter_config.json", "lora/adapter_model.safetensors"} <= set(files)
    assert str(folder) not in card + (run / "lora" / "adapter_config.json").read_text()
    metadata = RunMetadata.load(run / "run_metadata.json")
    assert metadata.training["lora"] == {"rank": 2, "alpha": 8} and metadata.training["trainable"] == "lora"

    shutil.rmtree(run / "checkpoints" / "step-00000003")
    run_script(SCRIPT, [*arguments, "--resume_from_checkpoint", "latest"])
    assert_equal(whole, last_checkpoint(run, "objective"))


def test_adapters_of_the_decoder_are_drop_in_and_optimized_by_muon(folder, tiny_autoencoder_kl):
    options = {**LORA, "trainable": ["lora", "decoder"], "regularizers": "none", "optimizer": "muon"}
    run_script(SCRIPT, flags(folder, tiny_autoencoder_kl, **options))
    after, before = AutoencoderKL.from_pretrained(folder / "run").state_dict(), tiny_autoencoder_kl.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}
    assert RunMetadata.load(folder / "run" / "run_metadata.json").model["compatibility"] == "drop-in"


def test_what_acts_on_no_adapter_is_refused_or_named(folder, tiny_autoencoder_kl, caplog):
    arguments = flags(folder, tiny_autoencoder_kl, **LORA | {"trainable": ["lora", "decoder"]})
    with pytest.raises(ValueError, match="The regularizer explicit moves nothing of the autoencoder but its encoder"):
        run_script(SCRIPT, [*arguments, "--regularizers", "explicit"])
    words = flags(folder, tiny_autoencoder_kl, trainable="lora")[2:]  # without the pretrained one
    (folder / "model.json").write_text("{}")
    with pytest.raises(
        ValueError, match="has learned nothing; give --pretrained_model_name_or_path, or leave lora out"
    ):
        run_script(SCRIPT, [*words, "--model_config", str(folder / "model.json")])
    with pytest.raises(SystemExit):
        run_script(SCRIPT, [*arguments, "--trainable", "decoder", "--regularizers", "none", "--dry_run"])
    assert "Without effect, since --trainable is decoder: --lora_rank, --lora_alpha." in caplog.text


@pytest.fixture
def base(tmp_path, store, tiny_autoencoder_kl):
    """A pipeline to adapt, whose zero-initialised layers have learned something."""
    model = generator.save_model_without_zeros(tmp_path / "transformer")
    ClassConditionalPipeline(model, tiny_autoencoder_kl, FlowMatchODEScheduler()).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def sampled(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    return pipeline([0, 1], num_inference_steps=3, guidance_scale=1.5, generator=noise, output_type="latent").images


def test_adapters_of_a_generator_are_saved_loaded_fused_and_resumed(tmp_path, store, base):
    options = {"model": base, "trainable": "lora", "lora_rank": 2, "lora_alpha": 4, "ema_decay": 0.5}
    options |= {"max_train_steps": 4, "checkpointing_steps": 2, "lora_dropout": 0.1}
    whole, run = generator.train(store, tmp_path / "run", **options), tmp_path / "run"
    assert all(".lora_" in name for name in whole["ema"])
    before, after = (DiffusionPipeline.from_pretrained(path) for path in (base, run))
    weights = before.transformer.state_dict()
    trained = {name: value for name, value in after.transformer.state_dict().items() if name.endswith("weight")}
    changed = [name for name, value in trained.items() if not torch.equal(value, weights[name])]
    assert set(changed) == set(trained) - {"class_embedder.weight"}

    plain = sampled(before)
    before.load_lora_weights(run / "lora")
    state = before.transformer.state_dict()
    for name, value in whole["ema"].items():
        (loaded,) = [state[key] for key in state if key.replace("default_0", "default") == name.removeprefix("model.")]
        assert torch.equal(loaded, value)
    unfused = sampled(before)
    before.fuse_lora()
    fused = sampled(before)
    assert (fused - unfused).abs().max() < 1e-5 < 1e-3 < (fused - plain).abs().max()
    assert torch.equal(fused, sampled(after))
    before.unfuse_lora()
    before.unload_lora_weights()
    assert (sampled(before) - plain).abs().max() < 1e-5

    shutil.rmtree(run / "checkpoints" / "step-00000004")
    assert_equal(whole, generator.train(store, run, resume_from_checkpoint="latest", **options))
    metadata = RunMetadata.load(run / "run_metadata.json")
    assert metadata.training["lora"] == {"rank": 2, "alpha": 4}
    assert {"lora/adapter_config.json", "lora/pytorch_lora_weights.safetensors"} <= set(prepare_push(run)[0])

    words = {"num_samples": 2, "num_inference_steps": 2, "scheduler": "euler"}
    for name, given in (("with", {"model": base, "lora": run / "lora"}), ("fused", {"model": run})):
        run_script(ROOT / "pipelines" / "sample.py", as_flags({"output_dir": tmp_path / name, **words, **given}))
    with np.load(tmp_path / "with" / "samples.npz") as one, np.load(tmp_path / "fused" / "samples.npz") as other:
        assert np.array_equal(one["arr_0"], other["arr_0"])


def test_what_has_no_adapters_of_a_generator_is_refused(tmp_path, store, base):
    with pytest.raises(ValueError, match=r"tiny.json is a new one, which adapters leave as it is; name a saved model"):
        generator.train(store, tmp_path / "run", trainable="lora")
    with pytest.raises(ValueError, match="--new_classes starts labels anew, which adapters leave as it is"):
        generator.train(store, tmp_path / "run", trainable="lora", model=base, new_classes=True)
    pipeline = DiffusionPipeline.from_pretrained(base)
    with pytest.raises(ValueError, match=r"does not hold adapters of a transformer .* it holds class_embedder.weight"):
        pipeline.load_lora_weights(str(base / "transformer"))
