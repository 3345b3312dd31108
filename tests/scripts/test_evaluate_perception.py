"""training/evaluate_perception.py: the same figures as the library, for classes, depths, networks and heads."""

from __future__ import annotations

import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_eqvae import AlignmentNetwork, AutoencoderKLAligned, cli
from diffusers_eqvae.autoencoders import encode
from diffusers_eqvae.files import hash_file
from diffusers_eqvae.images import to_uint8
from diffusers_eqvae.metrics.image_sets import hash_digests, image_digests
from diffusers_eqvae.metrics.perception import SegmentationConfusion
from diffusers_eqvae.metrics.result_card import PERCEPTION_PROTOCOL, ResultCard, compare_cards
from diffusers_eqvae.perception import NearestTransfer, position_labels, label_targets, latent_features, to_size
from diffusers_eqvae.perception.annotated_images import split_figures
from diffusers_eqvae.perception.tasks import read_annotations, read_pixels
from diffusers_eqvae.provenance import hash_tensors, vae_fingerprint
from diffusers_eqvae.training_utils.command_line import parse

COUNT, SIDE, VOID = 7, 32, 9
POSITIVE = ("batch_size", "num_shown", "num_classes", "window", "num_tested", "resolution", "neighbours", "max_depth")
METHODS = {"nearest_cells", "mean_at_each_place", "mean_of_all_cells"}


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
    words = ["--vae", folders / "vae", "--images", folders / "images", "--targets", folders / targets]
    words += ["--output", folders / "out" / "figures.json", "--resolution", SIDE, "--num_annotated", 3, *more]
    return [str(word) for word in words]


def run(repository: Path, folders: Path, targets: str, *more: str) -> ResultCard:
    script = runpy.run_path(str(repository / "training" / "evaluate_perception.py"))["main"]
    card = script(flags(folders, targets, *more))
    assert ResultCard.load(folders / "out" / "figures.json") == card and card.task == "perception"
    return card


def figures(card: ResultCard) -> dict:
    return card.details["figures"]


def test_classes_are_carried_over_as_the_library_does(repository, folders, tiny_autoencoder_kl):
    more = ("--ignore_index", str(VOID), "--order", "name", "--window", "1")
    card = run(repository, folders, "masks", *more, "--batch_size", "2")
    assert card.details["annotated"] == ["0.png", "1.png", "2.png"] and len(card.details["tested"]) == 4
    assert set(figures(card)) == METHODS and card.settings["window"] == 1
    assert card.metrics.keys() == {f"{name}_{method}" for name in ("mean_iou", "accuracy") for method in METHODS}
    assert card.metrics["accuracy_nearest_cells"] == figures(card)["nearest_cells"]["accuracy"]

    paths = [[folders / name / f"{index}.png" for index in range(COUNT)] for name in ("images", "masks")]
    with torch.no_grad():
        features = latent_features(encode(tiny_autoencoder_kl, read_pixels(paths[0], SIDE)).mode()).patch
    truth = read_annotations(paths[1], SIDE)
    targets = label_targets(position_labels(truth[:3], (8, 8), ignore_index=VOID), 2, ignore_index=VOID)
    confusion = SegmentationConfusion(2, ignore_index=VOID)
    answer = NearestTransfer(features[:3], targets)(features[3:])
    confusion.update(to_size(answer, (SIDE, SIDE)).argmax(1), truth[3:])
    assert card.metrics["mean_iou_nearest_cells"] == pytest.approx(confusion.mean_iou(), abs=1e-3)
    with Image.open(folders / "out" / "figures.png") as overview:
        assert overview.size == (5 * (SIDE + 4) - 4, 16 + 4 * (SIDE + 4) - 4)


def test_depths_are_carried_over(repository, folders):
    card = run(repository, folders, "depths", "--task", "depth", "--num_tested", "2", "--seed", "1")
    assert set(figures(card)) == METHODS and len(card.details["tested"]) == 2
    assert set(card.details["tested"]).isdisjoint(card.details["annotated"])
    assert card.metrics["rmse_nearest_cells"] < card.metrics["rmse_mean_of_all_cells"]
    other = run(repository, folders, "depths", "--task", "depth", "--num_tested", "2", "--seed", "2")
    assert other.details["annotated"] != card.details["annotated"]
    scaled = run(
        repository, folders, "depths", "--task", "depth", "--num_tested", "2", "--seed", "2", "--median_scaling"
    )
    assert scaled.metrics["rmse_mean_of_all_cells"] != other.metrics["rmse_mean_of_all_cells"]
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
    with_head = ("--task", "depth", *with_network, "--head", str(folders / "depth.pth"))
    farther = run(repository, folders, "depths", *with_head, "--max_depth", "800")
    card = run(repository, folders, "depths", *with_head)
    assert farther.metrics["rmse_head"] > 10 * card.metrics["rmse_head"]
    assert set(figures(card)) == {"head"} and len(card.details["tested"]) == COUNT
    assert card.settings["head"]["file_hash"] == hash_file(folders / "depth.pth")
    assert (card.settings["head"]["max_depth"], farther.settings["head"]["max_depth"]) == (10, 800)

    classes = {
        "conv_seg.weight": torch.randn(3, 6, 1, 1, generator=generator),
        "conv_seg.bias": torch.zeros(3),
        **{f"bn.{name}": torch.ones(6) for name in ("weight", "bias", "running_mean", "running_var")},
    }
    torch.save(classes, folders / "classes.pth")
    more = ("--ignore_index", str(VOID), "--alignment_network", str(network), "--head", str(folders / "classes.pth"))
    with pytest.raises(ValueError, match="knows 3 classes, the masks hold 2"):
        run(repository, folders, "masks", *more)
    card = run(repository, folders, "masks", *more, "--num_classes", "3")
    assert set(figures(card)) == {"head", *METHODS} and card.settings["window"] == 1


def test_what_cannot_be_measured_is_refused(repository, folders):
    for more, message in (
        (["--head", "x.pth"], "give --alignment_network"),
        (["--num_annotated", "0"], "must be positive without --head"),
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
        run(repository, folders, "depths", "--task", "depth", "--order", "name", "--vae", str(folders / "nowhere"))


@pytest.mark.parametrize("broken", ["vae", "network"])
def test_latents_and_features_that_are_not_finite_are_no_measurement(
    repository, folders, network, broken, tiny_autoencoder_kl
):
    model = tiny_autoencoder_kl if broken == "vae" else AlignmentNetwork.from_pretrained(network)
    last = model.encoder.conv_out if broken == "vae" else list(model.modules())[-1]
    torch.nn.init.constant_(last.bias, torch.nan)
    model.save_pretrained(folders / broken)
    message = r"latents of .*images/\d\.png hold NaN" if broken == "vae" else "weights of the alignment network"
    with pytest.raises(ValueError, match=message):
        run(repository, folders, "masks", "--ignore_index", str(VOID), "--alignment_network", str(network))
    assert not list((folders / "out").iterdir())


def test_a_network_is_found_beside_its_autoencoder(repository, folders, network, tiny_autoencoder_kl):
    aligned = AutoencoderKLAligned.from_config(tiny_autoencoder_kl.config)
    aligned.load_state_dict(tiny_autoencoder_kl.state_dict())
    aligned.set_alignment_network(AlignmentNetwork.from_pretrained(network))
    aligned.save_pretrained(folders / "aligned")
    aligned.save_pretrained(folders / "pipeline" / "vae")
    (folders / "pipeline" / "model_index.json").write_text("{}")
    facts = []
    for name in ("network", "aligned", "aligned/alignment_network", "pipeline"):
        card = run(
            repository, folders, "masks", "--ignore_index", str(VOID), "--alignment_network", str(folders / name)
        )
        facts.append((card.settings["alignment_network"]["weights_hash"], card.metrics))
    assert facts[0][0] == hash_tensors(AlignmentNetwork.from_pretrained(network)) and facts == facts[:1] * 4
    with pytest.raises(ValueError, match="holds a AutoencoderKL and no alignment network"):
        run(repository, folders, "masks", "--ignore_index", str(VOID), "--alignment_network", str(folders / "vae"))


def test_figures_say_what_they_were_measured_on(repository, folders, network, tiny_autoencoder_kl):
    def measured(**more) -> ResultCard:
        flags = {"ignore_index": VOID, "order": "name", "alignment_network": network} | more
        words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        return run(repository, folders, "masks", *words)

    card = measured()
    assert set(card.protocol) == set(PERCEPTION_PROTOCOL)
    assert card.settings["weights"] == vae_fingerprint(tiny_autoencoder_kl)
    assert card.settings["vae_revision"] == f"weights {hash_tensors(tiny_autoencoder_kl)}"
    assert set(card.provenance["versions"]) == {"diffusers_eqvae", "diffusers", "torch", "python"}
    assert card.provenance["date"] and (card.provenance["data"], card.provenance["targets"]) == ("images", "masks")
    pixels = read_pixels([folders / "images" / f"{index}.png" for index in range(COUNT)], SIDE)
    levels = to_uint8(pixels).permute(0, 2, 3, 1).numpy()
    assert card.protocol["images_hash"] == hash_digests(image_digests(levels))

    def differences(other: ResultCard) -> set[str]:
        return {sentence.split()[0] for sentence in compare_cards(["a", "b"], [card, other]).incomparable}

    assert differences(measured(batch_size=2, neighbours=2)) == set()
    hashes = {"images_hash", "targets_hash"}
    assert differences(measured(num_tested=3)) == hashes | {"num_tested"}
    assert differences(measured(num_annotated=2, num_tested=5)) == {"num_annotated", "num_tested"}
    assert differences(measured(resolution=16)) == hashes | {"resize_rule"}
    assert differences(measured(ignore_index=8)) == {"annotation"}
    mask = np.asarray(Image.open(folders / "masks" / "6.png")).copy()
    mask[-1, -1] = 1 - mask[-1, -1]
    Image.fromarray(mask).save(folders / "masks" / "6.png")
    assert differences(measured()) == {"targets_hash"}


def test_a_figure_that_is_not_finite_is_a_mark():
    measured = {"head": {"mean_iou": math.nan, "accuracy": 0.5, "iou": [None, None]}}
    assert split_figures(measured) == ({"accuracy_head": 0.5}, {"mean_iou_head": "nan for these images"})


@pytest.mark.parametrize(
    ("words", "without"),
    [
        (["--median_scaling", "--max_depth", "80"], "--task is segmentation: --median_scaling, --max_depth"),
        (["--order", "name", "--seed", "3"], "--order is name: --seed"),
        (["--task", "depth", "--num_classes", "3", "--ignore_index", "0"], "--ignore_index, --num_classes"),
        (["--task", "depth", "--max_depth", "80"], "there is no --head: --max_depth"),
        (["--task", "depth", "--median_scaling", "--seed", "3"], None),
    ],
)
def test_flags_without_effect_are_named(repository, caplog, words, without):
    kind = runpy.run_path(str(repository / "training" / "evaluate_perception.py"))["PerceptionArguments"]
    parse(kind, argv=["--vae", "v", "--images", "i", "--targets", "t", "--output", "o", *words])
    assert (caplog.messages == []) if without is None else (without in caplog.text)


def test_the_real_command_line(repository, folders):
    command = [sys.executable, str(repository / "training" / "evaluate_perception.py")]
    words = flags(folders, "masks", "--ignore_index", str(VOID))
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=300, env=os.environ.copy())
    assert done.returncode == 0, done.stderr
    path = str(folders / "out" / "figures.json")
    assert ResultCard.load(path).details["arguments"]["ignore_index"] == VOID
    assert cli.main(["compare", path, path]) == 0
