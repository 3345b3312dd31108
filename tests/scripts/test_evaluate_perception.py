"""training/evaluate_perception.py: the same metrics as the library, for classes, depths, networks and heads."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_eqvae import AlignmentNetwork, ClassConditionalPipeline, FlowMatchODEScheduler
from diffusers_eqvae.autoencoders import encode
from diffusers_eqvae.images import to_uint8
from diffusers_eqvae.metrics.image_sets import hash_digests, image_digests
from diffusers_eqvae.metrics.perception import SegmentationConfusion, depth_errors
from diffusers_eqvae.metrics.result_card import PROTOCOLS, ResultCard, compare_cards
from diffusers_eqvae.perception import (
    LinearDepthHead,
    LinearSegmentationHead,
    NearestTransfer,
    label_targets,
    latent_features,
    position_labels,
    to_size,
)
from diffusers_eqvae.perception.annotated_images import read_annotations, read_pixels
from diffusers_eqvae.provenance import autoencoder_identity, weights_hash
from diffusers_eqvae.training_utils.command_line import parse
from diffusers_eqvae.training_utils.perception.arguments import PerceptionArguments

COUNT, SIDE, VOID = 7, 32, 9
POSITIVE = ("batch_size", "num_shown", "num_classes", "window", "num_tested", "resolution", "neighbours", "max_depth")
METHODS = {"nearest_positions", "mean_at_each_position", "mean_of_all_positions"}


@pytest.fixture
def folders(tmp_path, tiny_autoencoder_kl) -> Path:
    """Images of two flat halves, which are the classes 0 and 1 at 1.5 m and 3 m, with a void corner."""
    for name in ("images", "masks", "depths"):
        (tmp_path / name).mkdir()
    for index in range(COUNT):
        generator = np.random.default_rng(index)
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[:, 4 * generator.integers(1, 7) :] = 1
        levels = np.where(mask[..., None] == 1, [220, 30, 30], [20, 60, 230]) + generator.integers(
            0, 20, (SIDE, SIDE, 3)
        )
        depth = np.where(mask == 1, 3000, 1500).astype(np.uint16)
        mask[:4, :4], depth[:4, :4] = VOID, 0
        Image.fromarray(levels.astype(np.uint8)).save(tmp_path / "images" / f"{index}.png")
        Image.fromarray(mask).save(tmp_path / "masks" / f"{index}.png")
        Image.fromarray(depth).save(tmp_path / "depths" / f"{index}.png")
    tiny_autoencoder_kl.save_pretrained(tmp_path / "vae")
    return tmp_path


@pytest.fixture
def network(folders) -> Path:
    torch.manual_seed(0)
    AlignmentNetwork(latent_channels=4, hidden_size=8, feature_size=6).save_pretrained(folders / "network")
    return folders / "network"


def flags(folders: Path, targets: str, *more: str) -> list[str]:
    words = ["--vae", folders / "vae", "--images", folders / "images", f"--{targets}", folders / targets]
    words += ["--output", folders / "out" / "figures.json", "--resolution", SIDE, "--num_annotated", 3, *more]
    return [str(word) for word in words]


def run(repository: Path, folders: Path, targets: str, *more: str) -> ResultCard:
    script = runpy.run_path(str(repository / "training" / "evaluate_perception.py"))["main"]
    card = script(flags(folders, targets, *more))
    assert ResultCard.load(folders / "out" / "figures.json") == card and card.task == "perception"
    return card


def results(card: ResultCard) -> dict:
    (own,) = card.details["results"].values()
    return own


def test_classes_are_carried_over_as_the_library_does(repository, folders, tiny_autoencoder_kl):
    more = ("--ignore_index", str(VOID), "--order", "name", "--window", "1")
    card = run(repository, folders, "masks", *more, "--batch_size", "2")
    assert card.details["annotated"] == ["0.png", "1.png", "2.png"] and len(card.details["tested"]) == 4
    assert set(results(card)) == METHODS and card.settings["window"] == 1
    assert card.metrics.keys() == {f"{name}_{method}" for name in ("mean_iou", "accuracy") for method in METHODS}
    assert card.metrics["accuracy_nearest_positions"] == results(card)["nearest_positions"]["accuracy"]

    paths = [[folders / name / f"{index}.png" for index in range(COUNT)] for name in ("images", "masks")]
    with torch.no_grad():
        features = latent_features(encode(tiny_autoencoder_kl, read_pixels(paths[0], SIDE)).mode()).patch
    truth = read_annotations(paths[1], SIDE)
    targets = label_targets(position_labels(truth[:3], (8, 8), ignore_index=VOID), 2, ignore_index=VOID)
    confusion = SegmentationConfusion(2, ignore_index=VOID)
    answer = NearestTransfer(features[:3], targets)(features[3:])
    confusion.update(to_size(answer, (SIDE, SIDE)).argmax(1), truth[3:])
    assert card.metrics["mean_iou_nearest_positions"] == pytest.approx(confusion.mean_iou(), abs=1e-3)
    with Image.open(folders / "out" / "figures.png") as overview:
        assert overview.size == (5 * (SIDE + 4) - 4, 16 + 4 * (SIDE + 4) - 4)


def test_depths_are_carried_over(repository, folders):
    card = run(repository, folders, "depths", "--num_tested", "2", "--seed", "1")
    assert set(results(card)) == METHODS and len(card.details["tested"]) == 2
    assert set(card.details["tested"]).isdisjoint(card.details["annotated"])
    assert card.metrics["rmse_nearest_positions"] < card.metrics["rmse_mean_of_all_positions"]
    other = run(repository, folders, "depths", "--num_tested", "2", "--seed", "2")
    assert other.details["annotated"] != card.details["annotated"]
    scaled = run(repository, folders, "depths", "--num_tested", "2", "--seed", "2", "--median_scaling")
    assert scaled.metrics["rmse_mean_of_all_positions"] != other.metrics["rmse_mean_of_all_positions"]
    (sentence,) = compare_cards(["scaled", "other"], [scaled, other]).incomparable
    assert sentence.startswith("annotation differs (depth up to a factor per image, depth in metres)")


def test_heads_read_the_features_of_a_network(repository, folders, network):
    generator = torch.Generator().manual_seed(0)
    head = {
        "decode_head.conv_depth.weight": torch.randn(256, 12, 1, 1, generator=generator),
        "decode_head.conv_depth.bias": torch.zeros(256),
    }
    torch.save({"state_dict": head}, folders / "depth.pth")
    with_network = ("--alignment_network", str(network), "--num_annotated", "0")
    with_head = (*with_network, "--depth_head", str(folders / "depth.pth"))
    farther = run(repository, folders, "depths", *with_head, "--max_depth", "800")
    card = run(repository, folders, "depths", *with_head)
    assert farther.metrics["rmse_head"] > 10 * card.metrics["rmse_head"]
    assert set(results(card)) == {"head"} and len(card.details["tested"]) == COUNT
    loaded = LinearDepthHead.from_file(folders / "depth.pth")
    assert card.settings["head"]["depth"]["weights_hash"] == weights_hash(loaded)
    assert tuple(each.settings["head"]["depth"]["max_depth"] for each in (card, farther)) == (10, 800)

    classes = {
        "conv_seg.weight": torch.randn(3, 6, 1, 1, generator=generator),
        "conv_seg.bias": torch.zeros(3),
        **{f"bn.{name}": torch.ones(6) for name in ("weight", "bias", "running_mean", "running_var")},
    }
    torch.save(classes, folders / "classes.pth")
    more = ("--ignore_index", str(VOID), "--alignment_network", str(network))
    more += ("--segmentation_head", str(folders / "classes.pth"))
    with pytest.raises(ValueError, match="knows 3 classes, the masks hold 2"):
        run(repository, folders, "masks", *more)
    card = run(repository, folders, "masks", *more, "--num_classes", "3")
    assert set(results(card)) == {"head", *METHODS} and card.settings["window"] == 1


def head_files(folders: Path) -> tuple[str, str]:
    """Heads of classes and of depth for features of size 6."""
    generator = torch.Generator().manual_seed(0)
    classes = {
        "conv_seg.weight": torch.randn(2, 6, 1, 1, generator=generator),
        "conv_seg.bias": torch.zeros(2),
        **{f"bn.{name}": torch.ones(6) for name in ("weight", "bias", "running_mean", "running_var")},
    }
    depth = {"conv_depth.weight": torch.randn(256, 12, 1, 1, generator=generator), "conv_depth.bias": torch.zeros(256)}
    torch.save(classes, folders / "classes.pth")
    torch.save(depth, folders / "depth.pth")
    return str(folders / "classes.pth"), str(folders / "depth.pth")


def test_one_command_measures_classes_and_depths_of_one_network(repository, folders, network, tiny_autoencoder_kl):
    model = AlignmentNetwork.from_pretrained(network)
    model.norm_weight.copy_(torch.arange(1.0, 7.0))
    model.hidden[0].weight.data.mul_(50)
    model.save_pretrained(network)
    classes, depth = head_files(folders)
    common = ("--order", "name", "--alignment_network", str(network))
    void = ("--ignore_index", str(VOID))
    both = ("--depths", str(folders / "depths"), "--segmentation_head", classes, "--depth_head", depth)
    card = run(repository, folders, "masks", *common, *void, *both)
    assert set(card.details["results"]) == {"segmentation", "depth"}
    assert set(card.details["results"]["depth"]) == {"head", *METHODS}
    with Image.open(folders / "out" / "figures.png") as overview:
        assert overview.size[0] == (1 + 5 + 5) * (SIDE + 4) - 4
    smaller = run(repository, folders, "masks", *common, *void, *both, "--batch_size", "2")
    assert smaller.protocol == card.protocol and smaller.metrics == pytest.approx(card.metrics, abs=1e-6)

    masks = run(repository, folders, "masks", *common, *void, "--segmentation_head", classes)
    depths = run(repository, folders, "depths", *common, "--depth_head", depth)
    assert card.metrics == {**masks.metrics, **depths.metrics}
    assert masks.protocol["data_hash"] == depths.protocol["data_hash"] == card.protocol["data_hash"]
    assert len({each.protocol["targets_hash"] for each in (card, masks, depths)}) == 3

    # The two heads read the two kinds of features of this one network.
    truth = {
        name: read_annotations([folders / name / f"{index}.png" for index in range(3, COUNT)], SIDE)
        for name in ("masks", "depths")
    }
    pixels = read_pixels([folders / "images" / f"{index}.png" for index in range(3, COUNT)], SIDE)
    with torch.no_grad():
        before = model(encode(tiny_autoencoder_kl, pixels).mode())
    ious, errors = [], []
    for features in (model.normalize(before), before):
        confusion = SegmentationConfusion(2, ignore_index=VOID)
        logits = to_size(LinearSegmentationHead.from_file(classes)(features.patch), (SIDE, SIDE))
        confusion.update(logits.argmax(1), truth["masks"])
        ious.append(confusion.mean_iou())
        metres = to_size(LinearDepthHead.from_file(depth)(features.patch, features.cls), (SIDE, SIDE))[:, 0]
        errors.append(depth_errors(metres, truth["depths"] / 1000)["rmse"].mean().item())
    assert abs(ious[0] - ious[1]) > 0.01 and abs(errors[0] - errors[1]) > 0.01
    assert card.metrics["mean_iou_head"] == pytest.approx(ious[0], abs=1e-3)
    assert card.metrics["rmse_head"] == pytest.approx(errors[1], abs=1e-3)


def test_a_head_of_another_teacher_is_refused(repository, folders):
    network = AlignmentNetwork(
        latent_channels=4, hidden_size=8, feature_size=6, teacher="dinov3", teacher_type="dinov3_vit"
    )
    network.save_pretrained(folders / "network")
    more = ["--ignore_index", str(VOID), "--alignment_network", str(folders / "network")]
    more += ["--segmentation_head", head_files(folders)[0]]
    with pytest.raises(ValueError, match=r"type dinov2 .* of dinov3 \(type dinov3_vit"):
        run(repository, folders, "masks", *more)
    run(repository, folders, "masks", *more, "--head_teacher_type", "dinov3_vit")


def test_what_cannot_be_measured_is_refused(repository, folders):
    for more, message in (
        (["--segmentation_head", "x.pth"], "give --alignment_network"),
        (["--depth_head", "x.pth"], "--depth_head is measured on --depths"),
        (["--alignment_network", str(folders / "vae")], "holds no alignment network, nor is one beside it"),
        (["--num_annotated", "0"], "must be positive without a head"),
        (["--num_annotated", "7"], "--num_annotated leaves 0 images to test on"),
        (["--num_tested", "5"], "leaves 4 images to test on; --num_tested is 5"),
        (["--num_classes", "2"], "Labels must be 0..1"),
        (["--output", "figures.png"], "the overview gets .png"),
        (["--output", str(folders / "images" / "0.png" / "x.json"), "--vae", "nowhere"], "cannot be written"),
        *(
            ([f"--{name}", value], f"--{name} must be positive; got {value}")
            for name in POSITIVE
            for value in ("0", "-1")
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run(repository, folders, "masks", *more)


def test_files_that_cannot_be_measured_are_named_before_anything_is_loaded(repository, folders):
    cut = folders / "masks" / "6.png"
    cut.write_bytes(cut.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"masks/6\.png cannot be read"):
        run(repository, folders, "masks", "--vae", str(folders / "nowhere"))
    Image.fromarray(np.zeros((SIDE, SIDE), np.uint16)).save(folders / "depths" / "6.png")
    with pytest.raises(ValueError, match=r"depths/6\.png has no valid depth"):
        run(repository, folders, "depths", "--order", "name", "--vae", str(folders / "nowhere"))


@pytest.mark.parametrize("broken", ["vae", "network"])
def test_latents_and_features_that_are_not_finite_are_no_measurement(
    repository, folders, network, broken, tiny_autoencoder_kl
):
    model = tiny_autoencoder_kl if broken == "vae" else AlignmentNetwork.from_pretrained(network)
    if broken == "vae":
        torch.nn.init.constant_(model.encoder.conv_out.weight, 3e38)  # finite, and its sums are not
    else:
        torch.nn.init.constant_(list(model.modules())[-1].bias, torch.nan)
    model.save_pretrained(folders / broken)
    message = r"latents of .*images/\d\.png hold NaN" if broken == "vae" else "weights of the alignment network"
    with pytest.raises(ValueError, match=message):
        run(repository, folders, "masks", "--ignore_index", str(VOID), "--alignment_network", str(network))
    assert not (folders / "out").exists()


def test_a_network_is_found_beside_its_autoencoder(repository, folders, network, tiny_sit, tiny_autoencoder_kl):
    saved = AlignmentNetwork.from_pretrained(network)
    tiny_autoencoder_kl.save_pretrained(folders / "aligned")
    saved.save_pretrained(folders / "aligned" / "alignment_network")
    pipeline = ClassConditionalPipeline(
        tiny_sit, tiny_autoencoder_kl, FlowMatchODEScheduler(), alignment_network=saved
    )
    pipeline.save_pretrained(folders / "pipeline")
    found = []
    for name in ("network", "aligned", "aligned/alignment_network", "pipeline"):
        card = run(
            repository, folders, "masks", "--ignore_index", str(VOID), "--alignment_network", str(folders / name)
        )
        found.append((card.settings["alignment_network"]["weights_hash"], card.metrics))
    assert found[0][0] == weights_hash(saved) and found == found[:1] * 4


def test_figures_say_what_they_were_measured_on(repository, folders, network, tiny_autoencoder_kl):
    def measured(**more) -> ResultCard:
        flags = {"ignore_index": VOID, "order": "name", "alignment_network": network} | more
        words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        return run(repository, folders, "masks", *words)

    card = measured()
    assert set(card.protocol) == set(PROTOCOLS["perception"])
    assert card.settings["autoencoder"] == autoencoder_identity(tiny_autoencoder_kl)
    assert set(card.provenance["versions"]) == {"diffusers_eqvae", "diffusers", "torch", "python"}
    assert card.provenance["date"] and (card.provenance["data"], card.provenance["targets"]) == ("images", "masks")
    pixels = read_pixels([folders / "images" / f"{index}.png" for index in range(COUNT)], SIDE)
    levels = to_uint8(pixels).permute(0, 2, 3, 1).numpy()
    assert card.protocol["data_hash"] == hash_digests(image_digests(levels))

    def differences(other: ResultCard) -> set[str]:
        return {sentence.split()[0] for sentence in compare_cards(["a", "b"], [card, other]).incomparable}

    assert differences(measured(batch_size=2, neighbours=2)) == set()
    hashes = {"data_hash", "targets_hash"}
    assert differences(measured(num_tested=3)) == hashes | {"num_tested"}
    assert differences(measured(num_annotated=2, num_tested=5)) == {"num_annotated", "num_tested"}
    assert differences(measured(resolution=16)) == hashes | {"resize_rule", "image_size"}
    assert differences(measured(ignore_index=8)) == {"annotation"}
    mask = np.asarray(Image.open(folders / "masks" / "6.png")).copy()
    mask[-1, -1] = 1 - mask[-1, -1]
    Image.fromarray(mask).save(folders / "masks" / "6.png")
    assert differences(measured()) == {"targets_hash"}


@pytest.mark.parametrize(
    ("words", "without"),
    [
        (["--median_scaling", "--max_depth", "80"], "there are no --depths: --median_scaling, --max_depth"),
        (["--order", "name", "--seed", "3"], "--order is name: --seed"),
        (["--depths", "d", "--head_teacher_type", "dinov3_vit"], "there is no head: --head_teacher_type"),
        (["--depths", "d", "--max_depth", "80"], "there is no --depth_head: --max_depth"),
        (["--depths", "d", "--median_scaling", "--seed", "3"], None),
    ],
)
def test_flags_without_effect_are_named(repository, caplog, words, without):
    parse(PerceptionArguments, argv=["--vae", "v", "--images", "i", "--masks", "m", "--output", "o", *words])
    assert (caplog.messages == []) if without is None else (without in caplog.text)


def test_the_real_command_line(repository, folders):
    command = [sys.executable, str(repository / "training" / "evaluate_perception.py")]
    words = flags(folders, "masks", "--ignore_index", str(VOID))
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=300, env=os.environ.copy())
    assert done.returncode == 0, done.stderr
    path = str(folders / "out" / "figures.json")
    assert ResultCard.load(path).details["arguments"]["ignore_index"] == VOID
    assert compare_cards(["a", "b"], [ResultCard.load(path)] * 2).incomparable == []
