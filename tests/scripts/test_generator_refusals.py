"""What cannot be, said in one sentence before the first step: status 2 of the real programs, and nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from diffusers_eqvae.data.latent_store import LatentStore
from diffusers_eqvae.errors import run_program

from ..invariants.tiny_latents import write_store
from ..invariants.trajectories import ROOT, as_flags, run_script
from ..pipelines.kinds import make_pipeline
from .test_train_transformer import TINY

TRAIN, SAMPLE = ROOT / "training" / "train_transformer.py", ROOT / "pipelines" / "sample.py"


@pytest.fixture
def places(tmp_path, tiny_autoencoder_kl, tiny_vq_model) -> dict[str, Path]:
    """A store of each kind, and a pipeline of each."""
    made = {"latents": write_store(tmp_path / "latents", tiny_autoencoder_kl)}
    made["sit"], made["maskgit"] = tmp_path / "sit", tmp_path / "maskgit"
    make_pipeline("SiT", tiny_autoencoder_kl, tiny_vq_model).save_pretrained(made["sit"])
    make_pipeline("MaskGIT", tiny_autoencoder_kl, tiny_vq_model).save_pretrained(made["maskgit"])
    made["tiny"] = tmp_path / "tiny.json"
    made["tiny"].write_text(json.dumps(TINY))
    return made


def refused(script: Path, capsys, tmp_path, **options) -> str:
    """The sentence that a program ends with."""
    common = {"output_dir": tmp_path / "out"}
    if script == TRAIN:
        common |= {"max_train_steps": 2, "report_to": "none", "train_batch_size": 2, "num_inference_steps": 2}
    capsys.readouterr()
    status = run_program(script.name, lambda: run_script(script, as_flags({**common, **options})))
    said = capsys.readouterr().err
    assert status == 2 and "Traceback" not in said and not (tmp_path / "out").exists(), said
    (sentence,) = [line for line in said.splitlines() if line.startswith(f"{script.name}: error: ")]
    return sentence.partition(": error: ")[2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"objective": "denoising"}, "DenoisingObjective trains models that predict epsilon; this one predicts flow_"),
        (
            {"model": "DiT-S/2", "objective": "flow_matching", "config_overrides": "prediction_type=logits"},
            "trains models that predict flow_prediction or epsilon or score or sample; this one predicts logits",
        ),
        ({"model": "MaskGIT-S"}, "reads tokens, and these data are latents; choose a --model of another objective"),
        ({"config_overrides": "in_channels=16"}, "in_channels = 16, but the latents have 4"),
        ({"gradient_checkpointing_every": 2}, "--gradient_checkpointing_every 2 acts with --gradient_checkpointing"),
        (
            {"gradient_checkpointing_every": 2, "gradient_checkpointing": "true"},
            "recomputes none of the 1 blocks; give at most 1, or leave --gradient_checkpointing out",
        ),
    ],
)
def test_a_training_that_cannot_be(options, words, places, capsys, tmp_path):
    given = {"model": places["tiny"], "latents_dir": places["latents"], **options}
    assert words in refused(TRAIN, capsys, tmp_path, **given)


def test_a_model_of_other_classes_or_another_size(places, capsys, tmp_path):
    assert len(LatentStore(places["latents"]).classes) == 3
    sit = places["sit"] / "transformer"
    config = json.loads((sit / "config.json").read_text())
    (sit / "config.json").write_text(json.dumps({**config, "num_classes": 2}))
    said = refused(TRAIN, capsys, tmp_path, model=sit, latents_dir=places["latents"])
    assert "num_classes = 2, but the latents have 3" in said, said
    (sit / "config.json").write_text(json.dumps({**config, "attention_head_dim": 16}))
    for script, given in (
        (TRAIN, {"model": sit, "latents_dir": places["latents"]}),
        (SAMPLE, {"model": places["sit"], "num_samples": 2}),
    ):
        said = refused(script, capsys, tmp_path, **given)
        assert "its weights are not of the size that its config says (class_embedder.weight expected shape" in said
        assert "use both files of one model" in said and "ignore_mismatched" not in said, said


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("sit", {"class_labels": 99}, r"Class ids must lie in 0..2 for this transformer; got 99"),
        ("sit", {"class_labels": "ottr"}, "Did you mean"),
        ("sit", {"scheduler": "rk4"}, "The sampler must be one of saved, euler, heun, dopri5, sde, sde_heun"),
        (
            "sit",
            {"scheduler": "ddpm"},
            "The sampler ddpm does not sample a flow-matching model; it is sampled by saved",
        ),
        (
            "maskgit",
            {"scheduler": "euler"},
            "The sampler euler does not sample a masked-token model; it is sampled by saved.",
        ),
        ("sit", {"scheduler": "sde_heun", "last_step": "none"}, "sde_solver='heun' needs a last step"),
        ("sit", {"scheduler": "sde", "diffusion_form": "quadratic"}, "diffusion_form must be one of constant, SBDM"),
        (
            "sit",
            {"guide": "MASKGIT", "guidance_scale": 2},
            "The guide has objective 'masked_tokens' and the transformer",
        ),
        ("maskgit", {"guided_channels": 3}, "Tokens have no channels to guide"),
    ],
)
def test_a_sampling_that_cannot_be(kind, options, words, places, capsys, tmp_path):
    given = {name: places["maskgit"] if value == "MASKGIT" else value for name, value in options.items()}
    assert words in refused(SAMPLE, capsys, tmp_path, model=places[kind], num_samples=2, **given)


def test_a_layer_that_the_weights_lack_is_not_made_up(places, capsys, tmp_path):
    """diffusers would fill it with random numbers."""
    file = places["sit"] / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["proj_out.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    for script, given in (
        (SAMPLE, {"model": places["sit"], "num_samples": 2}),
        (TRAIN, {"model": file.parent, "latents_dir": places["latents"]}),
    ):
        said = refused(script, capsys, tmp_path, **given)
        assert "lacks the weights proj_out.weight of its SiTTransformer2DModel: the file is not whole" in said, said
