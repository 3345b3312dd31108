"""A file of weights that is not what it should be is answered in a sentence, and nothing in it runs."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model

from diffusers_eqvae.directories import OutputDirectory
from diffusers_eqvae.files import atomic_path
from diffusers_eqvae.losses.perceptual import LPIPS
from diffusers_eqvae.metrics.feature_networks import load_feature_network
from diffusers_eqvae.models.feature_teacher import FeatureTeacher
from diffusers_eqvae.perception.heads import LinearDepthHead
from diffusers_eqvae.training_utils.checkpoints import publish


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def dinov2(path):
    """A directory with a config of its own and the file as pytorch_model.bin."""
    folder = path.parent / "dinov2-tiny"
    Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(folder)
    os.replace(path, folder / "pytorch_model.bin")
    return folder


READERS = {
    "inception": lambda path: load_feature_network("inception", path),
    "squeezenet": lambda path: load_feature_network("squeezenet", path),
    "cifar_resnet": lambda path: load_feature_network("cifar_resnet", path),
    "dinov2": lambda path: load_feature_network("dinov2", dinov2(path)),
    "teacher": lambda path: FeatureTeacher.from_pretrained(dinov2(path)),
    "lpips": lambda path: LPIPS.from_pretrained("squeeze", backbone_weights=path, linear_weights=path),
    "depth head": LinearDepthHead.from_file,
}
FILES = {
    "code beside tensors": lambda path: torch.save({"weight": torch.ones(2), "flags": Hostile()}, path),
    "a plain pickle": lambda path: path.write_bytes(pickle.dumps(Hostile())),
    "an array of Python objects": lambda path: torch.save({"weight": np.array([Hostile()], dtype=object)}, path),
    "numbers in place of tensors": lambda path: torch.save({"features.0.weight": 1, "state_dict": 3}, path),
    "a list": lambda path: torch.save([torch.ones(2)], path),
    "empty": lambda path: path.write_bytes(b""),
    "a page in place of the file": lambda path: path.write_bytes(b"<html>not found</html>"),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("reader", READERS)
def test_weights_that_are_not_are_refused_in_one_sentence(reader, file, tmp_path, monkeypatch):
    if reader == "inception":
        pytest.importorskip("torch_fidelity")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    FILES[file](path)
    with pytest.raises((ValueError, FileNotFoundError), match=r"weights\.pth|dinov2-tiny") as refused:
        READERS[reader](path)
    said = str(refused.value)
    assert "weights_only" not in said and "trust" not in said and "\n" not in said
    assert not (tmp_path / "executed").exists()


CONFIGS = {
    "not JSON": "{",
    "a list": "[1]",
    "no model type": "{}",
    "a type of another kind": '{"model_type": ["dinov2"]}',
    "a size in words": '{"model_type": "dinov2", "hidden_size": "large"}',
    "code beside it": '{"auto_map": {"AutoModel": "evil.Model"}}',
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("load", [load_feature_network, FeatureTeacher.from_pretrained], ids=["network", "teacher"])
def test_a_config_that_is_not_a_models_is_named(load, config, tmp_path):
    folder = tmp_path / "dinov2-tiny"
    model = Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    model.save_pretrained(folder)
    (folder / "config.json").write_text(CONFIGS[config])
    with pytest.raises((ValueError, FileNotFoundError), match=r"config\.json and model\.safetensors") as refused:
        load(f"dinov2={folder}" if load is load_feature_network else folder)
    assert "\n" not in str(refused.value)


def test_a_teacher_of_which_weights_are_missing_is_refused(tmp_path):
    """transformers would draw them at random: features of noise."""
    model = Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    model.save_pretrained(tmp_path)
    save_file({"layernorm.weight": torch.ones(16)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"must hold all weights of a dinov2; it lacks \d+ tensors"):
        FeatureTeacher.from_pretrained(tmp_path)


def as_another_user_sees(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_what_is_saved_may_be_read_by_whom_new_files_may(umask, tmp_path, tiny_autoencoder_kl):
    """safetensors makes a file that its owner alone reads, which a colleague with a store or a model runs into."""
    before = os.umask(umask)
    try:
        with atomic_path(tmp_path / "shard.safetensors") as sibling:
            save_file({"a": torch.zeros(1)}, sibling)
        output = OutputDirectory(tmp_path / "run", kind="run")
        output.claim()
        publish(output, tiny_autoencoder_kl.save_pretrained)
        output.release()
    finally:
        os.umask(before)
    for path in (tmp_path / "shard.safetensors", tmp_path / "run" / "diffusion_pytorch_model.safetensors"):
        assert as_another_user_sees(path) == 0o666 & ~umask
