"""Tables of images through Hugging Face `datasets`: where they come from, their columns, their labels.

The only module of the package that imports `datasets`.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from ..classes import in_order

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)
SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# What a directory may hold, as the builders of `datasets` are called; the earlier one where it holds as many of both.
_KINDS = ("imagefolder", "parquet", "webdataset")


def load_table(
    source: Path | str, *, config_name: str | None = None, split: str = "train", cache_dir: str | None = None
) -> datasets.Dataset:
    """One split of a local directory (images, parquet or webdataset tars) or of a dataset on the Hub.

    Raises:
        ValueError: nothing to read, a class folder without images, or an unknown split (the known ones are listed).

    Example:
        >>> table = load_table(Path("photographs"), split="validation")
    """
    if not isinstance(source, Path):
        return _choose(datasets.load_dataset(source, config_name, cache_dir=cache_dir), split, source)
    kind = _directory_kind(source)
    if kind == "imagefolder":
        return _image_folder(source.resolve(), split)
    return _choose(datasets.load_dataset(kind, data_dir=str(source), cache_dir=cache_dir), split, source)


def _choose(splits: Mapping[Any, Any], split: str, source: Path | str) -> Any:
    if split not in splits:
        raise ValueError(f"There is no split {split!r} in {source}; it has {', '.join(map(str, splits))}.")
    return splits[split]


def undecoded(table: datasets.Dataset, image_column: str) -> datasets.Dataset:
    """The image column alone, as {"bytes": ..., "path": ...}, so that a broken image raises in our hands.

    Raises:
        ValueError: the column does not exist or does not hold images; the columns are listed.

    Example:
        >>> undecoded(table, "image")[0]["image"]["path"]
        'photographs/daisy/0001.jpg'
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
    """Class ids (N,) int64 and class names; text labels are numbered in the order of `classes.in_order`.

    Returns (None, None) without labels, and no names for plain integers.

    Raises:
        ValueError: no such column although `required`, labels that are missing or negative (hidden test labels), or
            neither integers nor text.

    Example:
        >>> labels, names = read_labels(table, "label")
        >>> names[labels[0]]
        'daisy'
    """
    if label_column not in table.column_names:
        if required:
            hint = " In a folder of images, each class needs its own subfolder." * (label_column == "label")
            raise ValueError(_unknown_column("label", label_column, table) + hint)
        return None, None
    feature = table.features[label_column]
    column = np.asarray(table[label_column][:])
    if column.dtype.kind in "US":
        names = in_order(column.tolist())
        ids = {name: each for each, name in enumerate(names)}
        return np.array([ids[name] for name in column.tolist()], dtype=np.int64), names
    if column.dtype.kind not in "iu" or column.ndim != 1:
        raise ValueError(
            f"The label column {label_column!r} must hold one integer or text per image; it holds {feature}"
            f"{' with gaps' if column.dtype.kind in 'Of' else ''}. Name another as label_column."
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
    top = _choose(_split_folders(root) or {"train": root}, split, root)
    paths = sorted(str(path) for path in image_files(top))
    columns: dict[str, list] = {"image": paths}
    features = datasets.Features({"image": datasets.Image()})
    folders = [Path(path).relative_to(top).parts[0] for path in paths if Path(path).parent != top]
    if len(folders) == len(paths):
        columns["label"], features["label"] = folders, datasets.ClassLabel(names=in_order(folders))
    return datasets.Dataset.from_dict(columns, features=features)


def _split_folders(root: Path) -> dict[str, Path]:
    """The split folders by name, where all subfolders are named like splits and one holds class folders."""
    _, names, files = next(_walk(root))
    if not names or not set(names) <= SPLIT_FOLDERS.keys():
        return {}
    folders = {SPLIT_FOLDERS[name]: root / name for name in sorted(names, key=SPLIT_FOLDERS.__getitem__)}
    if not any(map(is_image, files)) and any(
        path.parent != folder for folder in folders.values() for path in image_files(folder)
    ):
        return folders
    logger.warning("%s: the folders %s are read as classes; splits would hold class folders.", root, ", ".join(names))
    return {}


def image_files(directory: Path) -> Iterator[Path]:
    """Files below a directory whose names end as images' do, through links, without hidden ones.

    Example:
        >>> sorted(image_files(Path("photographs")))[0]
        PosixPath('photographs/daisy/0001.jpg')
    """
    return (folder / name for folder, _, files in _walk(directory) for name in files if is_image(name))


def is_image(name: str) -> bool:
    """Whether a file's name ends as images' do and is not hidden, as some systems put beside them.

    Example:
        >>> is_image("0001.JPG"), is_image("._0001.jpg"), is_image("labels.csv")
        (True, False, False)
    """
    return not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES


def _walk(directory: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """As os.walk, through links, without hidden files and folders."""
    for folder, subfolders, files in os.walk(directory, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith((".", "__")))
        yield Path(folder), subfolders, [name for name in files if not name.startswith(".")]


def _directory_kind(directory: Path) -> str:
    """Which of `_KINDS` a directory holds most of."""
    builders = {".parquet": "parquet", ".tar": "webdataset"}
    counts: Counter[str | None] = Counter()
    empty = []
    for folder, subfolders, files in _walk(directory):
        kinds = ["imagefolder" if is_image(name) else builders.get(Path(name).suffix.lower()) for name in files]
        counts.update(kinds)
        if not subfolders and "imagefolder" not in kinds:
            empty.append(str(folder.relative_to(directory)))
    kind = max(_KINDS, key=lambda name: counts[name])
    if not counts[kind]:
        raise ValueError(f"The directory {directory} holds no images, parquet files or tar files.")
    if kind == "imagefolder" and empty:
        raise ValueError(
            f"Folder(s) without images in {directory}: {', '.join(sorted(empty))}. Every class needs images: "
            "fill or remove the folder."
        )
    return kind
