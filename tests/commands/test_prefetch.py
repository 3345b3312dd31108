"""Which repositories and which of their files `eqvae prefetch` takes."""

from __future__ import annotations

import pytest

import eqvae_command
from diffusers_eqvae.commands.prefetch import Needed, files_of, main, needed_by

SD = [
    "model_index.json",
    "v1-5-pruned.safetensors",
    "v1-5-pruned.ckpt",
    "README.md",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.bin",
    "tokenizer/merges.txt",
]


@pytest.mark.parametrize("name", [name for name, each in eqvae_command.list_commands().items() if each.is_script])
def test_the_options_of_every_script_can_be_looked_at_without_running_it(name):
    needed, values = needed_by([name])
    assert needed == [] and values


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("train-transformer sit_xl_2_repa --vae a/vae", [("vae", "a/vae"), ("repa_teacher", "facebook/dinov2-base")]),
        ("train-transformer --model SiT-B/2", []),
        (
            "train-autoencoder --num_processes 8 -- --pretrained_model_name_or_path a/vae --dataset_name a/images "
            "--regularizers alignment",
            [
                ("pretrained_model_name_or_path", "a/vae"),
                ("dataset_name", "a/images"),
                ("alignment_teacher", "facebook/dinov2-with-registers-large"),
            ],
        ),
        ("inspect a/vae --compare b/vae", [("vae", "a/vae"), ("compare", "b/vae")]),
        ("evaluate-autoencoder --vae a/vae --feature_networks dinov2=a/dino inception=here.pt", None),
    ],
)
def test_what_the_words_of_a_command_name_is_needed(words, found):
    needed, _ = needed_by(words.split())
    if found is None:
        found = [("vae", "a/vae"), ("feature_networks", "a/dino")]
    assert [(each.whose, each.name) for each in needed] == found
    assert [each.is_dataset for each in needed] == [each.whose == "dataset_name" for each in needed]


def test_a_pipeline_is_needed_whole_where_it_is_sampled_and_what_lies_here_is_not(tmp_path, monkeypatch):
    assert needed_by(["sample", "--model", "a/sit", "--vae", "a/vae"])[0] == [
        Needed("model", "a/sit", whole=True),
        Needed("vae", "a/vae"),
    ]
    (tmp_path / "a" / "sit").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert needed_by(["sample", "--model", "a/sit"])[0] == []


def test_of_several_formats_and_variants_one_is_taken():
    assert files_of(dict.fromkeys(SD, 1), whole=False) == [
        "model_index.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    whole = files_of(dict.fromkeys(SD, 1), whole=True)
    assert {"unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"} < set(whole)
    assert not [file for file in whole if "fp16" in file or "pruned" in file or file.endswith((".bin", ".md"))]
    alone = [
        "config.json",
        "diffusion_pytorch_model.fp16.safetensors",
        "pytorch_model.bin",
        "taesd_encoder.safetensors",
    ]
    assert files_of(dict.fromkeys(alone, 1), whole=False) == alone[:2]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert files_of(dict.fromkeys(shards, 1), whole=False) == shards
    assert files_of({"config.json": 1, "pytorch_model.bin": 1}, whole=True) == ["config.json", "pytorch_model.bin"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["push", "x"], r"eqvae push has no options that name models; give their names: eqvae prefetch NAME \.\.\."),
        (["train-transformer", "sit_xl_3"], "The preset sit_xl_3 does not exist"),
        (["trian", "x"], "trian is neither a command of eqvae nor the name of a repository"),
    ],
)
def test_what_cannot_be_looked_at_is_said(words, said):
    with pytest.raises(ValueError, match=said):
        main(words)


def test_an_unknown_flag_is_refused_as_by_the_command_itself(capsys):
    with pytest.raises(SystemExit):
        main(["encode-latents", "--vea", "a/vae"])
    assert "unknown argument --vea; the nearest flag is --vae" in capsys.readouterr().err


def test_where_nothing_is_needed_nothing_is_asked(capsys):
    assert main(["train-transformer", "sit_b_2"]) == 0
    assert capsys.readouterr().out == "Nothing: all that this reads is here, or is no repository.\n"
