"""Numbers of another evaluator are not taken for one's own: what a reference does not say is unknown, marked, and
never equal; samples and references of different sizes are not compared."""

import json
import logging
import re

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_eqvae.classes import ClassTable
from diffusers_eqvae.metrics.feature_networks import ModuleFeatures
from diffusers_eqvae.metrics.generation import (
    Reference,
    evaluate_generation,
    feature_statistics,
    load_reference,
    require_same_classes,
    sample_batches,
)
from diffusers_eqvae.metrics.image_sets import extract, open_images
from diffusers_eqvae.metrics.references import evaluator_identity, require_same_evaluator
from diffusers_eqvae.metrics.result_card import PROTOCOLS, UNKNOWN, ResultCard, compare_cards


def images_uint8(count, side=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def network(seed=0, size=None):
    """Stands for the genuine Inception: its statistics are those that files hold."""
    torch.manual_seed(seed)
    made = ModuleFeatures(torch.nn.Conv2d(3, 6, 3), name="tiny", image_size=size)
    made.suffix = None
    return made


def statistics(net, images):
    own = feature_statistics(extract(net, [images]).outputs["features"])
    return {"mu": own.mean.numpy(), "sigma": own.covariance.numpy()}


POOL = images_uint8(200)
OTHERS = {
    "of clean-fid or torchvision": lambda net: {"mu": np.zeros(6), "sigma": np.eye(6)},
    "of other weights": lambda net: statistics(network(1), POOL),
    "in other units": lambda net: {key: 2.0 * value for key, value in statistics(net, POOL).items()},
    "of another number of features": lambda net: {"mu": np.zeros(5), "sigma": np.eye(5)},
}


@pytest.mark.parametrize("images", [{}, {"arr_0": POOL}], ids=["alone", "beside images"])
@pytest.mark.parametrize("other", OTHERS)
def test_statistics_of_another_evaluator_are_unknown_and_marked(other, images, tmp_path):
    net = network()
    np.savez(tmp_path / "other.npz", **OTHERS[other](net), **images)
    reference = load_reference(tmp_path / "other.npz", net)
    assert reference.weights_hash == UNKNOWN != net.weights_hash
    assert reference.statement()["reference_weights"] == UNKNOWN
    if len(reference.mean) == 6:
        figure = evaluate_generation(extract(net, [images_uint8(50)]), reference, net).figures["fid"]
        said = "not what this network gives of the images beside them" if images else "nothing in other.npz says which"
        assert said in figure.caveat


def test_statistics_that_the_images_beside_them_bear_out_are_known(tmp_path):
    """Those of many images, of which some lie beside them, as in ADM's files."""
    net = network()
    np.savez(tmp_path / "own.npz", arr_0=POOL[:60], **statistics(net, POOL))
    reference = load_reference(tmp_path / "own.npz", net)
    assert reference.weights_hash == net.weights_hash and reference.doubt is None
    assert reference.statement()["reference_size"] == "8x8"


@pytest.mark.parametrize("key", ["reference_weights", "reference_size", "image_size"])
@pytest.mark.parametrize("value", [UNKNOWN, None], ids=["unknown", "not stated"])
def test_what_is_unknown_differs_even_from_itself(key, value):
    protocol = dict.fromkeys(PROTOCOLS["generation"], "the same")
    cards = [ResultCard({"fid": 3.0}, {**protocol, key: value}) for _ in range(2)]
    (sentence,) = compare_cards(["a", "b"], cards).incomparable
    assert sentence.startswith(f"{key} is not stated by a, b: ")


@pytest.mark.parametrize("part", ["weights", "input_rule", "version", "image_size"])
def test_evaluators_are_compared_part_by_part(part):
    one = evaluator_identity(network(), "8x8")
    require_same_evaluator(one, one | {part: UNKNOWN}, whose="x")
    with pytest.raises(ValueError, match=f"of x is {re.escape(one[part])}, and here it is other"):
        require_same_evaluator(one, one | {part: "other"}, whose="x")


def test_saved_statistics_of_another_input_rule_are_refused(tmp_path):
    """The weights are the same, the features are not."""
    load_reference(open_images_of(tmp_path, POOL), network(size=8)).save(tmp_path / "saved.npz")
    assert load_reference(tmp_path / "saved.npz", network(size=8)).evaluator["image_size"] == "8x8"
    with pytest.raises(ValueError, match=r"rule by which the network is given images of the reference saved\.npz is"):
        load_reference(tmp_path / "saved.npz", network(size=16))


def open_images_of(folder, images):
    np.savez(folder / "images.npz", arr_0=images)
    return open_images(folder / "images.npz")


@pytest.mark.parametrize("source", ["images", "saved statistics", "statistics beside images"])
def test_sizes_that_differ_are_refused_and_both_are_named(source, tmp_path):
    net, path = network(), tmp_path / "reference.npz"
    beside = statistics(net, POOL) if source == "statistics beside images" else {}
    np.savez(path, arr_0=POOL, **beside)
    reference = load_reference(path, net)
    if source == "saved statistics":
        reference.save(tmp_path / "saved.npz")
        reference = Reference.load(tmp_path / "saved.npz", net)
    samples = images_uint8(10, side=4)
    message = "size of images of the reference .* is 8x8, and here it is 4x4. .* by --resolution"
    with pytest.raises(ValueError, match=message):
        next(sample_batches([(range(10), samples)], [net], references=[reference], resolution="--resolution"))
    with pytest.raises(ValueError, match="is 8x8, and here it is 4x4"):
        evaluate_generation(extract(net, [samples]), reference, net)


def folder_of(path, **classes):
    for name, count in classes.items():
        (path / name).mkdir(parents=True)
        for index, each in enumerate(images_uint8(count)):
            Image.fromarray(each).save(path / name / f"{index}.png")
    return path


OTHER_CLASSES = {
    "others": ({"owl": 3, "fox": 2}, "2 of 2 here are none of its 2 .cat, dog.: owl, fox. Take a reference of these"),
    "other names of the same": (
        {"n02121620": 3, "n02084071": 1},
        '2 of 2 here .*: n02121620, n02084071.*let id2label of what was sampled .* give both, as "tench, n01440764"',
    ),
    "one more": ({"cat": 3, "owl": 1}, "1 of 2 here are none of its 2 .cat, dog.: owl"),
}
SAME_CLASSES = {
    "the same": ({"cat": 3, "dog": 1}, []),
    "in another order": ({"dog": 3, "cat": 1}, []),
    "with synonyms": ({"cat, Felis catus": 3, "dog": 1}, []),
    "one less": ({"cat": 3, "dog": 0}, ["Of 1 of 2 classes of the reference images there is no image: dog."]),
    "by numbers": ({"0": 3, "1": 1}, []),
    "only one, as of no classes": ({"image": 4}, []),
    "unknown": ({}, []),
}


@pytest.mark.parametrize("saved", [False, True], ids=["folder", "saved statistics"])
@pytest.mark.parametrize("case", {**OTHER_CLASSES, **SAME_CLASSES})
def test_samples_of_other_classes_than_the_reference_are_refused_by_name(case, saved, tmp_path, caplog):
    net = network()
    reference = load_reference(folder_of(tmp_path / "images", cat=2, dog=1), net)
    if saved:
        reference.save(tmp_path / "saved.npz")
        reference = load_reference(tmp_path / "saved.npz", net)
    assert reference.classes.images == {"cat": 2, "dog": 1}
    counts, said = {**OTHER_CLASSES, **SAME_CLASSES}[case]
    samples = ClassTable(tuple(counts), tuple(counts.values()))
    if case in OTHER_CLASSES:
        with pytest.raises(ValueError, match=f"classes of the reference images are others: {said}"):
            require_same_classes([reference], samples)
    else:
        with caplog.at_level(logging.WARNING):
            require_same_classes([None, reference], samples)
        assert caplog.messages == said


@pytest.mark.parametrize("labels", ["images beside the folders", "labels in a file", "no folders"])
def test_folders_that_are_not_classes_say_nothing_of_them(labels, tmp_path):
    folder_of(tmp_path, cat=2, dog=1)
    if labels == "images beside the folders":
        (tmp_path / "cat" / "0.png").rename(tmp_path / "preview.png")
    elif labels == "labels in a file":
        (tmp_path / "dataset.json").write_text(json.dumps({"labels": []}))
    assert open_images(tmp_path / "cat" if labels == "no folders" else tmp_path).classes == ClassTable()


BROKEN = {
    "numbers that are not": ({"mu": np.full(6, np.nan), "sigma": np.eye(6)}, "must be finite"),
    "Python objects": ({"mu": np.array([print] * 6), "sigma": np.eye(6)}, "Python objects"),
    "saved without what it is of": ({"format_version": np.int64(2), "mu": np.zeros(6)}, "does not say what"),
    "saved of something else": ({"format_version": np.int64(2), "reference": "[]"}, "does not say what"),
    "of a format of words": ({"format_version": "two", "mu": np.zeros(6)}, "format_version two, older"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_reference_is_named(case, tmp_path):
    arrays, message = BROKEN[case]
    np.savez(tmp_path / "broken.npz", **arrays)
    with pytest.raises(ValueError, match=rf"broken\.npz.*{message}"):
        load_reference(tmp_path / "broken.npz", network())


def test_every_card_states_the_size_of_its_images():
    assert all("image_size" in protocol for protocol in PROTOCOLS.values())
