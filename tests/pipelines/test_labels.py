"""Class ids from ids, names and nested lists; names that several classes share or none has."""

import json

import numpy as np
import pytest
import torch

from diffusers_eqvae.classes import ClassTable
from diffusers_eqvae.pipelines.labels import parse_id2label, resolve_class_labels

ID2LABEL = {0: "tench, Tinca tinca", 1: "crane", 2: ("otter", "river otter"), 3: "crane, construction crane"}
NAMES = parse_id2label(ID2LABEL)


def resolve(labels, names=NAMES):
    return resolve_class_labels(labels, 10, id2label=names)


def test_ids_names_nesting_and_tensors():
    assert resolve([["otter", 7], torch.tensor([1, 2]), "TINCA TINCA", ("River Otter", [])]) == [2, 7, 1, 2, 0, 2]
    assert resolve("construction crane") == [3] and resolve("tench, Tinca tinca") == [0]
    assert resolve(np.int64(4)) == [4] and resolve(range(3)) == [0, 1, 2] and resolve(torch.tensor(5)) == [5]


def test_names_survive_json():
    assert (
        parse_id2label(json.loads(json.dumps(ID2LABEL)))
        == NAMES
        == {
            0: ("tench, Tinca tinca", "tench", "Tinca tinca"),
            1: ("crane",),
            2: ("otter", "river otter"),
            3: ("crane, construction crane", "crane", "construction crane"),
        }
    )
    assert parse_id2label(None) == {}


@pytest.mark.parametrize("key", ["otter", "-1", "10", 1.5])
def test_keys_that_are_no_class_ids(key):
    with pytest.raises(ValueError, match=r"0\.\.9"):
        parse_id2label({key: "x"}, 10)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("crane", r"classes \[1, 3\].*id"),
        ("oter", "Did you mean 'otter'"),
        ("zzz", "not a label name"),
        (10, r"0\.\.9"),
        (-1, r"0\.\.9"),
        ([], "at least one"),
    ],
)
def test_labels_that_do_not_name_one_class(labels, message):
    with pytest.raises(ValueError, match=message):
        resolve(labels)


@pytest.mark.parametrize("label", [1.5, True, None, b"otter"])
def test_labels_of_another_type(label):
    with pytest.raises(TypeError, match="integer id or a label name"):
        resolve([label])


def test_a_name_without_names():
    with pytest.raises(ValueError, match="no label names"):
        resolve("otter", {})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"id2label": ["otter"]}, r"id2label must say a name by class id, as \{\"0\": \"tench\"\}; got \['otter'\]"),
        ({"id2label": "otter"}, "id2label must say a name by class id"),
        ({"id2label": {"0": 1}}, "must be text, or a list of texts; class 0 has 1"),
        ({"id2label": {"0": ["otter", 2]}}, "must be text, or a list of texts; class 0 has"),
        ({"id2label": {"0": "otter"}, "class_counts": [1]}, "class_counts must say a number of images by class id"),
        ({"id2label": {"0": "otter"}, "class_counts": {"0": "x"}}, r"as \{\"0\": 500\}; got \{'0': 'x'\}"),
    ],
)
def test_a_table_of_classes_that_was_edited_wrongly_is_a_sentence(config, message):
    with pytest.raises(ValueError, match=message):
        ClassTable.from_config(config)


def test_a_number_of_classes_that_is_none():
    with pytest.raises(ValueError, match="num_classes must be a whole number; got 'x'"):
        parse_id2label({0: "otter"}, "x")
