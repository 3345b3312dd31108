"""MaskGIT's forward and loss against the transcription in `maskgit_reference`, with random weights in every layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusers_eqvae.models.transformer_maskgit import MaskGITTransformer2DModel
from diffusers_eqvae.objectives.masked_tokens import MaskedTokensArguments, MaskedTokensObjective
from diffusers_eqvae.randomness import StepRandomness

from . import maskgit_reference as reference

SIZES = {"codebook_size": 11, "num_layers": 3}
HEADS = 2


@pytest.fixture
def model():
    model = MaskGITTransformer2DModel(
        **SIZES, sample_size=(3, 4), num_attention_heads=HEADS, attention_head_dim=8, num_classes=5, mlp_ratio=3.0
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.double().eval()


def arrays(model) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def test_logits_and_hidden_states(model):
    tokens = torch.randint(12, (4, 3, 4))
    tokens[0] = model.mask_token
    labels = torch.tensor([0, 4, 5, 2])
    drop = torch.tensor([False, False, False, True])
    output = model(tokens, None, labels, drop_labels=drop, hidden_layers=(1, 3))
    for n, label in enumerate([0, 4, 5, 5]):
        logits, states = reference.forward(arrays(model), tokens[n].numpy(), label, heads=HEADS, **SIZES)
        ours = output.sample[n].permute(1, 2, 0).reshape(12, 11).numpy()
        np.testing.assert_allclose(ours, logits, rtol=1e-11, atol=1e-11)
        for layer in (1, 3):
            np.testing.assert_allclose(output.hidden_states[layer][n].numpy(), states[layer - 1], rtol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("smoothing", [0.1, 0.0])
def test_the_loss(model, smoothing):
    objective = MaskedTokensObjective(model, arguments=MaskedTokensArguments(mask_label_smoothing=smoothing))
    batch = {"tokens": torch.randint(11, (6, 3, 4)), "class_labels": torch.tensor([0, 1, 2, 3, 4, 0])}
    draw = objective.draw(batch, StepRandomness(seed=3))
    assert draw["masked"].any() and not draw["masked"].all()
    draw["drop_labels"][2] = True
    expected = []
    for n in range(6):
        tokens, masked = batch["tokens"][n].numpy(), draw["masked"][n].numpy()
        visible = np.where(masked, model.mask_token, tokens)
        label = 5 if draw["drop_labels"][n] else int(batch["class_labels"][n])
        logits, _ = reference.forward(arrays(model), visible, label, heads=HEADS, **SIZES)
        expected.append(reference.loss(logits, tokens, masked, smoothing))
    loss, logs = objective.total(objective(batch, draw))
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-11) and logs["loss"] == loss
