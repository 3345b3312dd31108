"""LightningDiT's block with converted weights against `lightningdit_reference` (float64 numpy)."""

import numpy as np
import pytest
import torch

from diffusers_eqvae.conversion import from_published, to_published
from diffusers_eqvae.models.positions import rotary_angles

from . import lightningdit_reference as reference
from . import sit_reference
from .test_sit_golden import HEADS, SQUARE, published_weights

SHAPE = {**SQUARE, "out_channels": 4}
HIDDEN, INNER = 32, 85  # int(2 / 3 * 4 * 32)
PARTS = {
    "all": ("norm", "gate", "rotary"),
    "norm": ("norm",),
    "gate": ("gate",),
    "rotary": ("rotary",),
    "qk": ("norm", "qk"),
    "everything": ("norm", "gate", "rotary", "qk"),
}


def lightning_weights(parts: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Random weights in every layer under the published names."""
    weights, rng = published_weights(SHAPE), torch.Generator().manual_seed(3)

    def draw(*shape: int, around: float = 0.0) -> torch.Tensor:
        return around + 0.2 * torch.randn(*shape, generator=rng)

    for index in range(2):
        block = f"blocks.{index}"
        if "norm" in parts:
            weights |= {f"{block}.norm{n}.weight": draw(HIDDEN, around=1.0) for n in (1, 2)}
        if "qk" in parts:
            weights |= {f"{block}.attn.{n}_norm.weight": draw(HIDDEN // HEADS, around=1.0) for n in "qk"}
        if "gate" in parts:
            for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
                del weights[f"{block}.mlp.{name}"]
            weights |= {f"{block}.mlp.w12.weight": draw(2 * INNER, HIDDEN), f"{block}.mlp.w12.bias": draw(2 * INNER)}
            weights |= {f"{block}.mlp.w3.weight": draw(HIDDEN, INNER), f"{block}.mlp.w3.bias": draw(HIDDEN)}
    if "norm" in parts:
        weights["final_layer.norm_final.weight"] = draw(HIDDEN, around=1.0)
    if "rotary" in parts:
        angles = rotary_angles(4, 4, HIDDEN // HEADS)
        weights |= {"feat_rope.freqs_cos": angles.cos(), "feat_rope.freqs_sin": angles.sin()}
    return weights


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_converted_weights_give_minus_the_published_velocity(parts):
    published, t = lightning_weights(parts), np.array([0.0, 0.3, 0.985])
    x, _, y = sit_reference.random_inputs(channels=4, height=8, width=8)
    arrays = {name: tensor.numpy() for name, tensor in published.items()}
    expected = reference.lightningdit_forward(arrays, x, t, y, num_heads=HEADS)
    heads = {} if "rotary" in parts else {"num_attention_heads": HEADS}  # the rotary table tells
    model = from_published(published, layout="lightningdit", **heads)
    assert model.config.num_attention_heads == HEADS and model.config.mlp_ratio == 4.0
    with torch.no_grad():
        output = model(torch.from_numpy(x), torch.from_numpy(1000 * (1 - t)), torch.from_numpy(y)).sample
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(-output.numpy(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_written_back_are_the_same_bits(parts):
    published = lightning_weights(parts)
    back = to_published(from_published(published, layout="lightningdit", num_attention_heads=HEADS), "lightningdit")
    assert {*back, "feat_rope.freqs_cos", "feat_rope.freqs_sin"} >= published.keys() >= back.keys()
    for name in back.keys() - {"pos_embed"}:
        assert torch.equal(back[name], published[name]), name


def test_parts_of_another_layout_are_recognised_and_refused_by_name():
    """Loaded as a SiT they would give a network that answers wrongly."""
    published = lightning_weights(PARTS["all"])
    assert from_published(published).config.norm == "rms_norm"
    for layout in ("sit", "dit"):
        with pytest.raises(ValueError, match=r"lacks blocks\.0\.mlp\.fc1\.weight"):
            from_published(published, layout=layout, num_attention_heads=HEADS)
    rotary = lightning_weights(PARTS["rotary"])
    with pytest.raises(ValueError, match=r"holds feat_rope\.freqs_cos, feat_rope\.freqs_sin, which SiTConverter"):
        from_published(rotary, layout="sit", num_attention_heads=HEADS)
    model = from_published(published)
    with pytest.raises(ValueError, match="norm='rms_norm' cannot be written in this layout, which has 'layer_norm'"):
        to_published(model, "sit")
    without_shifts = dict(published)
    without_shifts["blocks.0.adaLN_modulation.1.weight"] = torch.ones(4 * HIDDEN, HIDDEN)
    with pytest.raises(ValueError, match=r"adaLN_modulation\.1\.weight has shape \(128, 32\)"):
        from_published(without_shifts)


def test_rotary_angles_are_the_transcriptions():
    angles = reference.rotary_angles(12, 3, 5)
    np.testing.assert_allclose(rotary_angles(3, 5, 12).numpy(), np.repeat(angles, 2, axis=1), atol=1e-6)
