"""Tables of images through Hugging Face `datasets`: where they come from, their columns, their labels.

The only module of the package that imports `datasets`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)
SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def load_table(
    source: Path | str, *, config_name: str | None = None, split: str = "train", cache_dir: str | None = None
) -> datasets.Dataset:
    """One split of a local directory (images, parquet or webdataset tars) or of a dataset on the Hub.

    Raises:
        ValueError: nothing to read, a class folder without images, or an unknown split (the known ones are listed).
    """
    if isinstance(source, Path):
        kind = _directory_kind(source)
        if kind == "imagefolder":
            return _image_folder(source, split)
        splits = datasets.load_dataset(kind, data_dir=str(source), cache_dir=cache_dir)
    else:
        splits = datasets.load_dataset(source, config_name, cache_dir=cache_dir)
    if split not in splits:
        raise ValueError(f"There is no split {split!r} in {source}; it has {', '.join(map(str, splits))}.")
    return splits[split]


def undecoded(table: datasets.Dataset, image_column: str) -> datasets.Dataset:
    """The image column alone, as {"bytes": ..., "path": ...}, so that a broken image raises in our hands.

    Raises:
        ValueError: the column does not exist or holds no images; the columns are listed.
    """
    if image_column not in table.column_names:
        raise ValueError(_unknown_column("image", image_column, table))
    images = table.select_columns([image_column])
    try:
        return images.cast_column(image_column, datasets.Image(decode=False))
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"The image column {image_column!r} holds {table.features[image_column]}, not images; "
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
            hint = " In a folder of images, each class needs its own subfolder." * (label_column == "label")
            raise ValueError(_unknown_column("label", label_column, table) + hint)
        return None, None
    feature = table.features[label_column]
    column = np.asarray(table[label_column][:])
    if column.dtype.kind in "US":
        names, column = np.unique(column, return_inverse=True)
        return column.astype(np.int64), names.tolist()
    if column.dtype.kind not in "iu" or column.ndim != 1:
        raise ValueError(
            f"The label column {label_column!r} must hold one integer or text per image; it holds {feature}"
            f"{' with gaps' if column.dtype.kind in 'Of' else ''}. Name another with --label_column."
        )
    if len(column) and column.min() < 0:
        raise ValueError(f"The label column {label_column!r} holds {column.min()}: this split hides its labels.")
    return column.astype(np.int64), list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _unknown_column(role: str, name: str, table: datasets.Dataset) -> str:
    return f"There is no {role} column {name!r}; the columns are {', '.join(table.column_names)}."


def _image_folder(root: Path, split: str) -> datasets.Dataset:
    """The images below a directory in the order of their paths; with "label" where each lies in a class folder.

    The files are listed here since the library's own "imagefolder" reads splits out of any file or folder name
    (train_1.jpg, a class called test) and leaves out images that a metadata.csv does not name.
    """
    root = root.resolve()
    folders = _split_folders(root) or {"train": root}
    if split not in folders:
        raise ValueError(f"There is no split {split!r} in {root}; it has {', '.join(sorted(folders))}.")
    top = folders[split]
    paths = sorted(str(path) for path in image_files(top))
    columns: dict[str, list] = {"image": paths}
    features = datasets.Features({"image": datasets.Image()})
    parents = [Path(path).relative_to(top).parts[:-1] for path in paths]
    if all(parents):
        names = sorted({parts[0] for parts in parents})
        columns["label"] = [parts[0] for parts in parents]
        features["label"] = datasets.ClassLabel(names=names)
    return datasets.Dataset.from_dict(columns, features=features)


def _split_folders(root: Path) -> dict[str, Path]:
    """The split folders by name, where all subfolders are named like splits and one holds class folders."""
    _, names, files = next(_walk(root))
    folders = {SPLIT_FOLDERS[name]: root / name for name in names if name in SPLIT_FOLDERS}
    if not folders or len(folders) < len(names):
        return {}
    holds_classes = any(path.parent != folder for folder in folders.values() for path in image_files(folder))
    if holds_classes and not any(is_image(name) for name in files):
        return folders
    logger.warning(
        "%s: the folders %s are read as classes; splits would hold class folders.", root, ", ".join(sorted(names))
    )
    return {}


def image_files(directory: Path) -> Iterator[Path]:
    """Files below a directory whose names end as images' do, through links, without hidden ones."""
    return (folder / name for folder, _, files in _walk(directory) for name in files if is_image(name))


def is_image(name: str) -> bool:
    """Whether a file's name ends as images' do; hidden files, which some systems put beside them, are none."""
    return not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES


def _walk(directory: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """As os.walk, through links, without hidden files and folders."""
    for folder, subfolders, files in os.walk(directory, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith((".", "__")))
        yield Path(folder), subfolders, [name for name in files if not name.startswith(".")]


def _directory_kind(directory: Path) -> str:
    """What a directory holds most of: "imagefolder", or the `datasets` builder "parquet" or "webdataset"."""
    counts = {"imagefolder": 0, "parquet": 0, "webdataset": 0}
    empty = []
    for folder, subfolders, files in _walk(directory):
        suffixes = [Path(name).suffix.lower() for name in files]
        images = sum(map(is_image, files))
        counts["imagefolder"] += images
        counts["parquet"] += suffixes.count(".parquet")
        counts["webdataset"] += suffixes.count(".tar")
        if not subfolders and not images:
            empty.append(str(folder.relative_to(directory)))
    kind = max(counts, key=lambda name: counts[name])
    if not counts[kind]:
        raise ValueError(f"The directory {directory} holds no images, parquet files or tar files.")
    if kind == "imagefolder" and empty:
        raise ValueError(
            f"Folder(s) without images in {directory}: {', '.join(sorted(empty))}. Every class needs images: "
            "fill or remove the folder."
        )
    return kind
