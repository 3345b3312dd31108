"""What holds for every regularizer of an autoencoder, whatever it does; a new file is tested here without a line."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from transformers import Dinov2Config, Dinov2Model

from diffusers_eqvae.objectives.autoencoder import AutoencoderLossWeights, AutoencoderObjective, AutoencoderStep
from diffusers_eqvae.randomness import StepRandomness
from diffusers_eqvae.regularizers.base import (
    REGULARIZERS,
    AutoencoderRegularizer,
    build_regularizers,
    require_compatible,
    require_reach,
)
from diffusers_eqvae.training_utils.autoencoder.trainable import freeze_all_but

from ..invariants.trajectories import (
    ROOT,
    as_flags,
    assert_close,
    assert_equal,
    last_checkpoint,
    run_script,
    torchrun,
)

MEMBERS = [name for name in REGULARIZERS if issubclass(REGULARIZERS[name], AutoencoderRegularizer)]
# What an option that no default serves in a test is called by all: its name ends so.
SMALL = {"image_size": 28, "hidden_size": 8}
TEACHER = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 7, "image_size": 28}
SCRIPT = ROOT / "training" / "train_autoencoder.py"


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """A tiny teacher, a tiny autoencoder and images to train it on."""
    from PIL import Image

    root = tmp_path_factory.mktemp("members")
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**TEACHER)).save_pretrained(root / "teacher")
    make_vae(seed=5).save_pretrained(root / "autoencoder")
    (root / "images").mkdir()
    for number in range(8):
        size = (60, 40) if number % 2 else (40, 60)
        Image.effect_noise(size, 60).rotate(20 * number).convert("RGB").save(root / "images" / f"{number}.png")
    return root


def make_vae(seed: int = 0) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )


def options_of(name: str, material: Path) -> dict:
    """Of the regularizer's options those that its defaults do not serve: what it reads, and sizes."""
    found = {}
    for entry in fields(REGULARIZERS[name].Arguments or type(None)) if REGULARIZERS[name].Arguments else ():
        if entry.metadata.get("reads"):
            found[entry.name] = str(material / entry.name.rpartition("_")[2])
        for end, value in SMALL.items():
            if entry.name.endswith(end):
                found[entry.name] = value
    return found


def build(name: str, material: Path, vae) -> AutoencoderRegularizer:
    kind = REGULARIZERS[name].Arguments
    arguments = {} if kind is None else {name: kind(**options_of(name, material))}
    torch.manual_seed(1)
    return build_regularizers([name], arguments, vae, pixels=True)[name]


@pytest.fixture
def objective(request, material) -> AutoencoderObjective:
    vae = make_vae().train()
    regularizer = build(request.param, material, vae)
    for component in regularizer.parameters():  # what starts at 0 would hide what a gradient reaches
        torch.nn.init.normal_(component, std=0.3)
    return AutoencoderObjective(vae, {request.param: regularizer}, reduction="mean")


def every_member(test):
    return pytest.mark.parametrize("objective", MEMBERS, indirect=True, ids=MEMBERS)(test)


# What learns, by a word; of a block and of an adapter some of either half.
MODES = {
    "full": ["full"],
    "decoder": ["decoder"],
    "encoder": ["encoder"],
    "lora": ["lora"],
    "block": ["decoder.up_blocks.1", "encoder.conv_in"],
}


# How a run is told so; one more is of squares no more.
RUNS = {mode: {"trainable": names} for mode, names in MODES.items()}
RUNS["rectangles"] = {"aspect_buckets": 2}


def names_in(mode: str, names: list[str] = MEMBERS) -> list[str]:
    """Those that reach something of what learns."""
    halves = {mode} & {"encoder", "decoder"} or {"encoder", "decoder"}
    return [name for name in names if REGULARIZERS[name].reaches & halves]


def name_and_regularizer(objective) -> tuple[str, AutoencoderRegularizer]:
    ((name, regularizer),) = objective.regularizers.items()
    return name, regularizer


def batch_of(count: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1}


def active_draw(objective, batch, *, rank: int = 0, world: int = 1) -> dict:
    """The draw of the first step in which the regularizer does something."""
    name, regularizer = name_and_regularizer(objective)
    for step in range(50):
        draw = objective.draw(batch, StepRandomness(0, rank, world).at(step, 0))
        output = objective(batch, draw)
        if (
            name in output["terms"]
            or len(output["decodings"]) > 1
            or acts(regularizer, draw["regularizers"][name], len(batch["pixel_values"]))
        ):
            return draw
    raise AssertionError(f"{name} does nothing in 50 steps")


def acts(regularizer, draw, count: int) -> bool:
    raw_latents, pixels = torch.randn(count, 4, 8, 8), torch.rand(count, 3, 32, 32)
    return regularizer.transform(raw_latents, pixels, draw)[0] is not raw_latents


@every_member
def test_its_gradient_moves_what_it_says_and_nothing_else(objective):
    name, regularizer = name_and_regularizer(objective)
    batch = batch_of(4)
    draw = active_draw(objective, batch)
    output = objective(batch, draw)
    transforms = acts(regularizer, draw["regularizers"][name], len(batch["pixel_values"]))
    pairs = output["decodings"] if transforms else output["decodings"][1:]
    loss = output["terms"].get(name, 0.0) + sum((image - target).square().mean() for image, target, _ in pairs)
    loss.backward()
    parts = {"encoder": objective.model.encoder, "decoder": objective.model.decoder, "component": regularizer}
    moved = {
        part
        for part, module in parts.items()
        if any(weight.grad is not None and weight.grad.any() for weight in module.parameters())
    }
    assert moved == regularizer.reaches
    assert all(weight.grad is None for module in regularizer.frozen_modules() for weight in module.parameters())


@every_member
def test_a_frozen_half_is_refused_where_it_is_all_that_is_reached(objective):
    name, regularizer = name_and_regularizer(objective)
    halves = regularizer.reaches & {"encoder", "decoder"}
    model = objective.model.requires_grad_(False)
    for half in halves:  # its convolution on the latents' side alone is enough
        {"encoder": model.quant_conv, "decoder": model.post_quant_conv}[half].requires_grad_(True)
        require_reach(name, regularizer, model)
        model.requires_grad_(False)
    said = f"{name} moves nothing of the autoencoder but its {' and '.join(sorted(halves))}, and no weight of that"
    with pytest.raises(ValueError, match=said):
        require_reach(name, regularizer, model)


@every_member
def test_two_ranks_are_one_with_twice_the_batch(objective):
    """Terms are means over samples, and what is drawn for a sample is drawn for its place in the global batch."""
    _, regularizer = name_and_regularizer(objective)
    if regularizer.couples_samples:
        pytest.skip("gathers over ranks: test_all_of_them_on_two_ranks")
    pixels = batch_of(4)["pixel_values"]
    for step in range(6):
        whole = outputs(objective, pixels, step)
        halves = [outputs(objective, half, step, rank, 2) for rank, half in enumerate(pixels.split(2))]
        assert whole["terms"].keys() == halves[0]["terms"].keys()
        for term, value in whole["terms"].items():
            torch.testing.assert_close((halves[0]["terms"][term] + halves[1]["terms"][term]) / 2, value)
        for index, (image, target, weight) in enumerate(whole["decodings"]):
            pairs = [half["decodings"][index] for half in halves]
            torch.testing.assert_close(torch.cat([pair[0] for pair in pairs]), image, rtol=1e-4, atol=1e-5)
            assert torch.equal(torch.cat([pair[1] for pair in pairs]), target)
            assert {pair[2] for pair in pairs} == {weight}


@torch.no_grad()
def outputs(objective, pixels, step: int, rank: int = 0, world: int = 1) -> dict:
    batch = {"pixel_values": pixels}
    return objective(batch, objective.draw(batch, StepRandomness(0, rank, world).at(step, 0)))


def gradient(objective, pixels, draw) -> torch.Tensor:
    """Of everything that learns, by all that the step adds up: penalties and what is decoded."""
    objective.zero_grad()
    output = objective({"pixel_values": pixels}, draw)
    judged = sum(weight * (image - target).square().mean() for image, target, weight in output["decodings"])
    (sum(output["terms"].values()) + judged + output["idle"]).backward()
    return torch.cat([weight.grad.flatten() for weight in objective.parameters() if weight.requires_grad])


@pytest.mark.parametrize("mode", MODES)
@every_member
def test_in_every_mode_two_ranks_have_the_gradient_of_twice_the_batch(objective, mode):
    name, regularizer = name_and_regularizer(objective)
    freeze_all_but(objective.model, MODES[mode])
    for key, weight in objective.model.named_parameters():  # an adapter begins at 0, where nothing reaches its half
        if "lora_B" in key:
            torch.nn.init.normal_(weight, std=0.1)
    if name not in names_in(mode):
        with pytest.raises(ValueError, match=f"The regularizer {name} moves nothing of the autoencoder but its"):
            require_reach(name, regularizer, objective.model)
        return
    if regularizer.couples_samples:
        pytest.skip("gathers over ranks: test_all_of_them_on_two_ranks")
    pixels = batch_of(4)["pixel_values"]
    whole = gradient(objective, pixels, active_draw(objective, {"pixel_values": pixels}))
    halves = [
        gradient(objective, half, active_draw(objective, {"pixel_values": half}, rank=rank, world=2))
        for rank, half in enumerate(pixels.split(2))
    ]
    assert whole.norm() > 0 and ((halves[0] + halves[1]) / 2 - whole).norm() < 1e-4 * whole.norm()


@every_member
def test_a_step_is_a_function_of_its_number(objective):
    """What a regularizer keeps between steps, and what would be lost by a resumption, does not change the next one."""
    pixels = batch_of(2)["pixel_values"]
    resumed = copy.deepcopy(objective)
    for step in range(3):
        outputs(objective, pixels, step)
    resumed.load_state_dict(objective.state_dict())
    first, second = outputs(objective, pixels, 3), outputs(resumed, pixels, 3)
    assert_equal(first["terms"], second["terms"])
    for one, other in zip(first["decodings"], second["decodings"], strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@every_member
def test_it_takes_rectangles_turned_latents_and_smaller_ones(objective):
    """Another method's transform may have turned the latents, and its augment may have made the images smaller."""
    name, regularizer = name_and_regularizer(objective)
    wide = {"pixel_values": torch.rand(2, 3, 32, 48) * 2 - 1}
    draw = active_draw(objective, wide)
    raw_latents, pixels = torch.randn(2, 4, 12, 8), torch.rand(2, 3, 48, 32)
    regularizer.transform(raw_latents, pixels, draw["regularizers"][name])
    small = {"pixel_values": wide["pixel_values"][..., :8, :12]}
    output = objective(small, {**draw, "noise": draw["noise"][..., :2, :3]})
    assert all(torch.isfinite(value) for value in output["terms"].values())


@every_member
def test_its_networks_are_saved_and_go_on(objective, material, tmp_path):
    name, regularizer = name_and_regularizer(objective)
    if not regularizer.components():
        assert "component" not in regularizer.reaches
        return
    objective.model.save_pretrained(tmp_path / "run")
    for folder, component in regularizer.components().items():
        component.save_pretrained(tmp_path / "run" / folder)
    again = build(name, material, AutoencoderKL.from_pretrained(tmp_path / "run"))
    for folder, component in again.components().items():
        saved = regularizer.components()[folder].state_dict()
        assert all(torch.equal(value, saved[key]) for key, value in component.state_dict().items())
    shutil.copytree(tmp_path / "run", tmp_path / "pipeline" / "vae")
    inside = AutoencoderKL.from_pretrained(tmp_path / "pipeline", subfolder="vae")
    inside.location = {"subfolder": "vae"}
    again = build(name, material, inside)
    assert all(map(torch.equal, again.state_dict().values(), regularizer.state_dict().values()))


@pytest.mark.parametrize("name", MEMBERS)
def test_the_papers_page_has_its_equation(name):
    cls = REGULARIZERS[name]
    page = (ROOT / "PAPERS.md").read_text()
    assert f"`regularizers.{name}.{cls.__name__}`" in page
    assert cls.paper is None or cls.paper[1] in page


def test_pairs_that_exclude_each_other_are_refused_with_the_reason():
    chosen = {name: REGULARIZERS[name] for name in ("latent_anchor", "channel_prefix")}
    said = r"channel_prefix cannot run beside latent_anchor: that keeps every channel as it was.*leave one of them out"
    with pytest.raises(ValueError, match=said):
        require_compatible(chosen, chosen)
    with pytest.raises(ValueError, match="channel_prefix cannot run beside latent_anchor"):
        build_regularizers(list(chosen), {}, make_vae())
    for name in MEMBERS:
        assert set(REGULARIZERS[name].excludes) <= {*MEMBERS, *AutoencoderObjective.own_terms} - {name}
    with pytest.raises(ValueError, match=r"no regularizer 'equivarianz'; there are alignment, .*variance_expansion"):
        build_regularizers(["equivarianz"], {}, make_vae())


def test_what_replaces_a_term_is_refused_beside_it(material):
    vae = make_vae()
    objective = AutoencoderObjective(vae, {"variance_expansion": build("variance_expansion", material, vae)})
    weights = {"perceptual": 0, "discriminator": 0}
    with pytest.raises(ValueError, match="cannot run beside kl: it takes the place of the KL divergence"):
        AutoencoderStep(objective, objective, weights=AutoencoderLossWeights(**weights))
    AutoencoderStep(objective, objective, weights=AutoencoderLossWeights(kl=0, **weights))


EXCLUDED = [name for name in MEMBERS if any(name in REGULARIZERS[other].excludes for other in MEMBERS)]
TOGETHER = [name for name in MEMBERS if name not in EXCLUDED]


def flags(material, output_dir, names=TOGETHER, **options) -> list[str]:
    own = {}
    for name in names:
        own |= options_of(name, material)
    defaults = {
        "pretrained_model_name_or_path": material / "autoencoder",
        "train_data_dir": material / "images",
        "output_dir": output_dir,
        "regularizers": names,
        "resolution": 32,
        "reduction": "mean",
        "perceptual_weight": 0,
        "disc_weight": 0,
        "kl_weight": 0,
        "train_batch_size": 2,
        "learning_rate": 1e-3,
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "ema_decay": 0.9,
        "report_to": "none",
        "logging_steps": 1,
        "validation_steps": 0,
        "num_validation_images": 2,
        "num_normalization_images": 4,
        "cache_dir": material / "cache",
    }
    return as_flags({**defaults, **own, **options})


@pytest.mark.parametrize(
    ("names", "mode"),
    [
        (TOGETHER, "full"),
        (EXCLUDED, "full"),
        *(pytest.param(TOGETHER, mode, marks=pytest.mark.slow) for mode in RUNS if mode != "full"),
        pytest.param(EXCLUDED, "rectangles", marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else "together" if value == TOGETHER else "excluded",
)
def test_all_of_them_train_one_autoencoder_and_resume_exactly(material, tmp_path, names, mode):
    whole, resumed, names = tmp_path / "whole", tmp_path / "resumed", names_in(mode, names)
    run_script(SCRIPT, flags(material, whole, names, **RUNS[mode]))
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    for name in names:
        if REGULARIZERS[name].penalty is not AutoencoderRegularizer.penalty:
            assert any(f"loss/{name}" in record for record in records), name
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-00000004")
    words = {**RUNS[mode], "resume_from_checkpoint": "latest"}
    run_script(SCRIPT, flags(material, resumed, names, **words))
    assert_equal(last_checkpoint(whole, "objective"), last_checkpoint(resumed, "objective"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", RUNS)
def test_all_of_them_on_two_ranks(material, tmp_path, mode):
    names = names_in(mode, TOGETHER)
    run_script(SCRIPT, flags(material, tmp_path / "one", names, **RUNS[mode], train_batch_size=4))
    finished = torchrun(SCRIPT, flags(material, tmp_path / "two", names, **RUNS[mode]), processes=2)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert_close(last_checkpoint(tmp_path / "one", "objective"), last_checkpoint(tmp_path / "two", "objective"))
    one, two = (
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("one", "two")
    )
    for name in (name for name in names if REGULARIZERS[name].couples_samples):
        first, second = (next(r[f"loss/{name}"] for r in records if f"loss/{name}" in r) for records in (one, two))
        assert first == pytest.approx(second, rel=1e-4), name


def test_a_point_posterior_has_no_variance_to_expand(material):
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    with pytest.raises(ValueError, match="that of AutoencoderTiny is a point; leave the regularizer out"):
        build("variance_expansion", material, vae)
