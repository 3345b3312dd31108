"""Image files: which there are below a directory, each once, and opening one after a look at what it claims to be."""

from __future__ import annotations

import io
import os
import stat
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..images import MODES, AnyImage, evenly_spaced, to_channels, upright_size
from .array_images import Range, array_size, is_array, read_array, read_pages
from .report import DataError, DataReport

IMAGE_SUFFIXES = frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)
# What lies beside images as a matter of course, and is no image left out.
_COMPANIONS = """
    .txt .json .jsonl .csv .tsv .md .rst .yaml .yml .xml .html .log .ini .cfg .caption .db .sha256 .md5 .py .parquet
    .tar .npy .npz .pt .pth .safetensors .mat .pkl .cache
"""
COMPANIONS = frozenset(_COMPANIONS.split())
COMPANION_NAMES = frozenset({"readme", "license", "licence", "checksums", "copying", "authors"})
MIN_SIDE_PX = 8
MAX_RATIO = 100
# A deflate stream, a broken header or a field of metadata can raise nearly anything.
DECODE_ERRORS = (Exception,)


@dataclass
class ImageFiles:
    """What lies below a directory, through links, without hidden files.

    Args:
        directory: it.
        images: paths of images as text, sorted; no file twice.
        kinds: number of files by ending, of those that are not images.
        empty: folders that hold neither images nor folders.
        report: what was left out.
    """

    directory: Path
    images: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    empty: list[str] = field(default_factory=list)
    report: DataReport = field(default_factory=DataReport)

    def require_mostly_taken(self) -> None:
        """Refuses a directory of which more was left out than taken."""
        left_out = self.report.count("ending", "unusable")
        if left_out > len(self.images):
            why = " ".join(
                str(self.report.notes[kind]) for kind in ("ending", "unusable") if kind in self.report.notes
            )
            raise DataError(
                f"More files of {self.directory} would be left out than taken: {left_out}, and {len(self.images)} "
                f"images. {why}"
            )


def find_images(directory: str | os.PathLike[str], suffixes: Container[str] = IMAGE_SUFFIXES) -> ImageFiles:
    """The images below a directory, and a report of what is left out of it.

    A file or folder that several names lead to counts once, under its own name before that of a link. Left out, and
    named, are links that lead nowhere, what is not a regular file, names that are not UTF-8, and files whose names do
    not end as images' do, in one of `suffixes`; ordinary companions (.txt, .json, ...) are not worth a word.

    Example:
        >>> find_images("photographs").images[0]
        'photographs/daisy/0001.jpg'
    """
    return _Search(Path(directory), suffixes).run()


class _Search:
    def __init__(self, root: Path, suffixes: Container[str]) -> None:
        self.found, self.suffixes = ImageFiles(root), suffixes
        self.root, self.real = root, os.path.realpath(root)
        self.seen: set[tuple[int, int]] = set()
        self.links: list[str] = []
        self.leaves: list[str] = []
        self.other: list[str] = []
        self.twice: list[str] = []
        self.unusable: list[str] = []

    def run(self) -> ImageFiles:
        self._folder(str(self.root))
        while self.links:
            links, self.links = sorted(self.links), []
            for link in links:
                self._link(link)
        found, report = self.found, self.found.report
        found.images.sort()
        filled = {os.path.dirname(path) for path in found.images}
        found.empty = sorted(self._name(leaf) for leaf in self.leaves if leaf not in filled)
        endings = Counter(os.path.splitext(name)[1].lower() or "without ending" for name in self.other)
        kinds = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(5))
        report.note(
            "ending",
            map(self._name, sorted(self.other)),
            f"files are left out, since their names do not end as those of images that can be read: {kinds}",
            remedy="convert them, or rename them if only the ending is missing",
        )
        report.note("duplicate", map(self._name, self.twice), "names lead to what is taken already and are left out")
        report.note(
            "unusable",
            map(self._name, self.unusable),
            "names are left out: links that lead nowhere, what is not a regular file, or names that are not UTF-8",
            remedy="repair or remove them",
        )
        return found

    def _name(self, path: str) -> str:
        relative = os.path.relpath(path, self.root)
        return relative.encode("utf-8", "backslashreplace").decode()

    def _first(self, status: os.stat_result) -> bool:
        """Whether this file or folder comes for the first time; systems without inode numbers cannot say."""
        key = (status.st_dev, status.st_ino)
        if status.st_ino and key in self.seen:
            return False
        self.seen.add(key)
        return True

    def _folder(self, path: str) -> None:
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError:
            self.unusable.append(path)
            return
        self._first(os.stat(path))
        shown = [entry for entry in entries if not entry.name.startswith((".", "__MACOSX", "__pycache__"))]
        folders = []
        for entry in shown:
            if entry.is_symlink():
                self.links.append(entry.path)
                folders += [entry.path] if entry.is_dir() else []
            elif entry.is_dir():
                folders.append(entry.path)
                self._folder(entry.path)
            else:
                self._file(entry.path, entry.stat())
        if not folders:
            self.leaves.append(path)

    def _link(self, path: str) -> None:
        try:
            status, target = os.stat(path), os.path.realpath(path)
        except OSError:
            self.unusable.append(path)
            return
        if not stat.S_ISDIR(status.st_mode):
            self._file(path, status)
        elif os.path.commonpath([target, self.real]) == target or not self._first(status):
            self.twice.append(path)
        else:
            self._folder(path)

    def _file(self, path: str, status: os.stat_result) -> None:
        stem, suffix = os.path.splitext(os.path.basename(path).lower())
        if suffix not in self.suffixes:
            self.found.kinds[suffix] += 1
            if suffix not in COMPANIONS and stem not in COMPANION_NAMES:
                self.other.append(path)
        elif not stat.S_ISREG(status.st_mode) or not _is_text(path):
            self.unusable.append(path)
        elif self._first(status):
            self.found.images.append(path)
        else:
            self.twice.append(path)


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def open_image(source: Any, *, smallest: int = MIN_SIDE_PX) -> Image.Image:
    """An image with its header read, of a path or of bytes; refused for what it claims before anything is decoded.

    Raises:
        ValueError: not a regular file, smaller than `smallest` px, or longer than 100 times its short side.
    """
    if not isinstance(source, bytes) and not stat.S_ISREG(os.stat(source).st_mode):
        raise ValueError("it is not a regular file")
    image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    try:
        _require_usable(*image.size, smallest)
    except ValueError:
        image.close()
        raise
    return image


def _require_usable(width: int, height: int, smallest: int = MIN_SIDE_PX) -> None:
    short, long = sorted((width, height))
    if short < smallest or long > MAX_RATIO * short:
        limit = f"smaller than {smallest} px" if short < smallest else f"longer than {MAX_RATIO} times its short side"
        raise ValueError(f"{width}x{height} px is {limit}")


def image_size(source: Any, channels: int = 3, value_range: Range | None = None) -> tuple[int, int]:
    """Width and height of an image that `read_image` reads, upright, of its header.

    Example:
        >>> image_size("photographs/daisy/0001.jpg")
        (640, 480)
    """
    if is_array(source):
        width, height = array_size(str(source), channels, value_range)
        _require_usable(width, height)
        return width, height
    with open_image(source) as image:
        return upright_size(image)


def read_image(source: Any, channels: int = 3, value_range: Range | None = None) -> AnyImage:
    """An image as RGB, grey or RGBA, of a path or of bytes; see `open_image` and `images.to_channels`.

    Of an array (.npy), of images with 2 or 5 and more channels, and where a range is stated, the bands: see
    `read_array` and `read_pages`.
    """
    if is_array(source):
        bands = read_array(str(source), channels, value_range)
        _require_usable(*bands.size)
        return bands
    with open_image(source) as image:
        ordinary = channels in MODES and value_range is None
        return to_channels(image, channels) if ordinary else read_pages(image, channels, value_range)


def image_files(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Paths of the images below a directory, sorted; what is left out is logged, and refused where it is most.

    Example:
        >>> next(image_files("photographs"))
        PosixPath('photographs/daisy/0001.jpg')
    """
    found = find_images(directory)
    found.require_mostly_taken()
    found.report.log()
    return map(Path, found.images)


def class_folders(root: str | os.PathLike[str], images: Iterable[str]) -> list[str]:
    """The folder below `root` that each image lies in, which is its class; "" of those that lie beside the folders.

    Example:
        >>> class_folders("photographs", ["photographs/daisy/0001.jpg", "photographs/preview.png"])
        ['daisy', '']
    """
    parts = (os.path.relpath(each, root).partition(os.sep) for each in images)
    return [name if inside else "" for name, inside, _ in parts]


def note_small(report: DataReport, small: Mapping[str, int], resolution: int, *, seen: int, total: int) -> None:
    """Notes, and says, that images (name -> shorter side) are enlarged to `resolution` px, of `seen` looked at."""
    before = report.notes.get("small")
    report.note(
        "small",
        small,
        f"of {seen} images{' looked at' * (seen < total)} are smaller than {resolution} px and are enlarged by up to "
        f"{resolution / min(small.values(), default=resolution):.1f}x",
        remedy="leave them out (skip_small), or choose a smaller resolution",
    )
    if report.notes.get("small") != before:
        report.log("small")


def sizes_of(images: Sequence[str | os.PathLike[str]], *, limit: int) -> dict[str, int]:
    """Shorter side by path of up to `limit` evenly spaced images, of those whose header can be read."""
    sizes = {}
    for index in evenly_spaced(len(images), limit):
        with suppress(*DECODE_ERRORS), open_image(images[index]) as image:
            sizes[str(images[index])] = min(image.size)
    return sizes
