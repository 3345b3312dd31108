"""Every layout there is: the same function as an oracle's, both ways, in two precisions, and the same bits back.

Random weights in every layer. What is fixed and float32 in every published file (positions, the code of the time) is
given to both sides, so that float64 shows what the conversion does and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import Timesteps
from torch import Tensor

from diffusers_eqvae.conversion import CONVERTERS, from_published, to_published
from diffusers_eqvae.models.backbone import Backbone
from tests.golden import lightningdit_reference, sit_reference, vqgan_reference
from tests.golden.test_lightningdit_golden import PARTS, lightning_weights
from tests.golden.test_sit_golden import HEADS, SQUARE, published_weights

from .test_vqgan import PORT, SIZES, port_forward, port_weights

Weights = dict[str, Tensor]
STEPS = torch.tensor([0.0, 37.0, 250.0])
FIXED = ("pos_embed", "pos_embed.pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")
DIFFUSERS = {"num_attention_heads": HEADS, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8}
DIFFUSERS |= {"num_layers": 2, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10, "norm_eps": 1e-6}


@dataclass
class Case:
    """Weights of a layout, options that they do not tell, and both functions, (ours, theirs)."""

    weights: Callable[[], Weights]
    both: Callable[[Any, Weights], tuple[Tensor, Tensor]]
    options: dict[str, Any] = field(default_factory=lambda: {"num_attention_heads": HEADS})
    rounded: tuple[str, ...] = ()  # tensors that come back within a rounding
    double: float = 1e-12  # tolerance in float64


def transformer(
    time_of: Callable[[Tensor], Tensor], *, sign: float, forward: Callable[..., np.ndarray] | None = None
) -> Callable[[Any, Weights], tuple[Tensor, Tensor]]:
    """Our network at `STEPS`, and the transcription at the times that the published one embeds there."""

    def both(model: Any, weights: Weights) -> tuple[Tensor, Tensor]:
        x, _, y = sit_reference.random_inputs()
        dtype = model.dtype
        model.pos_embed = weights["pos_embed"].to(dtype)
        ours = model(torch.from_numpy(x).to(dtype), STEPS, torch.from_numpy(y)).sample
        arrays = {name: tensor.double().numpy() for name, tensor in weights.items()}
        options = {"num_heads": HEADS} if forward else {"num_heads": HEADS, "patch_size": 2}
        theirs = (forward or sit_reference.sit_forward)(arrays, x, time_of(STEPS).numpy(), y, **options)
        return sign * ours, torch.from_numpy(theirs)

    return both


@pytest.fixture(autouse=True)
def fixed_tables(monkeypatch):
    """The transcriptions' codes of time and positions, rounded as the networks round them."""
    positions, angles = sit_reference.positions_2d, lightningdit_reference.rotary_angles

    def embed_time(params, t):
        code = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)(torch.from_numpy(t)).double().numpy()
        first = sit_reference.silu(sit_reference.linear(params, "t_embedder.mlp.0", code))
        return sit_reference.linear(params, "t_embedder.mlp.2", first)

    for module in (sit_reference, lightningdit_reference):
        for name, value in {
            "embed_time": embed_time,
            "positions_2d": lambda *size: positions(*size).astype(np.float32).astype(np.float64),
        }.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    return angles


def lightning(model: Any, weights: Weights) -> tuple[Tensor, Tensor]:
    height, width = model.token_grid
    angles = torch.from_numpy(lightningdit_reference.rotary_angles(8, height, width)).repeat_interleave(2, dim=1)
    model.rotary_turns = torch.stack([angles.cos(), angles.sin()]).to(model.dtype)
    forward = lightningdit_reference.lightningdit_forward
    return transformer(lambda steps: 1 - steps / 1000, sign=-1, forward=forward)(model, weights)


def tokens(model: Any, weights: Weights) -> tuple[Tensor, Tensor]:
    drawn = torch.randint(PORT["codebook"] + 1, (3, 3, 3), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 4, 5])
    return model(drawn, None, labels).sample.flatten(2).transpose(1, 2), port_forward(weights, drawn, labels)


def images(model: Any, weights: Weights) -> tuple[Tensor, Tensor]:
    """Both halves in one row."""
    pixels = (torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(model.dtype)
    latents = vqgan_reference.encode(pixels, weights, **SIZES)
    drawn = torch.arange(24).view(1, 4, 6) % 20
    ours = [model.encode(pixels).latents, model.decode_tokens(drawn)]
    theirs = [latents, vqgan_reference.decode(drawn, weights, **SIZES)]
    return torch.cat([each.flatten() for each in ours]), torch.cat([each.flatten() for each in theirs])


def diffusers_weights() -> Weights:
    """Of diffusers' own class, with one embedder for all blocks."""
    model = DiTTransformer2DModel(**DIFFUSERS)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(tensor.shape, generator=generator) / max(1, tensor[0].numel()) ** 0.5
        for name, tensor in model.state_dict().items()
    }
    for name in weights:
        head, _, rest = name.partition(".norm1.emb.")
        weights[name] = weights[f"transformer_blocks.0.norm1.emb.{rest}" if rest else head]
    return weights | {"pos_embed.pos_embed": model.pos_embed.pos_embed.clone()}


def diffusers_dit(model: Any, weights: Weights) -> tuple[Tensor, Tensor]:
    """diffusers' class, given the epsilon and the frequencies that DiT was trained with."""
    theirs = DiTTransformer2DModel(**DIFFUSERS).to(model.dtype).eval()
    theirs.load_state_dict({name: tensor for name, tensor in weights.items() if name != "pos_embed.pos_embed"})
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    model.pos_embed = theirs.pos_embed.pos_embed = weights["pos_embed.pos_embed"].to(model.dtype)
    x, _, y = (torch.from_numpy(array) for array in sit_reference.random_inputs())
    given = x.to(model.dtype), STEPS, y
    return model(*given).sample, theirs(*given).sample


def plain_weights() -> Weights:
    return published_weights(SQUARE)


def lightning_everything() -> Weights:
    return lightning_weights(PARTS["everything"])


def projected_weights() -> Weights:
    return plain_weights() | {"projectors.0.0.weight": torch.ones(2, 2)}


CASES = {
    "diffusers_dit": Case(diffusers_weights, diffusers_dit),
    "dit": Case(plain_weights, transformer(lambda steps: steps, sign=1)),
    "lightningdit": Case(lightning_everything, lightning),
    "maskgit": Case(port_weights, tokens, {"num_attention_heads": PORT["heads"], "num_classes": PORT["classes"]}),
    # Its first time layer is reflected by codes of the time, which are float32.
    "repa": Case(
        plain_weights,
        transformer(lambda steps: steps / 1000, sign=1),
        rounded=("t_embedder.mlp.0.weight",),
        double=1e-6,
    ),
    "sit": Case(plain_weights, transformer(lambda steps: 1 - steps / 1000, sign=-1)),
    "vqgan": Case(vqgan_reference.published_weights, images, {}),
}


def test_every_layout_of_a_generator_has_a_case():
    generators = {name for name in CONVERTERS if issubclass(CONVERTERS[name].target, Backbone)}
    assert len(generators) >= 6 and generators <= set(CASES)


@torch.no_grad()
@pytest.mark.parametrize("layout", CASES)
def test_the_same_function_both_ways_and_the_same_bits(layout):
    case = CASES[layout]
    weights = case.weights()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, case.double)):
        model = from_published(weights, layout=layout, **case.options).to(dtype)
        _require_equal(*case.both(model, {name: tensor.to(dtype) for name, tensor in weights.items()}), tolerance)

        for parameter in model.parameters():  # another model, which began as one of ours
            parameter.add_(0.05 * torch.randn_like(parameter))
        back = to_published(model, layout)
        _require_equal(*case.both(model, {**weights, **back}), tolerance)
    published = to_published(from_published(weights, layout=layout, **case.options), layout)
    assert published.keys() <= weights.keys() and weights.keys() - published.keys() <= set(FIXED)
    for name in published.keys() - set(FIXED):
        if name in case.rounded:
            torch.testing.assert_close(published[name], weights[name], atol=1e-7, rtol=1e-6)
        else:
            assert torch.equal(published[name], weights[name]), name


def _require_equal(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    theirs = theirs.to(torch.float64)
    assert theirs.abs().max() > 0.1
    assert ((ours.double() - theirs).norm() / theirs.norm()).item() <= tolerance


def as_diffusers(weights: Weights) -> Weights:
    """DiT's weights under diffusers' names, as its own conversion wrote them: an embedder in every block."""
    names = {"x_embedder.proj": "pos_embed.proj", "final_layer.adaLN_modulation.1": "proj_out_1"}
    names |= {"final_layer.linear": "proj_out_2"}
    renamed = {"pos_embed.pos_embed": weights["pos_embed"]}
    for kind in ("weight", "bias"):
        renamed |= {f"{theirs}.{kind}": weights[f"{ours}.{kind}"] for ours, theirs in names.items()}
        for n in range(2):
            block, emb = f"transformer_blocks.{n}", f"transformer_blocks.{n}.norm1.emb"
            renamed[f"{emb}.timestep_embedder.linear_1.{kind}"] = weights[f"t_embedder.mlp.0.{kind}"]
            renamed[f"{emb}.timestep_embedder.linear_2.{kind}"] = weights[f"t_embedder.mlp.2.{kind}"]
            renamed[f"{emb}.class_embedder.embedding_table.weight"] = weights["y_embedder.embedding_table.weight"]
            renamed[f"{block}.norm1.linear.{kind}"] = weights[f"blocks.{n}.adaLN_modulation.1.{kind}"]
            for part, rows in zip("qkv", weights[f"blocks.{n}.attn.qkv.{kind}"].chunk(3), strict=True):
                renamed[f"{block}.attn1.to_{part}.{kind}"] = rows
            renamed[f"{block}.attn1.to_out.0.{kind}"] = weights[f"blocks.{n}.attn.proj.{kind}"]
            renamed[f"{block}.ff.net.0.proj.{kind}"] = weights[f"blocks.{n}.mlp.fc1.{kind}"]
            renamed[f"{block}.ff.net.2.{kind}"] = weights[f"blocks.{n}.mlp.fc2.{kind}"]
    return renamed


def test_diffusers_dit_is_the_dit_of_the_transcription():
    """Bit for bit the model that DiT's own file gives, which `tests/golden` compares with the paper's equations."""
    weights = plain_weights()
    ours = from_published(as_diffusers(weights), num_attention_heads=HEADS)  # the layout is recognised
    dit = from_published(weights, layout="dit", num_attention_heads=HEADS)
    assert {**ours.config} == {**dit.config} and ours.config.objective == "denoising"
    assert all(torch.equal(tensor, dit.state_dict()[name]) for name, tensor in ours.state_dict().items())


def test_embedders_that_differ_between_blocks_are_refused():
    """Weights that diffusers' class was trained with have one embedder per block."""
    weights = as_diffusers(plain_weights())
    for layer in ("timestep_embedder.linear_2.bias", "class_embedder.embedding_table.weight"):
        name = f"transformer_blocks.1.norm1.emb.{layer}"
        with pytest.raises(
            ValueError, match=f"{name} differs from that of block 0, .*keep them with DiTTransformer2DM"
        ):
            from_published({**weights, name: weights[name] + 1e-6}, num_attention_heads=HEADS)
    with pytest.raises(ValueError, match=r"lacks transformer_blocks\.1\.attn1\.to_k\.bias"):
        from_published(
            {k: v for k, v in weights.items() if not k.endswith("1.attn1.to_k.bias")}, num_attention_heads=4
        )
    with pytest.raises(ValueError, match=r"holds transformer_blocks\.0\.norm3\.weight, which DiffusersDiTConverter"):
        from_published({**weights, "transformer_blocks.0.norm3.weight": torch.ones(1)}, num_attention_heads=HEADS)
    del weights["pos_embed.pos_embed"]
    with pytest.raises(ValueError, match="Give sample_size"):
        from_published(weights, num_attention_heads=HEADS)
