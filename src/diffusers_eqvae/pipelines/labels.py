"""Class ids from what people write: ids, names, nested lists of either."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Mapping
from typing import Any

import torch


def parse_id2label(id2label: Mapping[Any, Any] | None, num_classes: int | None = None) -> dict[int, tuple[str, ...]]:
    """The names of every class id.

    A label is one name or several (a list, or one string with commas as in ImageNet's "tench, Tinca tinca"); the first
    entry is the label as written, the others its synonyms. JSON's string keys and lists are read as ids and tuples.

    Args:
        id2label: class id -> label, or None.
        num_classes: when given, ids must lie in 0..num_classes-1.

    Raises:
        ValueError: a key is no class id of this model.
    """
    names: dict[int, tuple[str, ...]] = {}
    for key, label in (id2label or {}).items():
        if not str(key).isdecimal() or (num_classes is not None and int(key) >= num_classes):
            limit = "a non-negative integer" if num_classes is None else f"one of the class ids 0..{num_classes - 1}"
            raise ValueError(f"Every key of id2label must be {limit}; got {key!r}. Check the classes it was made for.")
        written = [label] if isinstance(label, str) else [str(name) for name in label]
        synonyms = [part.strip() for name in written for part in name.split(",")]
        names[int(key)] = tuple(dict.fromkeys(written + synonyms))
    return names


def resolve_class_labels(
    class_labels: Any, num_classes: int, *, id2label: Mapping[int, tuple[str, ...]] | None = None
) -> list[int]:
    """Flat list of class ids in 0..num_classes-1 from an id, a name, a tensor, or nested lists of them.

    Names are compared without regard to case.

    Args:
        class_labels: e.g. `3`, `"otter"`, `[["otter", 7], 3]`.
        num_classes: number of classes of the transformer.
        id2label: as `parse_id2label` gives it.

    Raises:
        ValueError: an id out of range, an unknown name (with the nearest ones), a name that several classes share.
        TypeError: something that is neither an id nor a name.
    """
    ids: list[int] = []
    for label in _flatten(class_labels):
        ids.append(_id_of_name(label, id2label or {}, num_classes) if isinstance(label, str) else _checked_id(label))
        if not 0 <= ids[-1] < num_classes:
            raise ValueError(f"Class ids must lie in 0..{num_classes - 1} for this transformer; got {ids[-1]}.")
    if not ids:
        raise ValueError("class_labels must hold at least one class id or label name; got an empty list.")
    return ids


def _flatten(class_labels: Any) -> list[Any]:
    if isinstance(class_labels, torch.Tensor) or hasattr(class_labels, "tolist"):
        class_labels = class_labels.tolist()
    if isinstance(class_labels, (list, tuple, range)):
        return [label for item in class_labels for label in _flatten(item)]
    return [class_labels]


def _checked_id(label: Any) -> int:
    try:
        if isinstance(label, bool):
            raise TypeError
        return operator.index(label)
    except TypeError:
        raise TypeError(
            f"A class label must be an integer id or a label name; got {label!r} of type {type(label).__name__}."
        ) from None


def _id_of_name(name: str, id2label: Mapping[int, tuple[str, ...]], num_classes: int) -> int:
    if not id2label:
        raise ValueError(
            f"This pipeline has no label names (id2label), so {name!r} cannot be looked up; "
            f"pass class ids 0..{num_classes - 1}."
        )
    ids_of: dict[str, list[int]] = {}
    for class_id, names in id2label.items():
        for known in dict.fromkeys(known.casefold() for known in names):
            ids_of.setdefault(known, []).append(class_id)
    found = ids_of.get(name.strip().casefold(), [])
    if len(found) > 1:
        raise ValueError(f"{name!r} is the name of classes {found}: pass the class id instead.")
    if not found:
        nearest = difflib.get_close_matches(name.strip().casefold(), ids_of, n=3)
        hint = (
            f"Did you mean {', '.join(map(repr, nearest))}?" if nearest else "Pass a class id or a name of id2label."
        )
        raise ValueError(f"{name!r} is not a label name of this pipeline. {hint}")
    return found[0]
