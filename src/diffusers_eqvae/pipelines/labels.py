"""Class ids from what people write: ids, names, nested lists of either."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Mapping
from typing import Any


def parse_id2label(id2label: Mapping[Any, Any] | None, num_classes: int | None = None) -> dict[int, tuple[str, ...]]:
    """The names of every class id; with `num_classes`, ids must lie in 0..num_classes-1.

    A label is one name or several (a list, or one string with commas as in ImageNet's "tench, Tinca tinca"); the first
    entry is the label as written, the others its synonyms. JSON's string keys and lists are read as ids and tuples.

    Example:
        >>> parse_id2label({"0": "tench, Tinca tinca"})
        {0: ('tench, Tinca tinca', 'tench', 'Tinca tinca')}
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

    Names, as `parse_id2label` gives them, are compared without regard to case.

    Raises:
        ValueError: an id out of range, an unknown name (with the nearest ones), a name that several classes share.
        TypeError: something that is neither an id nor a name.

    Example:
        >>> resolve_class_labels([["Otter", 7], 3], 10, id2label={2: ("otter",)})
        [2, 7, 3]
    """
    ids = [
        _id_of_name(label, id2label or {}, num_classes) if isinstance(label, str) else _checked_id(label)
        for label in _flatten(class_labels)
    ]
    if not ids:
        raise ValueError("class_labels must hold at least one class id or label name; got an empty list.")
    if wrong := [class_id for class_id in ids if not 0 <= class_id < num_classes]:
        raise ValueError(f"Class ids must lie in 0..{num_classes - 1} for this transformer; got {wrong[0]}.")
    return ids


def _flatten(class_labels: Any) -> list[Any]:
    if hasattr(class_labels, "tolist"):
        class_labels = class_labels.tolist()
    if isinstance(class_labels, (list, tuple, range)):
        return [label for item in class_labels for label in _flatten(item)]
    return [class_labels]


def _checked_id(label: Any) -> int:
    if isinstance(label, bool) or not hasattr(label, "__index__"):
        kind = type(label).__name__
        raise TypeError(f"A class label must be an integer id or a label name; got {label!r} of type {kind}.")
    return operator.index(label)


def _id_of_name(name: str, id2label: Mapping[int, tuple[str, ...]], num_classes: int) -> int:
    if not id2label:
        raise ValueError(
            f"This pipeline has no label names (id2label), so {name!r} cannot be looked up; "
            f"pass class ids 0..{num_classes - 1}."
        )
    wanted = name.strip().casefold()
    known = {class_id: {each.casefold() for each in names} for class_id, names in id2label.items()}
    found = [class_id for class_id, names in known.items() if wanted in names]
    if len(found) > 1:
        raise ValueError(f"{name!r} is the name of classes {found}: pass the class id instead.")
    if not found:
        nearest = difflib.get_close_matches(wanted, sorted(set().union(*known.values())), n=3)
        hint = (
            f"Did you mean {', '.join(map(repr, nearest))}?" if nearest else "Pass a class id or a name of id2label."
        )
        raise ValueError(f"{name!r} is not a label name of this pipeline. {hint}")
    return found[0]
