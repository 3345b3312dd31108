"""Laws of SiTTransformer2DModel: sizes, initialisation, conditioning, gradients, errors. Numbers: tests/golden."""

import copy

import pytest
import torch
from torch import nn

from diffusers_eqvae.models.transformer_sit import SiTTransformer2DModel

TINY = {"sample_size": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_classes": 10}


def make(fill: bool = True, **overrides) -> SiTTransformer2DModel:
    """A tiny model; `fill` gives the zero-initialised layers random values, so that every path reaches the output."""
    torch.manual_seed(0)
    model = SiTTransformer2DModel(**{**TINY, **overrides})
    if fill:
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.2)
    return model.eval()


def inputs(model: SiTTransformer2DModel, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, model.config.in_channels, model.sample_height, model.sample_width)
    latents = torch.randn(shape, generator=generator)
    return latents, torch.linspace(0, 1000, batch), torch.arange(batch) % 10


@pytest.mark.parametrize(("name", "millions"), [("S", 32.87), ("B", 130.32), ("L", 457.84), ("XL", 674.83)])
@pytest.mark.parametrize("family", ["SiT", "DiT"])
def test_presets_have_the_published_parameter_counts(name, millions, family):
    with torch.device("meta"):
        model = SiTTransformer2DModel.from_preset(f"{family}-{name}/2", learn_sigma=True)
    # The position table (0.29 M for XL) is a buffer and does not count.
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
    assert "pos_embed" not in model.state_dict()


def test_preset_overrides_and_unknown_names():
    with torch.device("meta"):
        model = SiTTransformer2DModel.from_preset("SiT-S/4", num_classes=10, in_channels=16, sample_size=(16, 32))
        assert SiTTransformer2DModel.from_preset("DiT-S/8").config.objective == "denoising"
        lightning = SiTTransformer2DModel.from_preset("LightningDiT-XL/1", in_channels=32, sample_size=16)
    assert (model.null_class, model.config.patch_size, model.pos_embed.shape[1]) == (10, 4, 32)
    assert sum(weight.numel() for weight in lightning.parameters()) / 1e6 == pytest.approx(675, abs=3)
    families = ("SiT", "DiT", "LightningDiT")
    names = {f"{family}-{size}/{patch}" for family in families for size in ("S", "B", "L", "XL") for patch in (1, 2)}
    assert names < set(SiTTransformer2DModel.PRESETS)
    with pytest.raises(ValueError, match="SiT-XL/2"):
        SiTTransformer2DModel.from_preset("SiT-M/2")


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
@pytest.mark.parametrize("channels", [4, 16, 32])
def test_output_shape(patch_size, channels):
    model = make(sample_size=(8, 16), patch_size=patch_size, in_channels=channels)
    assert model(*inputs(model)).sample.shape == (3, channels, 8, 16)


def test_learned_sigma_doubles_the_channels():
    model = make(learn_sigma=True)
    assert model(*inputs(model), return_dict=False)[0].shape == (3, 8, 4, 4)


def test_output_is_exactly_zero_at_the_start():
    model = make(fill=False)
    assert not model(*inputs(model)).sample.any()
    assert not model.modulation.weight.any()
    assert 0.015 < model.class_embedder.weight.std() < 0.025


def test_patches_land_where_they_came_from():
    """With closed gates tokens stay apart, so moving one patch of noise changes that patch of the output only."""
    model = make(sample_size=(4, 8))
    with torch.no_grad():
        model.modulation.weight.zero_()
        model.modulation.bias.zero_()
    latents, timestep, labels = inputs(model)
    moved = latents.clone()
    moved[:, :, 2:4, 4:6] += 1
    changed = (model(moved, timestep, labels).sample - model(latents, timestep, labels).sample).abs().amax((0, 1)) > 0
    expected = torch.zeros(4, 8, dtype=torch.bool)
    expected[2:4, 4:6] = True
    assert torch.equal(changed, expected)


def test_flow_embeds_one_minus_sigma_and_diffusion_the_step():
    flow, diffusion = make(), make(objective="denoising", prediction_type="epsilon")
    latents, _, labels = inputs(flow)
    torch.testing.assert_close(
        flow(latents, torch.full((3,), 250.0), labels).sample, diffusion(latents, 0.75, labels).sample
    )
    torch.testing.assert_close(flow(latents, 250, labels).sample, flow(latents, torch.tensor([250]), labels).sample)


def test_samples_do_not_see_each_other():
    model = make()
    latents, timestep, labels = inputs(model)
    together = model(latents, timestep, labels).sample
    alone = torch.cat([model(latents[i : i + 1], timestep[i], labels[i : i + 1]).sample for i in range(3)])
    torch.testing.assert_close(together, alone)


def test_condition_is_computed_once_per_forward():
    model = make(num_layers=5)
    calls = []
    for name in ("time_embedder", "class_embedder", "modulation"):
        getattr(model, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    model(*inputs(model))
    assert sorted(calls) == ["class_embedder", "modulation", "time_embedder"]


def test_dropped_labels_are_the_null_class():
    model = make()
    latents, timestep, labels = inputs(model)
    drop = torch.tensor([True, False, True])
    expected = model(latents, timestep, torch.where(drop, model.null_class, labels)).sample
    torch.testing.assert_close(model(latents, timestep, labels, drop_labels=drop).sample, expected)
    assert not torch.allclose(model(latents, timestep, labels).sample, expected)


def test_labels_are_dropped_per_sample_in_training_only():
    model = make(class_dropout_prob=0.1)
    seen = []
    model.class_embedder.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    batch = inputs(model, batch=2000)
    model(*batch)
    model.train()
    model(*batch)
    model(*batch, drop_labels=torch.zeros(2000, dtype=torch.bool))
    shares = [float((labels == model.null_class).float().mean()) for labels in seen]
    assert shares[0] == shares[2] == 0
    assert abs(shares[1] - 0.1) < 0.02


@pytest.mark.parametrize(("probability", "draws"), [(0.1, 3), (0.0, 0)])
def test_label_dropout_is_one_draw_per_forward_from_the_global_generator(probability, draws):
    model = make(class_dropout_prob=probability).train()
    batch = inputs(model)
    torch.manual_seed(3)
    torch.rand(draws)
    expected = torch.get_rng_state()
    torch.manual_seed(3)
    model(*batch)
    assert torch.equal(torch.get_rng_state(), expected)


def test_three_training_steps_move_every_parameter():
    model = make(fill=False, qk_norm=True).train()
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    latents, timestep, labels = inputs(model)
    # Zero output and zero gates open one after the other: output layer, then modulation, then the blocks.
    for _ in range(3):
        optimizer.zero_grad()
        (model(latents, timestep, labels).sample - 1).square().mean().backward()
        optimizer.step()
    still = [name for name, tensor in model.state_dict().items() if torch.equal(tensor, start[name])]
    assert still == []


def test_gradient_checkpointing_is_off_and_changes_no_gradient():
    model = make()
    assert not model.is_gradient_checkpointing

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(*inputs(model)).sample.square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    model.enable_gradient_checkpointing()
    calls = []
    handle = model.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for expected, actual in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(actual, expected)
    handle.remove()
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sample_size": 5}, "multiple of `patch_size`"),
        ({"sample_size": (4, 0)}, "multiple of `patch_size`"),
        ({"attention_head_dim": 7}, "divisible by 4"),
        ({"objective": ""}, "`objective` must name"),
        ({"class_dropout_prob": 1.0}, "class_dropout_prob"),
    ],
)
def test_impossible_configurations_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        SiTTransformer2DModel(**{**TINY, **overrides})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(3, 8, 4, 4)}, r"\(batch, 4, 4, 4\); got \(3, 8, 4, 4\)"),
        ({"hidden_states": torch.zeros(3, 4, 8, 4)}, "sample_size"),
        ({"hidden_states": torch.zeros(4, 4, 4)}, "batch"),
        ({"class_labels": torch.tensor([0, 1, 11])}, r"0 \.\. 10 .* got 0 \.\. 11"),
        ({"class_labels": torch.tensor([-1, 1, 2])}, "got -1"),
        ({"class_labels": torch.zeros(3)}, "integers"),
        ({"class_labels": torch.zeros(2, dtype=torch.long)}, "one per sample"),
        ({"drop_labels": torch.zeros(3, 1, dtype=torch.bool)}, "one per sample"),
        ({"timestep": torch.zeros(2)}, r"1000 \* sigma"),
        ({"timestep": torch.zeros(3, 1)}, "timestep"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    model = make()
    names = ("hidden_states", "timestep", "class_labels")
    with pytest.raises(ValueError, match=message):
        model(**{**dict(zip(names, inputs(model), strict=True)), **change})
