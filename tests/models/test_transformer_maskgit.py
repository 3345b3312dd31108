"""MaskGIT's transformer: sizes, what it refuses, checkpointing, and a saved model in a fresh process."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from diffusers_eqvae.classes import ClassTable
from diffusers_eqvae.models.backbone import backbones
from diffusers_eqvae.models.transformer_maskgit import MaskGITTransformer2DModel


def build(**options):
    sizes = {"sample_size": 4, "codebook_size": 16, "num_layers": 2, "num_attention_heads": 2, "num_classes": 3}
    return MaskGITTransformer2DModel(**sizes | {"attention_head_dim": 8} | options)


@pytest.mark.parametrize(("name", "millions"), [("MaskGIT-B", 174.2), ("MaskGIT-S", 16.0)])
def test_presets_have_the_published_number_of_parameters(name, millions):
    with torch.device("meta"):
        model = MaskGITTransformer2DModel.from_preset(name)
    assert backbones()[name] is MaskGITTransformer2DModel
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == millions
    assert (model.config.objective, model.config.prediction_type) == ("masked_tokens", "logits")


def test_what_is_not_tokens_or_labels_is_refused():
    model, tokens, labels = build(), torch.full((2, 4, 4), 16), torch.tensor([0, 3])
    refused = [
        (torch.randn(2, 4, 4, 4), labels, r"takes tokens of shape \(batch, 4, 4\), integers; got \(2, 4, 4, 4\) of "),
        (tokens.float(), labels, r"integers; got \(2, 4, 4\) of torch.float32"),
        (torch.full((2, 8, 8), 16), labels, r"got \(2, 8, 8\).* or build it with another `sample_size`"),
        (tokens + 1, labels, r"Tokens must lie in 0 \.\. 16 \(16 is the mask\); got 17 \.\. 17"),
        (tokens, torch.tensor([0, 4]), r"`class_labels` must lie in 0 \.\. 3 \(3 is the null class\); got 0 \.\. 4"),
        (tokens, torch.tensor([0]), r"`class_labels` must have shape \(2,\), one per sample"),
    ]
    for wrong_tokens, wrong_labels, words in refused:
        with pytest.raises(ValueError, match=words):
            model(wrong_tokens, None, wrong_labels)
    for options, words in (
        ({"prediction_type": "epsilon"}, "must be 'logits'"),
        ({"dropout": 1.0}, r"`dropout` must lie in \[0, 1\)"),
        ({"class_dropout_prob": -0.1}, r"`class_dropout_prob` must lie in \[0, 1\)"),
        ({"codebook_size": 0}, "`codebook_size` must be at least 1"),
        ({"sample_size": (4, 0)}, "must be at least 1; got 4x0"),
    ):
        with pytest.raises(ValueError, match=words):
            build(**options)


def test_dropout_acts_in_training_alone_and_checkpointing_repeats_it():
    model, tokens, labels = build(dropout=0.3).train(), torch.randint(17, (2, 4, 4)), torch.tensor([0, 3])
    drop = torch.zeros(2, dtype=torch.bool)

    def gradients(checkpointing):
        (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
        torch.manual_seed(1)
        output = model(tokens, None, labels, drop_labels=drop).sample
        return output, torch.autograd.grad(output.square().sum(), [model.pos_embed, model.token_embedder.weight])

    plain, checkpointed = gradients(False), gradients(True)
    assert torch.equal(plain[0], checkpointed[0])
    for first, second in zip(plain[1], checkpointed[1], strict=True):
        torch.testing.assert_close(first, second)
    with torch.no_grad():
        assert not torch.equal(model(tokens, None, labels, drop_labels=drop).sample, plain[0])
        model.eval()
        assert torch.equal(model(tokens, None, labels).sample, model(tokens, None, labels).sample)


@torch.no_grad()
def test_labels_are_dropped_in_training_with_the_configured_share():
    model = build(class_dropout_prob=0.25, dropout=0.0).train()
    tokens, labels = torch.full((4000, 4, 4), 16), torch.zeros(4000, dtype=torch.int64)
    without = model(tokens[:1], None, torch.tensor([3]), drop_labels=torch.tensor([False])).sample
    dropped = (model(tokens, None, labels).sample - without).abs().flatten(1).amax(1) < 1e-6
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)


@torch.no_grad()
def test_other_classes_keep_what_they_share():
    model = build(id2label={"0": "cat", "1": "dog", "2": "otter"}).eval()
    torch.nn.init.normal_(model.logit_bias)
    other = model.with_classes(ClassTable(("otter", "newt", "owl", "cat"))).eval()
    tokens = torch.randint(17, (3, 4, 4))
    ours = model(tokens, None, torch.tensor([2, 0, 3])).sample
    theirs = other(tokens, None, torch.tensor([0, 3, 4])).sample  # the same names, and no class
    assert torch.equal(ours, theirs) and other.config.num_classes == 4
    assert not torch.equal(ours[:1], other(tokens[:1], None, torch.tensor([1])).sample)


def test_a_saved_model_is_itself_in_a_fresh_process(tmp_path):
    model = build(id2label={"0": "cat"}).eval()
    model.save_pretrained(tmp_path)
    code = f"""
import torch, diffusers_eqvae
from diffusers import AutoModel
model = AutoModel.from_pretrained({str(tmp_path)!r}).eval()
assert type(model).__name__ == "MaskGITTransformer2DModel" and model.config.id2label == {{"0": "cat"}}
with torch.no_grad():
    print(model(torch.full((1, 4, 4), 16), None, torch.tensor([1])).sample.double().sum().item())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    with torch.no_grad():
        expected = model(torch.full((1, 4, 4), 16), None, torch.tensor([1])).sample.double().sum().item()
    assert float(result.stdout) == expected
