"""Labels that lie beside images in a file: dataset.json (StyleGAN, EDM, REPA), metadata.jsonl and metadata.csv."""

from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..classes import listed
from .report import DataError

logger = logging.getLogger(__name__)

LABEL_FILES = ("dataset.json", "metadata.jsonl", "metadata.csv")
_NAME_COLUMNS = ("file_name", "image_file_name")


def read_label_files(root: Path, images: Sequence[str], label_column: str) -> list[Any] | None:
    """The label of each image as the files of `LABEL_FILES` below `root` say it, or None where none does.

    dataset.json is {"labels": [["00000/img00000000.png", 7], ...]}, or {"labels": null} for images without labels,
    for which the answer is an empty list. A row of metadata.jsonl and metadata.csv names its image by "file_name".

    Raises:
        ValueError: a file that cannot be read, or labels of some images only; the first ones without are named.

    Example:
        >>> read_label_files(Path("edm"), ["edm/00000/img00000000.png"], "label")
        [7]
    """
    folders = sorted({str(root), *(os.path.dirname(path) for path in images)})
    files = [Path(folder) / name for folder in folders for name in LABEL_FILES if (Path(folder) / name).is_file()]
    labels: dict[str, Any] = {}
    used = []
    for file in files:
        rows = _dataset_json(file) if file.name == "dataset.json" else _metadata(file, label_column)
        if rows is None:
            continue
        used.append(os.path.relpath(file, root))
        labels |= {os.path.normpath(file.parent / name): value for name, value in rows}
    if not used:
        return None
    if not labels:
        return []
    missing = [os.path.relpath(path, root) for path in images if path not in labels]
    if missing:
        raise DataError(
            f"{listed(used)} in {root} labels {len(images) - len(missing)} of {len(images)} images, and not "
            f"{listed(missing)}: complete the file, or move it away to take folders as classes."
        )
    logger.warning("The labels are those of %s in %s; folders are not classes.", listed(used), root)
    return typed([labels[path] for path in images], listed(used))


def _dataset_json(file: Path) -> Iterator[tuple[str, Any]] | None:
    content = _json(file, file.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or "labels" not in content:
        logger.warning('%s is not read: it has no "labels" of images.', file)
        return None
    labels = content["labels"] or []
    pairs = list(labels.items()) if isinstance(labels, dict) else labels
    if not isinstance(pairs, list) or not all(isinstance(each, list | tuple) and len(each) == 2 for each in pairs):
        raise DataError(f'{file} must hold "labels": [[file name, class id], ...]; rewrite or move it away.')
    return iter([(str(name), label) for name, label in pairs])


def _metadata(file: Path, label_column: str) -> Iterator[tuple[str, Any]] | None:
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix == ".csv":
        rows: list[Any] = list(csv.DictReader(text.splitlines()))
    else:
        rows = [_json(file, line) for line in text.splitlines() if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"Every line of {file} must be an object with file_name; rewrite or move it away.")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    name = next((each for each in _NAME_COLUMNS if each in columns), None)
    if name is None or label_column not in columns:
        lacking = label_column if name else _NAME_COLUMNS[0]
        logger.warning(
            "%s gives no labels: it has no column %r (its columns: %s).", file, lacking, listed(columns, limit=20)
        )
        return None
    return ((str(row[name]), row.get(label_column)) for row in rows if row.get(name))


def _json(file: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON ({error}): repair it, or move it away.") from error


def typed(labels: list[Any], file: str) -> list[Any]:
    """Labels as all integers, also where they are written as text, or all text.

    Raises:
        ValueError: anything else, which is named as what `file` holds.

    Example:
        >>> typed(["1", "0"], "metadata.csv")
        [1, 0]
    """
    if any(isinstance(each, bool) or not isinstance(each, int | str) or each == "" for each in labels):
        odd = next(each for each in labels if isinstance(each, bool) or not isinstance(each, int | str) or each == "")
        raise DataError(f"{file} must give one class id or name per image; it holds {odd!r}.")
    try:
        return [int(each) for each in labels]
    except ValueError:
        return list(map(str, labels))
