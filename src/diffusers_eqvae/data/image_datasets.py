"""Images from any Hugging Face dataset, folder or parquet directory, as PIL images and as pixels in [-1, 1]."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..classes import ClassTable, listed
from ..images import AnyImage, augmented, evenly_spaced, to_pixels
from ..provenance import SAMPLED_IMAGES, data_identity, require_same_data
from .array_images import Range, read_value_range
from .buckets import Buckets
from .image_files import DECODE_ERRORS, image_size, note_small, read_image
from .latent_store import LatentStore
from .report import DataError, DataReport
from .tar_files import is_member, member_name, member_size, read_member

logger = logging.getLogger(__name__)

MAX_UNREADABLE_SHARE = 0.01
MIN_UNREADABLE_ALLOWED = 3
# Headers that are looked at when a data set is opened.
START_CHECKS = 10_000
LABEL_COLUMN = "label"
# At the root of a saved model, pipeline or training run.
MODEL_FILES = ("config.json", "model_index.json", "run_metadata.json")


class ImageSource:
    """Images with labels; an image that cannot be read is named, counted and replaced by the next readable one.

    Args:
        dataset: rows {image_column: {"bytes": ..., "path": ...}} (a `datasets.Dataset` with undecoded images).
        image_column: column of the images.
        labels: (N,) int64 class ids, or None.
        names: class names by id, or None.
        root: folder that image names are given relative to.
        report: what was left out before; what is enlarged or replaced is added to it.
        channels: that images are read with: 3 for RGB, 1 for grey, 4 with transparency, or as many as they have.
        value_range: what is black and white in them, where value_range.json states it.

    More than 1 % unreadable images (at least 3 are allowed, a quarter of a smaller dataset) are an error: then
    something is wrong with the data as a whole.

    Example:
        >>> image, class_id = source.get(0)
    """

    def __init__(
        self,
        dataset: Any,
        *,
        image_column: str = "image",
        labels: np.ndarray | None = None,
        names: list[str] | None = None,
        root: Path | None = None,
        report: DataReport | None = None,
        channels: int = 3,
        value_range: Range | None = None,
    ) -> None:
        if not len(dataset):
            raise ValueError("The dataset holds no images; check the directory or the split.")
        self.dataset = dataset
        self.image_column = image_column
        self.labels = labels
        self.names = names
        self.root = root
        self.channels = channels
        self.value_range = value_range
        self.sizes: dict[int, tuple[int, int]] = {}
        self._report = DataReport() if report is None else report
        # In shared memory, so that the workers of a loader keep one count.
        self._unreadable = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    @cached_property
    def classes(self) -> ClassTable:
        """Names and counts by class id; empty without labels."""
        return ClassTable.of_labels(self.labels, self.names)

    @property
    def id2label(self) -> dict[int, str]:
        """Class names by id; ids without names are their own names; empty without labels."""
        return self.classes.id2label

    def name(self, index: int) -> str:
        """The image's file, or its row where the dataset keeps no file names."""
        return self._name(index, self.dataset[index][self.image_column])

    @property
    def unreadable(self) -> dict[int, str]:
        """Index -> name of the images that could not be read so far, by any worker."""
        return {index: self.name(index) for index in self._unreadable.nonzero().flatten().tolist()}

    @property
    def report(self) -> DataReport:
        """What was left out, is enlarged, and has been replaced so far."""
        text = "images cannot be read and are replaced by the next that can"
        self._report.note("unreadable", self.unreadable.values(), text, remedy="repair or remove them")
        return self._report

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Which images and labels these are: see `provenance.data_identity`."""
        return self._identity(everything=False)

    def full_identity(self) -> dict[str, Any]:
        """As `identity`, with "everything": every byte of the images."""
        return self._identity(everything=True)

    def _identity(self, *, everything: bool) -> dict[str, Any]:
        stated = {} if self.value_range is None else {"value_range": list(self.value_range)}
        return stated | data_identity(
            len(self),
            files=self._files(),
            labels=self.labels,
            classes=self.classes.id2label,
            sampled=map(self._content, evenly_spaced(len(self), SAMPLED_IMAGES)),
            everything=map(self._content, range(len(self))) if everything else None,
        )

    def _files(self) -> Iterator[tuple[str, int]] | None:
        """Names and sizes of the images' files; None where the rows hold the images."""
        if self.root is None or (self._record(0) or {}).get("path") is None or self._record(0)["bytes"] is not None:
            return None
        batches = self.dataset.iter(1000)  # many times faster than row by row
        records = enumerate(record for batch in batches for record in batch[self.image_column])
        return ((self._name(index, record), _size(record)) for index, record in records)

    def _content(self, index: int) -> bytes:
        record = self._record(index)
        try:
            content = _image_of(record)
            if isinstance(content, bytes):
                return content
            return Path(content).read_bytes() if _size(record) else b""
        except (ValueError, OSError):
            return b""

    def _record(self, index: int) -> Any:
        return self.dataset[index][self.image_column]

    def without(self, indices: list[int]) -> ImageSource:
        """The source without some of its images."""
        kept = np.setdiff1d(np.arange(len(self)), indices)
        if not len(kept):
            raise DataError(f"All {len(self)} images would be left out: {listed(list(map(self.name, indices[:6])))}.")
        labels = None if self.labels is None else self.labels[kept]
        rest = ImageSource(
            self.dataset.select(kept),
            image_column=self.image_column,
            labels=labels,
            names=list(self.classes.names) if labels is not None else None,
            root=self.root,
            report=self._report,
            channels=self.channels,
            value_range=self.value_range,
        )
        rest.sizes = {new: self.sizes[old] for new, old in enumerate(kept.tolist()) if old in self.sizes}
        rest._unreadable[:] = self._unreadable[torch.from_numpy(kept)]
        return rest

    def expect(self, resolution: int) -> None:
        """Notes and says which images are smaller than `resolution` px and will be enlarged."""
        small = {self.name(index): min(size) for index, size in self.sizes.items() if min(size) < resolution}
        note_small(self._report, small, resolution, seen=len(self.sizes), total=len(self))

    def get(self, index: int) -> tuple[AnyImage, int | None]:
        """The image and class id at `index`, or those of the next readable image."""
        image, label, _ = self.read(index)
        return image, label

    def read(self, index: int) -> tuple[AnyImage, int | None, int]:
        """As `get`, with the index that was used: index..used-1 (modulo N) are unreadable."""
        for offset in range(len(self)):
            used = (index + offset) % len(self)
            if self._unreadable[used]:
                continue
            record = self._record(used)
            try:
                image = read_image(_image_of(record), self.channels, self.value_range)
            except DataError:
                raise  # which would be said of every image
            except DECODE_ERRORS as error:
                self._count_unreadable(used, self._name(used, record), error)
                continue
            return image, None if self.labels is None else int(self.labels[used]), used
        raise DataError("None of the images can be read.")

    def check(
        self, limit: int = START_CHECKS, progress: Callable[[list[int]], Iterable[int]] = lambda indices: indices
    ) -> None:
        """Opens up to `limit` evenly spaced images (their headers only), so that bad data fails at the start.

        None is opened twice; `progress` goes through their indices, such as a progress bar.
        """
        for index in progress(evenly_spaced(len(self), limit)):
            if index in self.sizes or self._unreadable[index]:
                continue
            record = self._record(index)
            try:
                self.sizes[index] = image_size(_image_of(record), self.channels, self.value_range)
            except DataError:
                raise
            except DECODE_ERRORS as error:
                self._count_unreadable(index, self._name(index, record), error)

    def _name(self, index: int, record: Any) -> str:
        path = record.get("path") if isinstance(record, dict) else None
        if not path:
            return f"row {index}"
        path = member_name(path)
        prefix = f"{self.root}{os.sep}"  # of text: a `Path` of every file would take longer than all else
        return path.removeprefix(prefix) if path.startswith(prefix) else os.path.basename(path)

    def _count_unreadable(self, index: int, name: str, error: Exception) -> None:
        self._unreadable[index] = True
        count = int(self._unreadable.sum())
        logger.warning("Skipped image %s (%d so far): %s", name, count, error)
        allowed = max(int(MAX_UNREADABLE_SHARE * len(self)), min(MIN_UNREADABLE_ALLOWED, len(self) // 4))
        if count > allowed:
            raise DataError(
                f"At most {allowed} of the {len(self)} images may be unreadable, but {count} are, among them "
                f"{listed(list(self.unreadable.values()))}. Last reason: {error}. Repair or remove them."
            ) from error


def _image_of(record: Any) -> bytes | str:
    """The bytes or the path of a dataset's row; bytes of an image in a tar."""
    if not isinstance(record, dict) or (record.get("bytes") is None and not record.get("path")):
        raise ValueError("the row holds no image")
    if record.get("bytes") is not None:
        return bytes(record["bytes"])
    return read_member(record["path"]) if is_member(record["path"]) else record["path"]


def _size(record: Any) -> int:
    """Of a row's file, 0 where it is not a regular one."""
    try:
        if is_member(record["path"]):
            return member_size(record["path"])
        status = os.stat(record["path"])
        return status.st_size if stat.S_ISREG(status.st_mode) else 0
    except (KeyError, TypeError, OSError):
        return 0


class PixelDataset(Dataset):
    """Square pixels of an `ImageSource`: {"pixel_values": (C, S, S) in [-1, 1], "class_labels": id where labelled}.

    Args:
        source: the images.
        resolution: S in pixels.
        random_crop: a random crop of 0.5..1 of the short side where a generator is given; else the ADM centre crop.
        random_flip: mirror half of the images left to right where a generator is given.
        features: a store of the same images whose features ("features.NAME" of those that it reads) stand beside them;
            then there are centre crops only, and mirror images where it holds them.
        buckets: the shape of each image where a generator is given: (C, H, W) in the place of squares.

    Indexing (`dataset[i]`) is deterministic; `get(i, generator)` augments.

    Example:
        >>> PixelDataset(source, resolution=256)[0]["pixel_values"].shape
        torch.Size([3, 256, 256])
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        resolution: int,
        random_crop: bool = False,
        random_flip: bool = False,
        features: LatentStore | None = None,
        buckets: Buckets | None = None,
    ) -> None:
        self.source = source
        self.buckets = buckets
        self.resolution = resolution
        self.random_crop = random_crop
        self.random_flip = random_flip
        source.expect(resolution)
        self.features = features
        if features is not None:
            self._require_fitting(features)

    def _require_fitting(self, store: LatentStore) -> None:
        """Refuses a store of other images, or of other views of them."""
        whose, remedy = f"the store {store.path}", "store the features of these images, or compute them on the way"
        require_same_data(store.settings.source, self.source.identity, whose=whose, remedy=remedy)
        for wrong, what in (
            (self.random_crop, "centre crops, and these are random ones"),
            (self.buckets is not None, "squares, and these are rectangles"),
            (store.settings.resolution != self.resolution, f"{store.settings.resolution} px, not {self.resolution}"),
            (self.random_flip and store.settings.views < 2, "images that were not mirrored, and half of these are"),
        ):
            if wrong:
                raise ValueError(f"The features in {store.path} are those of {what}; {remedy}.")

    @property
    def identity(self) -> dict[str, Any]:
        """Of the source, and of the buckets that its images lie in; whatever else they are cropped to."""
        return self.source.identity | ({} if self.buckets is None else {"buckets": self.buckets.identity})

    @property
    def shortest_px(self) -> int:
        """Of all sides of what `get` gives."""
        return self.resolution if self.buckets is None else min(self.resolution, self.buckets.shortest_px)

    def __len__(self) -> int:
        return len(self.source)

    def first(self, count: int) -> Iterator[Tensor]:
        """Centre crops (C, S, S) of the first `count` images."""
        return (self[index]["pixel_values"] for index in range(min(count, len(self))))

    def evenly(self, count: int) -> Iterator[Tensor]:
        """Centre crops (C, S, S) of `count` evenly spaced images."""
        return (self[index]["pixel_values"] for index in evenly_spaced(len(self), count))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.get(index)

    def get(self, index: int, generator: np.random.Generator | None = None) -> dict[str, Any]:
        """The example at `index`, augmented from `generator`."""
        image, label = self.source.get(index)
        size = self.resolution if generator is None or self.buckets is None else self.buckets.shape(index)
        options = {"random_crop": self.random_crop, "random_flip": self.random_flip}
        image, mirrored = augmented(image, size, generator, **options)
        example: dict[str, Any] = {"pixel_values": to_pixels(image, self.source.channels)}
        if self.features is not None:
            stored = self.features.get_many([index], view=int(mirrored))
            example |= {name: values[0] for name, values in stored.items() if name.startswith("features.")}
        if label is not None:
            example["class_labels"] = label
        return example


def load_image_dataset(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | Path | None = None,
    split: str = "train",
    image_column: str = "image",
    label_column: str = LABEL_COLUMN,
    require_labels: bool = False,
    cache_dir: str | None = None,
    skip_below: int | None = None,
    channels: int = 3,
) -> ImageSource:
    """Images of a Hub dataset, of a folder (one subfolder per class), or of parquet or tar files.

    Args:
        dataset_name: name on the Hub, or a local directory; exclusive with `train_data_dir`.
        dataset_config_name: configuration of a Hub dataset.
        train_data_dir: local directory of images (their labels in class folders, dataset.json or metadata.jsonl), of
            parquet files or webdataset tars; one that `save_to_disk` wrote; or one .parquet or .tar file.
        split: split to read.
        image_column, label_column: columns; a `label_column` other than the default must exist.
        require_labels: refuse a dataset without labels.
        cache_dir: of the `datasets` library.
        skip_below: leave out images whose shorter side has fewer pixels.
        channels: that images are read with: 3 for RGB, 1 for grey, 4 with transparency. Any number of arrays
            (.npy), and 2 or 5 and more of the bands of all pages of image files.

    What is left out is logged and stands in the source's `report`. An unknown directory, split or column (the known
    ones are listed), an empty class folder, missing labels and too many unreadable images are refused.

    Example:
        >>> source = load_image_dataset(train_data_dir="photographs", require_labels=True)
        >>> len(source), source.id2label
        (1382, {0: 'daisy', 1: 'rose'})
    """
    if dataset_name is None and train_data_dir is None:
        raise ValueError("Say which images: give train_data_dir or dataset_name.")
    if dataset_name is not None and train_data_dir is not None:
        raise ValueError("Give either train_data_dir or dataset_name, not both.")
    root = Path(train_data_dir) if train_data_dir is not None else Path(str(dataset_name))
    if train_data_dir is not None and not root.exists():
        raise ValueError(f"The training directory {root} does not exist or is not a directory.")
    from .hf_datasets import load_table, read_labels, undecoded

    local, report = root.exists(), DataReport()
    table = load_table(
        root if local else str(dataset_name),
        config_name=dataset_config_name,
        split=split,
        cache_dir=cache_dir,
        label_column=label_column,
        report=report,
    )
    report.log()
    images = undecoded(table, image_column)
    required = require_labels or label_column != LABEL_COLUMN
    try:
        labels, names = read_labels(table, label_column, required=required)
    except ValueError as error:
        raise ValueError(" ".join([str(error), *map(str, filter(None, [report.notes.get("beside")]))])) from error
    source = ImageSource(
        images,
        image_column=image_column,
        labels=labels,
        names=names,
        root=root.resolve() if root.is_dir() else None,
        report=report,
        channels=channels,
        value_range=read_value_range(root) if root.is_dir() else None,
    )
    source = _checked(source, skip_below)
    if note := source.classes.describe_empty():
        logger.warning("%s", note)
    return source


def _checked(source: ImageSource, skip_below: int | None) -> ImageSource:
    """The source with its headers looked at; all of them where small images are left out."""
    source.check(START_CHECKS if skip_below is None else len(source))
    small = [index for index, size in source.sizes.items() if min(size) < (skip_below or 0)]
    if small:
        names = map(source.name, small)
        source._report.note("skipped", names, f"images smaller than {skip_below} px are left out", count=len(small))
        source._report.log("skipped")
        source = source.without(small)
    return source


def model_files(directory: Path) -> list[str]:
    """Those of `MODEL_FILES` that a directory holds; then its images and statistics are a model's.

    Example:
        >>> model_files(Path("runs/eq-vae"))
        ['config.json', 'run_facts.json']
    """
    return [name for name in MODEL_FILES if (directory / name).is_file()]
