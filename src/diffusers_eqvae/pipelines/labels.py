"""Class ids from what people write: ids, names, nested lists of either."""

from __future__ import annotations

import difflib
import logging
import operator
from collections.abc import Iterable, Mapping
from typing import Any

from ..classes import is_integer, listed, parse_id2label

__all__ = ["parse_id2label", "resolve_class_labels"]

logger = logging.getLogger(__name__)


def resolve_class_labels(
    class_labels: Any, num_classes: int, *, id2label: Mapping[int, tuple[str, ...]] | None = None
) -> list[int]:
    """Flat list of class ids in 0..num_classes-1 from an id, a name, a tensor, or nested lists of them.

    Names, as `parse_id2label` gives them, are compared without regard to case. Text that is a number is a name where
    classes are called by numbers, else an id; "id:7" and "name:7" say which is meant.

    Raises:
        ValueError: an id out of range, an unknown name (with the nearest ones), a name that several classes share, a
            number that is the name of one class and the id of another.
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


def warn_of_untrained(ids: Iterable[int], *, trained: Iterable[int], said: set[int]) -> None:
    """Names the classes that training had no images of, but those that were `said` before."""
    if untrained := sorted(set(ids) - set(trained) - said):
        said.update(untrained)
        which = listed(list(map(str, untrained)))
        logger.warning("Training had no images of class %s: what is sampled of it was not learnt.", which)


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
    kind, _, rest = name.strip().partition(":")
    if kind == "id" and is_integer(rest):
        return int(rest)
    wanted = (rest if kind == "name" else name).strip().casefold()
    known = {class_id: {each.casefold() for each in names} for class_id, names in id2label.items()}
    found = [class_id for class_id, names in known.items() if wanted in names]
    if len(found) > 1:
        raise ValueError(f"{name!r} is the name of classes {found}: pass the class id instead.")
    if kind != "name" and is_integer(wanted):
        return _id_of_number(wanted, found, known, num_classes)
    if not id2label:
        raise ValueError(
            f"This pipeline has no label names (id2label), so {name!r} cannot be looked up; "
            f"pass class ids 0..{num_classes - 1}."
        )
    if not found:
        nearest = difflib.get_close_matches(wanted, sorted(set().union(*known.values())), n=3)
        hint = (
            f"Did you mean {', '.join(map(repr, nearest))}?" if nearest else "Pass a class id or a name of id2label."
        )
        raise ValueError(f"{name!r} is not a label name of this pipeline. {hint}")
    return found[0]


def _id_of_number(text: str, found: list[int], known: Mapping[int, set[str]], num_classes: int) -> int:
    """A number in text is a name first; refused where it could as well be meant as the id of another class."""
    number = int(text)
    if found and (found[0] == number or not 0 <= number < num_classes):
        return found[0]
    if found:
        raise ValueError(
            f"'{text}' is the name of class {found[0]} and the id of class {number}: write id:{number} or name:{text}."
        )
    if any(is_integer(each) for names in known.values() for each in names) and 0 <= number < num_classes:
        raise ValueError(
            f"'{text}' is not a label name of this pipeline, whose classes are called by numbers: write id:{number} "
            "for the id, or one of the names."
        )
    return number
