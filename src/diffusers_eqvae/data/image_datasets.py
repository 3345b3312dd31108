"""Images from any Hugging Face dataset, folder or parquet directory, as PIL images and as pixels in [-1, 1]."""

from __future__ import annotations

import hashlib
import io
import logging
import struct
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from ..classes import ClassTable
from ..images import adm_center_crop, evenly_spaced, random_crop_resize, to_pixels, to_rgb

logger = logging.getLogger(__name__)

MIN_SIDE_PX = 8
MAX_UNREADABLE_SHARE = 0.01
MIN_UNREADABLE_ALLOWED = 3
START_CHECKS = 256
LABEL_COLUMN = "label"
# At the root of a saved model, pipeline or training run.
MODEL_FILES = ("config.json", "model_index.json", "run_metadata.json")
# What Pillow raises for files that are absent, cut short, no images, or hostile.
DECODE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, Image.DecompressionBombError)


class ImageSource:
    """Images with labels; an image that cannot be read is named, counted and replaced by the next readable one.

    Args:
        dataset: rows {image_column: {"bytes": ..., "path": ...}} (a `datasets.Dataset` with undecoded images).
        image_column: column of the images.
        labels: (N,) int64 class ids, or None.
        names: class names by id, or None.
        root: folder that image names are given relative to.

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
    ) -> None:
        if not len(dataset):
            raise ValueError("The dataset holds no images; check the directory or the split.")
        self.dataset = dataset
        self.image_column = image_column
        self.labels = labels
        self.names = names
        self.root = root
        self.unreadable: dict[int, str] = {}

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

    def files_digest(self) -> str | None:
        """sha256 of the names and sizes of the images' files, in order; None where the rows hold the images."""
        if self.root is None or self.dataset[0][self.image_column].get("bytes") is not None:
            return None
        digest = hashlib.sha256()
        for record in self.dataset[self.image_column]:
            path = Path(record["path"])
            digest.update(f"{path.relative_to(self.root).as_posix()}\0{path.stat().st_size}\n".encode())
        return digest.hexdigest()

    def get(self, index: int) -> tuple[Image.Image, int | None]:
        """The RGB image and class id at `index`, or those of the next readable image."""
        image, label, _ = self.read(index)
        return image, label

    def read(self, index: int) -> tuple[Image.Image, int | None, int]:
        """As `get`, with the index that was used: index..used-1 (modulo N) are unreadable."""
        for offset in range(len(self)):
            used = (index + offset) % len(self)
            if used in self.unreadable:
                continue
            record = self.dataset[used][self.image_column]
            try:
                image = _decode(record)
            except DECODE_ERRORS as error:
                self._count_unreadable(used, self._name(used, record), error)
                continue
            return image, None if self.labels is None else int(self.labels[used]), used
        raise ValueError("None of the images can be read.")

    def check(self, limit: int = START_CHECKS) -> None:
        """Opens up to `limit` evenly spaced images (their headers only), so that bad data fails at the start."""
        for index in evenly_spaced(len(self), limit):
            record = self.dataset[index][self.image_column]
            try:
                _open(record).close()
            except DECODE_ERRORS as error:
                self._count_unreadable(index, self._name(index, record), error)

    def _name(self, index: int, record: Any) -> str:
        path = record.get("path") if isinstance(record, dict) else None
        if not path:
            return f"row {index}"
        relative = self.root is not None and Path(path).is_relative_to(self.root)
        return str(Path(path).relative_to(self.root)) if relative and self.root else Path(path).name

    def _count_unreadable(self, index: int, name: str, error: Exception) -> None:
        self.unreadable[index] = name
        logger.warning("Skipped image %s (%d so far): %s", name, len(self.unreadable), error)
        allowed = max(int(MAX_UNREADABLE_SHARE * len(self)), min(MIN_UNREADABLE_ALLOWED, len(self) // 4))
        if len(self.unreadable) > allowed:
            listed = ", ".join(list(self.unreadable.values())[:5])
            raise ValueError(
                f"At most {allowed} of the {len(self)} images may be unreadable, but {len(self.unreadable)} are, "
                f"among them {listed}. Last reason: {error}. Repair or remove them."
            ) from error


def _open(record: Any) -> Image.Image:
    """The image of a dataset row with its header read; too small ones are refused."""
    if not isinstance(record, dict) or (record.get("bytes") is None and not record.get("path")):
        raise ValueError("the row holds no image")
    image = Image.open(io.BytesIO(record["bytes"]) if record.get("bytes") is not None else record["path"])
    if min(image.size) < MIN_SIDE_PX:
        image.close()
        raise ValueError(f"{image.width}x{image.height} px is smaller than {MIN_SIDE_PX} px")
    return image


def _decode(record: Any) -> Image.Image:
    with _open(record) as image:
        return to_rgb(image)


class PixelDataset(Dataset):
    """Square pixels of an `ImageSource`: {"pixel_values": (3, S, S) in [-1, 1], "class_labels": id where labelled}.

    Args:
        source: the images.
        resolution: S in pixels.
        random_crop: a random crop of 0.5..1 of the short side where a generator is given; else the ADM centre crop.
        random_flip: mirror half of the images left to right where a generator is given.

    Indexing (`dataset[i]`) is deterministic; `get(i, generator)` augments.

    Example:
        >>> PixelDataset(source, resolution=256)[0]["pixel_values"].shape
        torch.Size([3, 256, 256])
    """

    def __init__(
        self, source: ImageSource, *, resolution: int, random_crop: bool = False, random_flip: bool = False
    ) -> None:
        self.source = source
        self.resolution = resolution
        self.random_crop = random_crop
        self.random_flip = random_flip

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.get(index)

    def get(self, index: int, generator: np.random.Generator | None = None) -> dict[str, Any]:
        """The example at `index`, augmented from `generator`."""
        image, label = self.source.get(index)
        if generator is not None and self.random_crop:
            image = random_crop_resize(image, self.resolution, generator)
        else:
            image = adm_center_crop(image, self.resolution)
        if generator is not None and self.random_flip and generator.random() < 0.5:
            image = ImageOps.mirror(image)
        example: dict[str, Any] = {"pixel_values": to_pixels(image)}
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
) -> ImageSource:
    """Images of a Hub dataset, of a folder (one subfolder per class), or of a directory of parquet or tar files.

    Args:
        dataset_name: name on the Hub, or a local directory; exclusive with `train_data_dir`.
        dataset_config_name: configuration of a Hub dataset.
        train_data_dir: local directory of images, parquet files or webdataset tars.
        split: split to read.
        image_column, label_column: columns; a `label_column` other than the default must exist.
        require_labels: refuse a dataset without labels.
        cache_dir: of the `datasets` library.

    An unknown directory, split or column (the known ones are listed), an empty class folder, missing labels and too
    many unreadable images are refused.

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
    if train_data_dir is not None and not root.is_dir():
        raise ValueError(f"The training directory {root} does not exist or is not a directory.")
    from .hf_datasets import load_table, read_labels, undecoded

    local = root.is_dir()
    table = load_table(
        root if local else str(dataset_name), config_name=dataset_config_name, split=split, cache_dir=cache_dir
    )
    images = undecoded(table, image_column)
    labels, names = read_labels(table, label_column, required=require_labels or label_column != LABEL_COLUMN)
    source = ImageSource(
        images, image_column=image_column, labels=labels, names=names, root=root.resolve() if local else None
    )
    source.check()
    if note := source.classes.describe_empty():
        logger.warning("%s", note)
    return source


def model_files(directory: Path) -> list[str]:
    """Those of `MODEL_FILES` that a directory holds; then its images and statistics are a model's.

    Example:
        >>> model_files(Path("runs/eq-vae"))
        ['config.json', 'run_facts.json']
    """
    return [name for name in MODEL_FILES if (directory / name).is_file()]
