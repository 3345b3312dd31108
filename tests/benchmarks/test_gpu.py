"""benchmarks/gpu.py: every section runs at a tiny size, and what is compared is the same network."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from diffusers_eqvae.conversion import from_published

SECTIONS = {"training", "feed", "sampling", "autoencoder", "autoencoder_step"}


@pytest.fixture
def gpu(repository, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))
    specification = importlib.util.spec_from_file_location("gpu", repository / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_section_runs_at_a_tiny_size(repository, tmp_path):
    script, output = repository / "benchmarks" / "gpu.py", tmp_path / "gpu.json"
    command = [sys.executable, str(script), "--tiny", "--device", "cpu", "--output", str(output)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    result = json.loads(output.read_text())
    assert SECTIONS | {"hardware", "date", "versions", "arguments"} <= result.keys()
    row = result["training"]["SiT-S/2"]
    assert set(row["images_per_second"]) == {"ours", "plain", "plain_bf16"} and row["mfu"] is None
    assert all(rate > 0 for rate in row["images_per_second"].values()) and row["gflop_per_image"] > 0
    assert set(result["sampling"]["SiT-S/2"]["seconds_per_image"]) == {"unguided", "guided", "interval"}
    assert result["feed"]["data_share_of_the_step"] > 0
    assert set(result["autoencoder"]["images_per_second"]) == {"encode", "decode"}


def test_without_a_gpu_it_says_so(gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 2
    assert "No GPU here, so there is nothing to measure; --tiny --device cpu shows" in capsys.readouterr().out


@pytest.mark.parametrize(("model", "gflop"), [("S", 36.3), ("B", 138.0), ("L", 484.2), ("XL", 711.7)])
def test_operations_of_training_on_one_image(gpu, model, gflop):
    """Twice the multiplications, forward and twice as much backward: a sixth is DiT's 118.6 G of XL/2."""
    assert gpu.operations(argparse.Namespace(tiny=False), model) / 1e9 == pytest.approx(gflop, rel=0.005)


@torch.no_grad()
def test_the_plain_network_is_the_same_function(gpu):
    """Under SiT's published names, and without its position table, which the plain one draws."""
    network = gpu.PlainSiT(depth=2, width=32, heads=4, side=8)
    names = {"patches": "x_embedder.proj", "time.0": "t_embedder.mlp.0", "time.2": "t_embedder.mlp.2"}
    names |= {"adaptive.1": "final_layer.adaLN_modulation.1", "out": "final_layer.linear"}
    parts = {"query_key_value": "attn.qkv", "out": "attn.proj", "up": "mlp.fc1", "down": "mlp.fc2"}
    parts["adaptive.1"] = "adaLN_modulation.1"
    published = {"y_embedder.embedding_table.weight": network.labels.weight}
    for name, value in network.named_parameters():
        torch.nn.init.normal_(value, std=0.1)
        layer, _, kind = name.rpartition(".")
        if layer.startswith("blocks."):
            _, number, part = layer.split(".", 2)
            published[f"blocks.{number}.{parts[part]}.{kind}"] = value
        elif layer in names:
            published[f"{names[layer]}.{kind}"] = value
    model = from_published(published, layout="sit", num_attention_heads=4, sample_size=8)
    network.positions.copy_(model.pos_embed)
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 0.3, 0.9]), torch.tensor([0, 7, 1000])
    torch.testing.assert_close(-model(x, 1000 * (1 - t), y).sample, network(x, t, y), atol=1e-4, rtol=1e-4)
