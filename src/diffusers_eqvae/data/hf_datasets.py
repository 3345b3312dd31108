"""Tables of images through Hugging Face `datasets`: where they come from, their columns, their labels.

The only module of the package that imports `datasets`.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from fsspec.core import url_to_fs

from ..classes import in_order, listed
from .array_images import ARRAY_SUFFIX
from .image_files import IMAGE_SUFFIXES, ImageFiles, class_folders, find_images
from .label_files import read_label_files, typed
from .report import DataError, DataReport
from .tar_files import read_tars

logger = logging.getLogger(__name__)

SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# What a directory may hold, as the builders of `datasets` are called; the earlier one where it holds as many of both.
_KINDS = ("imagefolder", "parquet", "webdataset")
_BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
_ROWS_AT_ONCE = 8
_REMEDY = "unpack an archive and name the folder, whose dataset.json, metadata.jsonl or class folders give the labels"


def load_table(
    source: Path | str,
    *,
    config_name: str | None = None,
    split: str = "train",
    cache_dir: str | None = None,
    label_column: str = "label",
    report: DataReport | None = None,
) -> datasets.Dataset:
    """One split of a local directory or file, or of a dataset on the Hub.

    A directory holds images, parquet files, webdataset tars, what `save_to_disk` wrote, or none of these and
    arrays (.npy); a file is one parquet file or one tar. Of these, only parquet files are copied into the cache. What
    is left out is noted in `report`.

    Raises:
        ValueError: nothing to read, a class folder without images, or an unknown split (the known ones are listed).

    Example:
        >>> table = load_table(Path("photographs"), split="validation")
    """
    report = DataReport() if report is None else report
    if not isinstance(source, Path):
        return _choose(datasets.load_dataset(source, config_name, cache_dir=cache_dir), split, source)
    if source.is_file():
        builder = _builder_of(source)
        if builder is None:
            raise ValueError(f"{source} is a file, and only a .parquet or .tar file is read: {_REMEDY}.")
        return _read(builder, source, split, label_column, cache_dir)
    if _is_saved(source):
        saved = datasets.load_from_disk(str(source))
        return _choose(saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}, split, source)
    kind = _directory_kind(find_images(source), report)
    if kind in ("imagefolder", "arrays"):
        suffixes = IMAGE_SUFFIXES if kind == "imagefolder" else (ARRAY_SUFFIX,)
        return _image_folder(source.resolve(), split, label_column=label_column, report=report, suffixes=suffixes)
    return _read(kind, source, split, label_column, cache_dir)


def _read(builder: str, source: Path, split: str, label_column: str, cache_dir: str | None) -> datasets.Dataset:
    """Parquet files as `datasets` builds them, and tars where they lie; a sentence names what hinders that."""
    try:
        files = _files(builder, source, split)
        if builder == "webdataset":
            return _tar_table(files, label_column)
        return datasets.load_dataset(builder, data_files={split: files}, split=split, cache_dir=cache_dir)
    except DataError:
        raise
    except Exception as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise ValueError(
            f"{source} cannot be read as {builder} ({reason}): write the files again, or name another directory."
        ) from error


def _files(builder: str, source: Path, split: str) -> list[str]:
    """The parquet files or tars of one split; what else lies in their directory is none of them."""
    if source.is_file():
        return _choose({"train": [str(source)]}, split, source)
    found = datasets.load_dataset_builder(builder, data_dir=str(source.resolve())).config.data_files or {}
    kept = {name: [each for each in files if _builder_of(each) == builder] for name, files in found.items()}
    return _choose({name: files for name, files in kept.items() if files}, split, source)


def _builder_of(file: Path | str) -> str | None:
    return _BUILDERS.get(os.path.splitext(file)[1].lower())


def open_stream(
    source: Path | str,
    *,
    config_name: str | None = None,
    split: str = "train",
    cache_dir: str | None = None,
    image_column: str = "image",
) -> tuple[list[tuple[str, int]], Callable[[int, int], Iterator[Any]]]:
    """Names and sizes of the shards of one split, and rows(shard, first): the undecoded images of one in their order.

    Args:
        source: local parquet files, a name on the Hub, or http(s) addresses of .tar or .parquet files, of which
            `{000..099}` in the name of one stands for a hundred.

    Raises:
        ValueError: what lies on this disk in another form; an unknown split or image column; what cannot be opened.

    Example:
        >>> shards, rows = open_stream(Path("tables"))
        >>> next(rows(0, 5))["bytes"][:4]
        b'\\xff\\xd8\\xff\\xe0'
    """
    options: dict[str, Any] = {"path": source, "name": config_name}
    if isinstance(source, Path):
        _require_parquet(source)
        options = {"path": "parquet", "data_files": {split: _files("parquet", source, split)}}
    elif _is_address(source):
        kind = _builder_of(source)
        if kind is None:
            raise ValueError(f"{source} must end in .tar or .parquet to be streamed; name such files.")
        options = {"path": kind, "data_files": expand(source)}
    try:
        builder = datasets.load_dataset_builder(**options, cache_dir=cache_dir)
        files = list(_choose(builder.config.data_files or {}, split, source))
        table = builder.as_streaming_dataset(split)
        sizes = url_to_fs(files[0])[0].sizes(files)
    except Exception as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise ValueError(f"{source} cannot be opened as a stream: {reason}") from error
    images, root = undecoded(table, image_column), f"{source.resolve()}{os.sep}" if isinstance(source, Path) else ""
    if images.num_shards != len(files):
        raise ValueError(f"{source} is not made of tars or tables, and only these are streamed; download it.")

    def rows(shard: int, first: int) -> Iterator[Any]:
        one = images.shard(num_shards=len(files), index=shard)
        # By `iter`, which gives every worker of a DataLoader everything.
        batches = (one.skip(first) if first else one).iter(_ROWS_AT_ONCE)
        return (record for batch in batches for record in batch[image_column])

    # Without a commit on the Hub, which also changes with what is no data.
    names = [re.sub(r"@\w+", "", file.removeprefix(root)) for file in files]
    return list(zip(names, sizes, strict=True)), rows


def _require_parquet(source: Path) -> None:
    """Refuses to stream what is on this disk and read where it lies."""
    kind = _builder_of(source) if source.is_file() else "saved"
    if source.is_dir() and not _is_saved(source):
        kind = _directory_kind(find_images(source), DataReport())
    if kind != "parquet":
        raise ValueError(
            f"{source} is read where it lies, in any order and without a copy; of what is on this disk, only parquet "
            "files are streamed. Read it without streaming."
        )


def _is_saved(source: Path) -> bool:
    """Whether `save_to_disk` wrote a directory."""
    return (source / "dataset_dict.json").is_file() or (source / "state.json").is_file()


def _is_address(source: str) -> bool:
    return source.startswith(("http://", "https://"))


def expand(address: str) -> list[str]:
    """The addresses that `{000..099}` in one stands for.

    Example:
        >>> expand("https://host/{08..10}.tar")
        ['https://host/08.tar', 'https://host/09.tar', 'https://host/10.tar']
    """
    found = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", address)
    if found is None:
        return [address]
    before, first, last, after = found.groups()
    return [f"{before}{number:0{len(first)}d}{after}" for number in range(int(first), int(last) + 1)]


def _choose(splits: Mapping[Any, Any], split: str, source: Path | str) -> Any:
    if split not in splits:
        raise ValueError(f"There is no split {split!r} in {source}; it has {', '.join(map(str, splits))}.")
    return splits[split]


def _tar_table(tars: list[str], label_column: str) -> datasets.Dataset:
    """The samples of tars as a table of paths (see `read_tars`), with the labels of one column."""
    columns = read_tars(tars, label_column)
    features = {name: datasets.Value("string" if any(column) else "null") for name, column in columns.items()}
    images = [name for name, column in columns.items() if name != label_column and any(column)]
    if label_column in columns:
        labels: list[Any] = columns[label_column]
        if lacking := labels.count(None):
            raise DataError(
                f"{lacking} of the {len(labels)} samples in {listed(tars)} have no .{label_column}: each needs one, "
                "or name another label column."
            )
        columns[label_column] = labels = typed(labels, f"A member .{label_column}")
        features[label_column] = datasets.Value("int64" if isinstance(labels[0], int) else "string")
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    for name in images:
        table = table.cast_column(name, datasets.Image())
    return table


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
        if 2 * len(names) > len(column):
            logger.warning(
                "The label column %r holds %d different texts for %d images: are they captions? Each is a class "
                "of its own; name a column of classes as label_column.",
                label_column,
                len(names),
                len(column),
            )
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
    images = [key for key, feature in table.features.items() if isinstance(feature, datasets.Image)]
    remedy = f"name {' or '.join(images)} as image_column" if role == "image" and images else f"name the {role} column"
    return f"There is no {role} column {name!r}; the columns are {', '.join(table.column_names)}: {remedy}."


def _image_folder(
    root: Path, split: str, *, label_column: str, report: DataReport, suffixes: Container[str]
) -> datasets.Dataset:
    """The images below a directory in the order of their paths, with the labels of a file or of class folders.

    The files are listed here since the library's own "imagefolder" reads splits out of any file or folder name
    (train_1.jpg, a class called test) and leaves out images that a metadata.csv does not name.
    """
    top = _choose(_split_folders(root, suffixes) or {"train": root}, split, root)
    found = find_images(top, suffixes)
    found.require_mostly_taken()
    _refuse_empty(found)
    report.notes |= found.report.notes
    columns: dict[str, list] = {"image": found.images}
    features = datasets.Features({"image": datasets.Image()})
    labels = read_label_files(top, found.images, label_column)
    if labels:
        columns[label_column] = labels
        features[label_column] = datasets.Value("int64" if isinstance(labels[0], int) else "string")
    elif labels is None:
        folders = class_folders(top, found.images)
        beside = [path for path, folder in zip(found.images, folders, strict=True) if not folder]
        if not beside:
            columns["label"], features["label"] = folders, datasets.ClassLabel(names=in_order(folders))
        elif len(beside) < len(found.images):
            report.note(
                "beside",
                map(os.path.basename, beside),
                "images lie beside the class folders, so that no image has a label",
                remedy=f"move them into a class folder, or out of {top}",
            )
    return datasets.Dataset.from_dict(columns, features=features)


def _split_folders(root: Path, suffixes: Container[str]) -> dict[str, Path]:
    """The split folders by name, where all subfolders are named like splits and one holds class folders."""
    entries = [entry for entry in os.scandir(root) if not entry.name.startswith((".", "__"))]
    names = sorted(entry.name for entry in entries if entry.is_dir())
    if not names or not set(names) <= SPLIT_FOLDERS.keys():
        return {}
    folders = {SPLIT_FOLDERS[name]: root / name for name in sorted(names, key=SPLIT_FOLDERS.__getitem__)}
    if not any(is_image(entry.name, suffixes) for entry in entries if not entry.is_dir()) and any(
        os.path.dirname(path) != str(folder)
        for folder in folders.values()
        for path in find_images(folder, suffixes).images
    ):
        return folders
    logger.warning("%s: the folders %s are read as classes; splits would hold class folders.", root, ", ".join(names))
    return {}


def is_image(name: str, suffixes: Container[str] = IMAGE_SUFFIXES) -> bool:
    """Whether a file's name ends as images' do and is not hidden, as some systems put beside them.

    Example:
        >>> is_image("0001.JPG"), is_image("._0001.jpg"), is_image("labels.csv")
        (True, False, False)
    """
    return not name.startswith(".") and Path(name).suffix.lower() in suffixes


def _directory_kind(found: ImageFiles, report: DataReport) -> str:
    """Which of `_KINDS` a directory holds most of, the others are noted; "arrays" where it holds none of them."""
    counts = {"imagefolder": len(found.images), "parquet": found.kinds[".parquet"], "webdataset": found.kinds[".tar"]}
    kind = max(_KINDS, key=counts.__getitem__)
    if not counts[kind]:
        if found.kinds[ARRAY_SUFFIX]:
            return "arrays"
        _refuse_empty(found)
        seen = " ".join(found.report) or f"Its files end in {', '.join(found.kinds) or 'nothing: it is empty'}."
        raise ValueError(
            f"The directory {found.directory} holds no images, parquet files, tar files or arrays (.npy); name "
            f"one that does. {seen}"
        )
    others = sum(counts.values()) - counts[kind]
    if others:
        called = [f"{counts[each]} {each}" for each in _KINDS if each != kind and counts[each]]
        report.note("kind", called, f"files are left out, since the directory is read as {kind}", count=others)
    return kind


def _refuse_empty(found: ImageFiles) -> None:
    if found.empty and found.images:
        raise ValueError(
            f"Folder(s) without images in {found.directory}: {', '.join(found.empty)}. Every class needs images: "
            f"fill or remove the folder. {' '.join(found.report)}".rstrip()
        )
