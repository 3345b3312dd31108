"""Tables of pictures through Hugging Face `datasets`: where they come from, their columns, their labels.

The only module of the package that imports `datasets`.
"""

from __future__ import annotations

import os
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

PICTURE_SUFFIXES = frozenset(Image.registered_extensions())


def load_table(
    source: Path | str, *, config_name: str | None = None, split: str = "train", cache_dir: str | None = None
) -> datasets.Dataset:
    """One split of a local directory (pictures, parquet or webdataset tars) or of a dataset on the Hub.

    Raises:
        ValueError: nothing to read, a class folder without pictures, or an unknown split (the known ones are listed).
    """
    if isinstance(source, Path):
        kind = _directory_kind(source)
        splits = datasets.load_dataset(kind, data_dir=str(source), cache_dir=cache_dir)
    else:
        splits = datasets.load_dataset(source, config_name, cache_dir=cache_dir)
    if split not in splits:
        raise ValueError(f"There is no split {split!r} in {source}; it has {', '.join(map(str, splits))}.")
    return splits[split]


def undecoded(table: datasets.Dataset, image_column: str) -> datasets.Dataset:
    """The picture column alone, as {"bytes": ..., "path": ...}, so that a broken picture raises in our hands.

    Raises:
        ValueError: the column does not exist or holds no pictures; the columns are listed.
    """
    if image_column not in table.column_names:
        raise ValueError(_unknown_column("image", image_column, table))
    pictures = table.select_columns([image_column])
    try:
        return pictures.cast_column(image_column, datasets.Image(decode=False))
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"The image column {image_column!r} holds {table.features[image_column]}, not pictures; "
            f"the columns are {', '.join(table.column_names)}."
        ) from error


def read_labels(
    table: datasets.Dataset, label_column: str, *, required: bool = False
) -> tuple[np.ndarray | None, list[str] | None]:
    """Class ids (N,) int64 and class names; text labels are numbered in sorted order.

    Returns (None, None) without labels, and no names for plain integers.

    Raises:
        ValueError: no such column although `required`, labels that are missing or negative (hidden test labels), or
            neither integers nor text.
    """
    if label_column not in table.column_names:
        if required:
            hint = " In a folder of pictures, each class needs its own subfolder." * (label_column == "label")
            raise ValueError(_unknown_column("label", label_column, table) + hint)
        return None, None
    feature = table.features[label_column]
    column = np.asarray(table[label_column][:])
    if column.dtype.kind in "US":
        names, column = np.unique(column, return_inverse=True)
        return column.astype(np.int64), names.tolist()
    if column.dtype.kind not in "iu" or column.ndim != 1:
        raise ValueError(
            f"The label column {label_column!r} must hold one integer or text per picture; it holds {feature}"
            f"{' with gaps' if column.dtype.kind in 'Of' else ''}. Name another with --label_column."
        )
    if len(column) and column.min() < 0:
        raise ValueError(f"The label column {label_column!r} holds {column.min()}: this split hides its labels.")
    return column.astype(np.int64), list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _unknown_column(role: str, name: str, table: datasets.Dataset) -> str:
    return f"There is no {role} column {name!r}; the columns are {', '.join(table.column_names)}."


def _directory_kind(directory: Path) -> str:
    """The `datasets` builder for a directory, by what it holds most of."""
    counts = {"imagefolder": 0, "parquet": 0, "webdataset": 0}
    empty = []
    for folder, subfolders, files in os.walk(directory):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith((".", "__")))
        suffixes = [Path(name).suffix.lower() for name in files]
        pictures = sum(suffix in PICTURE_SUFFIXES for suffix in suffixes)
        counts["imagefolder"] += pictures
        counts["parquet"] += suffixes.count(".parquet")
        counts["webdataset"] += suffixes.count(".tar")
        if not subfolders and not pictures:
            empty.append(str(Path(folder).relative_to(directory)))
    kind = max(counts, key=lambda name: counts[name])
    if not counts[kind]:
        raise ValueError(f"The directory {directory} holds no pictures, parquet files or tar files.")
    if kind == "imagefolder" and empty:
        raise ValueError(
            f"Folder(s) without pictures in {directory}: {', '.join(sorted(empty))}. Every class needs pictures: "
            "fill or remove the folder."
        )
    return kind
