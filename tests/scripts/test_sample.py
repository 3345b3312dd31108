"""pipelines/sample.py through its command line, and the functions it stands on."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from diffusers_eqvae.images import UINT8_RULE
from diffusers_eqvae.metrics.result_card import sampling_settings
from diffusers_eqvae.models.transformer_sit import SiTTransformer2DModel
from diffusers_eqvae.objectives.denoising import DenoisingObjective
from diffusers_eqvae.pipelines import sampling
from diffusers_eqvae.pipelines.pipeline_class_conditional import ClassConditionalPipeline
from diffusers_eqvae.provenance import autoencoder_identity, weights_hash
from diffusers_eqvae.schedulers.choices import OPTIONS, choose_scheduler
from diffusers_eqvae.schedulers.scheduling_flow_match_ode import FlowMatchODEScheduler
from diffusers_eqvae.schedulers.scheduling_maskgit import MaskGITScheduler
from diffusers_eqvae.training_utils.command_line import parse

NUM_SAMPLES = 10
FLAGS = {
    "num_samples": NUM_SAMPLES,
    "batch_size": 4,
    "num_inference_steps": 5,
    "guidance_scale": 2.0,
    "guidance_interval": (0, 0.75),
    "seed": 7,
    "scheduler": "sde",
}


@pytest.fixture
def model(tiny_sit, tiny_autoencoder_kl, tmp_path):
    id2label = {class_id: f"class {class_id}" for class_id in range(10)}
    pipeline = ClassConditionalPipeline(tiny_sit, tiny_autoencoder_kl, FlowMatchODEScheduler(), id2label=id2label)
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def script(repository):
    """The script as a module: most runs happen in this process, which spares the imports."""
    spec = importlib.util.spec_from_file_location("sample", repository / "pipelines" / "sample.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["sample"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["sample"]
    AcceleratorState._reset_state(reset_partial_state=True)


def words(model, output_dir, *switches, **changes):
    flags = {"model": model, "output_dir": output_dir, **FLAGS, **changes}
    values = {name: value if isinstance(value, (tuple, list)) else [value] for name, value in flags.items()}
    return [word for name, each in values.items() for word in (f"--{name}", *map(str, each))] + list(switches)


def start(repository, arguments, log, *, processes=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    with open(log, "w") as stderr:
        return subprocess.Popen(
            [sys.executable, *(launcher if processes > 1 else []), repository / "pipelines" / "sample.py", *arguments],
            env={**os.environ, "ACCELERATE_USE_CPU": str(torch.accelerator.is_available()), "OMP_NUM_THREADS": "1"},
            stderr=stderr,
        )


def read(output_dir):
    with np.load(output_dir / "samples.npz") as archive:
        return archive["arr_0"], archive["arr_1"]


def test_samples_their_labels_and_their_record(script, model, tmp_path):
    script.main(words(model, tmp_path / "set", "--save_png"))
    samples, labels = read(tmp_path / "set")
    assert samples.shape == (NUM_SAMPLES, 16, 16, 3) and samples.dtype == np.uint8 and labels.shape == (NUM_SAMPLES,)
    assert len(np.unique(samples.reshape(NUM_SAMPLES, -1), axis=0)) == NUM_SAMPLES
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [
        ".eqvae.json",
        "grid.png",
        "png",
        "samples.npz",
        "sampling.json",
    ]
    with Image.open(tmp_path / "set" / "grid.png") as grid, Image.open(tmp_path / "set" / "png" / "000009.png") as png:
        assert grid.size == (4 * 16, 3 * 16) and np.array_equal(np.asarray(png), samples[9])
    record = json.loads((tmp_path / "set" / "sampling.json").read_text())
    # SDE, 5 steps at noise levels 1, .76, .52, .28, .04; the first two lie outside [0, .75].
    assert record["nfe"] == 2 + 2 * 3 and record["seconds"] > 0
    assert record["settings"]["seed"] == 7 and record["settings"]["scheduler_config"]["last_step"] == "Mean"
    assert set(record["versions"]) == {"diffusers_eqvae", "diffusers", "torch", "python"}
    settings, rules, classes = sampling_settings(tmp_path / "set" / "samples.npz")
    assert settings["autoencoder"]["encoder"] and isinstance(settings["transformer"], str)
    assert classes.counts == tuple(np.bincount(labels, minlength=10))
    assert rules == {"label_policy": record["settings"]["label_policy"], "uint8_rule": UINT8_RULE}


def test_two_processes_make_the_same_set(repository, script, model, tmp_path):
    process = start(repository, words(model, tmp_path / "two"), tmp_path / "log", processes=2)
    script.main(words(model, tmp_path / "one"))
    assert process.wait(300) == 0, (tmp_path / "log").read_text()
    for mine, theirs in zip(read(tmp_path / "two"), read(tmp_path / "one"), strict=True):
        assert np.array_equal(mine, theirs)


def test_another_batch_size_moves_no_sample_by_more_than_a_level(script, model, tmp_path):
    script.main(words(model, tmp_path / "fours"))
    script.main(words(model, tmp_path / "threes", batch_size=3))
    (fours, labels), (threes, labels_of_threes) = read(tmp_path / "fours"), read(tmp_path / "threes")
    assert np.array_equal(labels, labels_of_threes)
    assert np.abs(threes.astype(int) - fours.astype(int)).max() <= 1


def test_a_killed_run_continues_and_refuses_other_settings(repository, script, model, tmp_path, monkeypatch):
    slow, killed = {"num_samples": 24, "num_inference_steps": 60}, tmp_path / "killed"
    victim = start(repository, words(model, killed, **slow), tmp_path / "log")
    while len(list((killed / "parts").glob("part-*.npz"))) < 2:
        assert victim.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.002)
    victim.kill()
    assert victim.wait() == -signal.SIGKILL and not (killed / "samples.npz").exists()
    first = (killed / "parts" / "part-00000000.npz").read_bytes()
    with pytest.raises(ValueError, match=r"seed \(7 -> 8\)"):
        script.main(words(model, killed, **{**slow, "seed": 8}))
    assert (killed / "parts" / "part-00000000.npz").read_bytes() == first
    sampled = []
    original = sampling.sample_block

    def watched(pipeline, block, *arguments, **options):
        sampled.append(block)
        return original(pipeline, block, *arguments, **options)

    monkeypatch.setattr(sampling, "sample_block", watched)
    script.main(words(model, killed, **slow))
    assert 0 < len(sampled) < 5 and range(0, 4) not in sampled
    script.main(words(model, tmp_path / "whole", **slow))
    for mine, theirs in zip(read(killed), read(tmp_path / "whole"), strict=True):
        assert np.array_equal(mine, theirs)


def test_names_balance_and_a_finished_set(script, model, tmp_path):
    flags = {"class_labels": ("class 3", "7"), "label_policy": "balanced", "scheduler": "heun"}
    script.main(words(model, tmp_path / "set", **flags))
    assert read(tmp_path / "set")[1].tolist() == [3, 7] * 5
    written = (tmp_path / "set" / "samples.npz").stat().st_mtime_ns
    script.main(words(model, tmp_path / "set", "--save_png", **flags))
    assert (tmp_path / "set" / "samples.npz").stat().st_mtime_ns == written
    assert len(list((tmp_path / "set" / "png").glob("*.png"))) == NUM_SAMPLES
    with pytest.raises(ValueError, match="guidance_scale"):
        script.main(words(model, tmp_path / "set", **{**flags, "guidance_scale": 3.0}))
    with pytest.raises(ValueError, match="Did you mean"):
        script.main(words(model, tmp_path / "set", **{**flags, "class_labels": "clas 3"}))


def test_weights_retrained_under_the_same_path_are_refused(script, model, tiny_sit, tmp_path):
    script.main(words(model, tmp_path / "set"))
    with torch.no_grad():
        tiny_sit.proj_out.bias.add_(0.1)
    tiny_sit.save_pretrained(model / "transformer")
    with pytest.raises(ValueError, match="weights"):
        script.main(words(model, tmp_path / "set"))


def test_nan_is_no_image_and_an_unwritable_folder_is_named(script, model, tiny_sit, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"vae does not hold a pipeline .model_index"):
        script.main(words(model / "vae", tmp_path / "samples"))
    with pytest.raises(ValueError, match="cannot be written"):
        script.main(words(model, tmp_path / "file" / "samples"))
    tiny_sit.proj_out.weight.data.fill_(3e38)
    tiny_sit.save_pretrained(model / "transformer")
    with pytest.raises(ValueError, match=r"Sampling gave NaN or infinity. Check the transformer's weights"):
        script.main(words(model, tmp_path / "out"))
    assert not (tmp_path / "out" / "samples.npz").exists()


def test_seeds_are_distinct_and_reproducible():
    seeds = {g.initial_seed() for seed in range(3) for g in sampling.sample_generators(seed, range(500))}
    assert len(seeds) == 1500
    first, again = (sampling.sample_generators(1, [5])[0] for _ in range(2))
    assert torch.equal(torch.randn(8, generator=first), torch.randn(8, generator=again))


def test_label_policies():
    ids = [3, 5, 9]
    balanced = sampling.sample_labels(ids, range(10), seed=0, policy="balanced")
    assert max(map(balanced.count, ids)) - min(map(balanced.count, ids)) <= 1
    drawn = sampling.sample_labels(ids, range(600), seed=0)
    assert all(150 < drawn.count(class_id) < 250 for class_id in ids)
    assert sampling.sample_labels(ids, range(40, 60), seed=0) == drawn[40:60] != drawn[60:80]
    assert sampling.sample_labels(ids, range(600), seed=1) != drawn
    with pytest.raises(ValueError, match="alphabetical"):
        sampling.sample_labels(ids, range(3), seed=0, policy="alphabetical")


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_share_all_blocks(tmp_path, world_size):
    blocks = sampling.plan_blocks(10, 3)
    assert blocks == [range(0, 3), range(3, 6), range(6, 9), range(9, 10)]
    shares = [
        sampling.pending_blocks(tmp_path, blocks, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    assert sorted((block for share in shares for block in share), key=lambda block: block.start) == blocks
    sampling.write_part(tmp_path, blocks[1], {"arr_0": np.zeros(1)})
    assert sampling.pending_blocks(tmp_path, blocks) == [blocks[0], *blocks[2:]]
    resumed = [len(sampling.pending_blocks(tmp_path, blocks, rank=rank, world_size=3)) for rank in range(3)]
    assert resumed == [1, 1, 1]


def test_merged_samples_open_as_a_memory_map(tmp_path):
    blocks = sampling.plan_blocks(7, 3)
    samples = np.random.default_rng(0).integers(0, 256, (7, 4, 6, 3), dtype=np.uint8)
    for block in blocks[1:]:
        part = {"arr_0": samples[list(block)], "arr_1": np.array(block), "seconds": 0.5, "nfe": 4.0}
        sampling.write_part(tmp_path, block, part)
    with pytest.raises(FileNotFoundError, match="1 of 3 parts"):
        sampling.merge_parts(tmp_path, blocks)
    sampling.write_part(tmp_path, blocks[0], {"arr_0": samples[:3], "arr_1": np.arange(3), "seconds": 0.5, "nfe": 4.0})
    assert sampling.merge_parts(tmp_path, blocks) == {"nfe": 4.0, "seconds": 1.5}
    merged, labels = read(tmp_path)
    assert np.array_equal(merged, samples) and labels.tolist() == list(range(7))
    mapped = sampling.open_samples(tmp_path / "samples.npz")
    assert isinstance(mapped, np.memmap) and np.array_equal(mapped, samples)
    np.savez_compressed(tmp_path / "small.npz", arr_0=samples)
    with pytest.raises(ValueError, match="compressed"):
        sampling.open_samples(tmp_path / "small.npz")


def test_half_precision_and_another_format_of_record(script, model, tmp_path):
    script.main(words(model, tmp_path / "set", dtype="bf16"))
    record = tmp_path / "set" / "sampling.json"
    content = json.loads(record.read_text())
    assert content["settings"]["dtype"] == "bfloat16" and content["format_version"] == sampling.FORMAT_VERSION
    older = "older than 3, .* choose another output directory"
    for version, message in ((2, older), (4, "newer than 3: update")):
        record.write_text(json.dumps({**content, "format_version": version}))
        with pytest.raises(ValueError, match=f"sampling.json has format_version {version}, {message}"):
            script.main(words(model, tmp_path / "set", dtype="bf16"))


def test_many_pngs_are_not_flushed_one_by_one(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    samples = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    sampling.write_pngs(samples, tmp_path)
    assert [np.array_equal(Image.open(tmp_path / f"{n:06d}.png"), samples[n]) for n in range(3)] == [True] * 3
    assert not flushed and len(list(tmp_path.iterdir())) == 3


PRESETS = ("dit_ddpm_250", "maskgit_8", "reals_1_8", "repa_1_8", "sit_ode", "sit_sde_250")


def test_dopri5_reports_the_model_calls_it_needed(script, model, tmp_path):
    """Twice the calls inside the interval; a tighter tolerance needs more; images are those of a fine grid of Heun."""

    def calls(name):
        return json.loads((tmp_path / name / "sampling.json").read_text())["nfe"]

    for name, flags in {
        "loose": {"rtol": 1e-2},
        "tight": {"rtol": 1e-5},
        "heun": {"num_inference_steps": 200},
    }.items():
        sampler = "heun" if name == "heun" else "dopri5"
        script.main(words(model, tmp_path / name, **{"scheduler": sampler, "num_samples": 4, **flags}))
    assert 14 < calls("loose") < calls("tight") < 400
    tight, heun = (read(tmp_path / name)[0].astype(int) for name in ("tight", "heun"))
    assert np.abs(tight - heun).max() <= 3


def test_presets_name_a_sampler_with_options_that_it_has(script, repository):
    presets = sorted((repository / "pipelines" / "configs").glob("*.yaml"))
    assert tuple(path.stem for path in presets) == PRESETS
    for preset in presets:
        (arguments,) = parse(script.SampleArguments, argv=[str(preset), "--model", "x", "--output_dir", "y"])
        family = preset.stem.partition("_")[0]
        of_family = {"dit": DenoisingObjective.chain_scheduler(learned_variance=True), "maskgit": MaskGITScheduler()}
        saved = of_family.get(family, FlowMatchODEScheduler())
        given = {name: getattr(arguments, name) for name in OPTIONS}
        options = {name: value for name, value in given.items() if value is not None}
        assert (choose_scheduler(arguments.scheduler, saved, **options) is saved) == (family == "maskgit")


def test_a_diffusion_model_is_sampled_by_its_own_samplers(script, tmp_path, tiny_autoencoder_kl):
    """Learned variance, guidance of three channels, and a sampler that drops the variance."""
    config = {"objective": "denoising", "prediction_type": "epsilon", "learn_sigma": True, "num_classes": 3}
    sizes = {"sample_size": 4, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    objective = DenoisingObjective(SiTTransformer2DModel(**config, **sizes))
    torch.nn.init.normal_(objective.model.proj_out.weight, std=0.1)
    ClassConditionalPipeline(objective.model, tiny_autoencoder_kl, objective.scheduler()).save_pretrained(
        tmp_path / "dit"
    )
    sets = {}
    for name in ("saved", "ddpm", "ddim"):
        flags = {"scheduler": name, "num_samples": 4, "guided_channels": 3}
        script.main(words(tmp_path / "dit", tmp_path / name, **flags))
        sets[name] = read(tmp_path / name)[0]
    assert np.array_equal(sets["saved"], sets["ddpm"]) and not np.array_equal(sets["ddpm"], sets["ddim"])
    for flags, message in (
        ({"scheduler": "heun"}, "does not sample a diffusion model"),
        ({"shift": 2}, "has no shift"),
    ):
        with pytest.raises(ValueError, match=message):
            script.main(words(tmp_path / "dit", tmp_path / "other", **{"scheduler": "saved", **flags}))


def test_what_is_left_of_another_set_gets_in_beside_no_new_image(script, model, tmp_path):
    script.main(words(model, tmp_path / "set", "--save_png"))
    old, _ = read(tmp_path / "set")
    (tmp_path / "set" / "samples.npz").unlink()
    script.main(words(model, tmp_path / "set", "--save_png", seed=8, num_samples=4))
    samples, _ = read(tmp_path / "set")
    shown = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "set" / "png").iterdir())]
    assert len(shown) == 4 and np.array_equal(np.stack(shown), samples) and not np.array_equal(samples, old[:4])


@pytest.mark.parametrize(("part", "option"), [("transformer", "norm_eps"), ("vae", "norm_num_groups")])
def test_other_options_of_the_same_weights_make_another_set_and_are_named(script, model, tmp_path, part, option):
    script.main(words(model, tmp_path / "set"))
    config = model / part / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), option: 2}))
    with pytest.raises(ValueError, match=rf"made with other settings: {part}\.\w+\.{option} \(\S+ -> 2\)\. Rep"):
        script.main(words(model, tmp_path / "set"))


def test_damaged_samples_are_neither_taken_as_finished_nor_measured(script, model, tmp_path):
    script.main(words(model, tmp_path / "set"))
    path = tmp_path / "set" / "samples.npz"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"samples.npz is not what .* was written .*remove it to sample again"):
        script.main(words(model, tmp_path / "set"))
    with pytest.raises(ValueError, match=r"samples.npz is not the set that .*sampling.json describes"):
        sampling_settings(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"guided_channels": 99}, "guided_channels"), ({"class_labels": 99}, "99"), ({"model": "nowhere"}, "nowhere")],
    ids=["option of the pipeline", "class", "model"],
)
def test_a_refused_command_leaves_nothing_that_refuses_the_right_one(script, model, tmp_path, changes, message):
    place = changes.pop("model", model)
    with pytest.raises((ValueError, OSError), match=message):
        script.main(words(place, tmp_path / "set", **changes))
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("place", ["model", "model/transformer", "foreign"])
def test_samples_go_to_no_directory_of_something_else(script, model, tmp_path, place):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="choose a"):
        script.main(words(model, tmp_path / place))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_part_that_was_cut_is_sampled_again(script, model, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "finish", lambda *_, **__: pytest.skip)
    with pytest.raises(FileNotFoundError):
        script.main(words(model, tmp_path / "set"))
    part = tmp_path / "set" / "parts" / "part-00000004.npz"
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    monkeypatch.undo()
    script.main(words(model, tmp_path / "set"))
    script.main(words(model, tmp_path / "again"))
    assert np.array_equal(read(tmp_path / "set")[0], read(tmp_path / "again")[0])


@pytest.mark.parametrize("stated", [True, False], ids=["identity stated", "own autoencoder"])
def test_a_swapped_decoder_is_the_one_that_decodes_and_is_said(
    script, model, tiny_sit, tiny_autoencoder_kl, tmp_path, stated
):
    if stated:
        tiny_sit.register_to_config(autoencoder=autoencoder_identity(tiny_autoencoder_kl))
        tiny_sit.save_pretrained(model / "transformer")
    script.main(words(model, tmp_path / "own", num_samples=4))
    with torch.no_grad():
        tiny_autoencoder_kl.decoder.conv_out.bias.add_(0.2)
    tiny_autoencoder_kl.save_pretrained(tmp_path / "other")
    script.main(words(model, tmp_path / "swapped", num_samples=4, vae=tmp_path / "other"))
    own, swapped = (read(tmp_path / name)[0].astype(int) for name in ("own", "swapped"))
    assert 20 < np.median(swapped - own) < 30  # .2 of a range of 2 is 25 levels
    records = [json.loads((tmp_path / name / "sampling.json").read_text()) for name in ("own", "swapped")]
    first, second = (each["settings"]["autoencoder"] for each in records)
    assert first["encoder"] == second["encoder"] and first["decoder"] != second["decoder"]
    assert second == autoencoder_identity(tiny_autoencoder_kl) and records[1]["besides"]["vae"] == str(
        tmp_path / "other"
    )
    assert (
        "vae" not in records[0] and sampling_settings(tmp_path / "swapped" / "samples.npz")[0]["autoencoder"] == second
    )
    with pytest.raises(ValueError, match=r"made with other settings: autoencoder"):
        script.main(words(model, tmp_path / "swapped", num_samples=4))

    with torch.no_grad():
        tiny_autoencoder_kl.encoder.conv_in.bias.add_(0.2)
    tiny_autoencoder_kl.register_to_config(scaling_factor=0.7)
    tiny_autoencoder_kl.save_pretrained(tmp_path / "foreign")
    with pytest.raises(
        ValueError,
        match=r"foreign: This autoencoder does not belong to the transformer: its encoder weights and latent norm.* "
        r"differ; use .*came with\. --vae takes a copy of it whose decoder alone was trained further; --preview",
    ):
        script.main(words(model, tmp_path / "refused", vae=tmp_path / "foreign"))
    with pytest.raises(ValueError, match="--vae and --preview_decoder both say what decodes; give one of them"):
        script.main(words(model, tmp_path / "refused", vae=model, preview_decoder=model))
    assert not (tmp_path / "refused").exists()


def test_a_weaker_model_guides_by_a_flag(script, model, tiny_sit, tiny_autoencoder_kl, tmp_path):
    """weak + w (strong - weak): with the model as its own guide no guidance at all, and twice the calls."""
    script.main(words(model, tmp_path / "plain", guidance_scale=1.0))
    script.main(words(model, tmp_path / "itself", guide=model))
    (plain, _), (itself, _) = (read(tmp_path / name) for name in ("plain", "itself"))
    assert np.abs(plain.astype(int) - itself.astype(int)).max() <= 1
    with torch.no_grad():
        tiny_sit.proj_out.weight.mul_(0.5)
    tiny_sit.register_to_config(class_dropout_prob=0.0)  # no null class is needed
    guide = ClassConditionalPipeline(tiny_sit, tiny_autoencoder_kl, FlowMatchODEScheduler())
    guide.save_pretrained(tmp_path / "weak")
    script.main(words(model, tmp_path / "weakly", guide=tmp_path / "weak"))
    assert not np.array_equal(read(tmp_path / "weakly")[0], plain)
    record = json.loads((tmp_path / "weakly" / "sampling.json").read_text())
    assert record["nfe"] == 2 + 2 * 3 and record["besides"]["guide"] == str(tmp_path / "weak")
    assert record["settings"]["guide"] == weights_hash(tiny_sit)
    assert sampling_settings(tmp_path / "weakly" / "samples.npz")[0]["guide"] == weights_hash(tiny_sit)
    with pytest.raises(ValueError, match=r"made with other settings: .*guide"):
        script.main(words(model, tmp_path / "weakly"))

    guide.scheduler = FlowMatchODEScheduler(path="cosine")
    guide.save_pretrained(tmp_path / "cosine")
    for other, message in (("cosine", "trained on the cosine path and the transformer on linear"), ("none", "none")):
        with pytest.raises((ValueError, OSError), match=message):
            script.main(words(model, tmp_path / "refused", guide=tmp_path / other))
    with pytest.raises(ValueError, match="--guide acts through --guidance_scale, which is 1"):
        script.main(words(model, tmp_path / "refused", guide=model, guidance_scale=1.0))
    assert not (tmp_path / "refused").exists()
