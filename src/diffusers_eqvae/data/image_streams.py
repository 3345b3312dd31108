"""Images that come one after another: data sets too large to keep, in an order as exact as that of `data.order`.

Epoch e goes through the shards in the order permutation(seed, e), and through each from its first row to its last.
What comes is cut into blocks of `block_size` images (the last one of an epoch may be shorter), and the rows of block k
are shown sorted by raw words of Philox(seed, k). So draw n shows an image that is a function of (seed, n) and of the
data, each image comes once in an epoch, and no more than two blocks are in memory. Every process reads all of the
stream, and decodes only the images of its own draws.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from ..classes import listed
from ..images import AnyImage, augmented, evenly_spaced, to_pixels
from ..provenance import data_identity
from ..randomness import philox
from .array_images import Range, read_value_range
from .image_datasets import MAX_UNREADABLE_SHARE, MIN_UNREADABLE_ALLOWED
from .image_files import DECODE_ERRORS, read_image
from .order import DrawOrder, leave_interrupts
from .report import DataError, DataReport

logger = logging.getLogger(__name__)

_BLOCK_STREAM = 2  # Keeps the order of block k apart from that of epoch k and the augmentation of draw k.
_SPARES = 8  # Rows of each block that stand in for those that cannot be read.
_SAMPLED_ROWS = 8
_SAMPLED_SHARDS = 64


class Place(NamedTuple):
    """Where a block begins: in the epoch's order of shards, at a row; its number, and that of its first draw."""

    epoch: int = 0
    shard: int = 0
    row: int = 0
    block: int = 0
    draw: int = 0


BEGINNING = Place()


class Row(NamedTuple):
    """An image as the stream holds it, and what it is called in messages."""

    name: str
    record: Any


class ImageStream:
    """Shards of images, each of which can be read from any row to its last.

    Args:
        shards: names and sizes in bytes.
        rows: rows(shard, first) gives the records {"bytes": ..., "path": ...} of one from row `first` on.
        channels: that images are read with.
        value_range: what is black and white in them, where value_range.json states it.

    Of what a run reads, more than 1 % of unreadable images (at least 3 are allowed) are an error.

    Example:
        >>> next(stream.read(0)).name
        'row 0 of train-00000-of-00010.parquet'
    """

    def __init__(
        self,
        shards: Sequence[tuple[str, int]],
        rows: Callable[[int, int], Iterable[Any]],
        *,
        channels: int = 3,
        value_range: Range | None = None,
    ) -> None:
        self.shards, self.rows, self.channels = [name for name, _ in shards], rows, channels
        self.value_range = value_range
        self.skipped: dict[str, None] = {}
        self._seen, self._report = 0, DataReport()
        sampled = [_content(row.record) for row in islice(self.read(0), _SAMPLED_ROWS)]
        if sampled and not any(sampled):
            raise ValueError(
                f"The rows of {self.shards[0]} hold no bytes of images, only names of files; download the data set "
                "and name its folder."
            )
        whole = data_identity(len(shards), files=shards, labels=None, classes={}, sampled=sampled)
        self.identity = {"shards": len(shards), "files": whole["files"], "sampled": whole["sampled"]}
        self.identity |= {} if value_range is None else {"value_range": list(value_range)}

    def read(self, shard: int, first: int = 0) -> Iterator[Row]:
        """The rows of a shard from `first` on; whatever breaks off is an error that names the shard."""
        number, name = first, self.shards[shard]
        try:
            for number, record in enumerate(self.rows(shard, first), first):
                yield Row(f"row {number} of {name}", record)
        except Exception as error:  # of the network, of archives, of tables
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise DataError(
                f"The stream broke off in the shard {name} at about row {number} ({reason}). A lost connection: go on "
                "when it is there again. A damaged shard: mend it first."
            ) from error

    def blocks(self, seed: int, size: int, start: Place = BEGINNING) -> Iterator[tuple[Place, list[Row]] | None]:
        """The blocks from the beginning of one on, for ever, and None for each row that is read on the way."""
        order, place, rows = DrawOrder(len(self.shards), seed=seed), start, list[Row]()
        while True:
            shards = order.permutation(place.epoch).tolist()
            for number in range(place.shard, len(shards)):
                first = place.row if number == place.shard else 0
                for following, row in enumerate(self.read(shards[number], first), first + 1):
                    rows.append(row)
                    yield None
                    if len(rows) == size:
                        yield place, rows
                        place, rows = Place(place.epoch, number, following, place.block + 1, place.draw + size), []
            if rows:
                yield place, rows
            elif place.shard == place.row == 0:
                raise DataError(f"The {len(shards)} shards of the stream hold no images.")
            place, rows = Place(place.epoch + 1, 0, 0, place.block + bool(rows), place.draw + len(rows)), []

    def image(self, candidates: Iterable[Row]) -> tuple[AnyImage, list[str]]:
        """The first image that can be read, and the names of those before it that cannot."""
        skipped: list[str] = []
        for row in candidates:
            if (image := self.decoded(row)) is not None:
                return image, skipped
            skipped.append(row.name)
        raise DataError(f"None of the images {', '.join(skipped)} can be read; mend the stream.")

    def decoded(self, row: Row) -> AnyImage | None:
        """Of one row; None, and a warning, where it cannot be read."""
        try:
            return read_image(_content(row.record), self.channels, self.value_range)
        except DataError:
            raise  # which would be said of every image
        except DECODE_ERRORS as error:
            logger.warning("Skipped image %s: %s", row.name, error)
            return None

    def count(self, seen: int, skipped: Iterable[str]) -> None:
        """Notes images that were shown, and those that could not be read among them."""
        self._seen += seen
        self.skipped.update(dict.fromkeys(skipped))
        allowed = max(int(MAX_UNREADABLE_SHARE * self._seen), MIN_UNREADABLE_ALLOWED)
        if len(self.skipped) > allowed:
            raise DataError(
                f"At most {allowed} of {self._seen} images of a stream may be unreadable, but {len(self.skipped)} "
                f"are, the last of them {list(self.skipped)[-1]}. Mend the stream."
            )

    @property
    def report(self) -> DataReport:
        """What has been replaced so far."""
        text = "images cannot be read and were replaced by others of their block"
        self._report.note("unreadable", self.skipped, text, remedy="repair or remove them")
        return self._report


def _content(record: Any) -> bytes:
    if not isinstance(record, dict) or record.get("bytes") is None:
        return b""
    return bytes(record["bytes"])


class PixelStream:
    """What `PixelDataset` is of images at hand, of an `ImageStream`; in training, in blocks of `block_size` images.

    Example:
        >>> images = PixelStream(stream, resolution=256, block_size=1000)
        >>> next(images.evenly(16)).shape
        torch.Size([3, 256, 256])
    """

    def __init__(
        self,
        source: ImageStream,
        *,
        resolution: int,
        block_size: int = 1000,
        random_crop: bool = False,
        random_flip: bool = False,
    ) -> None:
        self.source, self.resolution, self.block_size, self.buckets = source, resolution, block_size, None
        self.options = {"random_crop": random_crop, "random_flip": random_flip}

    @property
    def identity(self) -> dict[str, Any]:
        """Of the source, whatever its images are cropped to."""
        return self.source.identity

    @property
    def shortest_px(self) -> int:
        """Of all sides of what is drawn."""
        return self.resolution

    def first(self, count: int) -> Iterator[Tensor]:
        """Centre crops (C, S, S) of the first `count` images that can be read."""
        rows = (row for shard in range(len(self.source.shards)) for row in self.source.read(shard))
        return islice(self._readable(rows), count)

    def evenly(self, count: int) -> Iterator[Tensor]:
        """As `first`, of the first images of up to 64 evenly spaced shards; fewer where those hold fewer."""
        shards = evenly_spaced(len(self.source.shards), _SAMPLED_SHARDS)
        rows = (row for shard in shards for row in islice(self.source.read(shard), -(-count // len(shards))))
        return islice(self._readable(rows), count)

    def _readable(self, rows: Iterable[Row]) -> Iterator[Tensor]:
        """Of these rows those that can be read; more that cannot, beyond a few, are an error."""
        found, broken = 0, list[str]()
        for row in rows:
            if (image := self.source.decoded(row)) is not None:
                found += 1
                yield self._pixels(image, None)
            else:
                broken.append(row.name)
            if len(broken) > found + MIN_UNREADABLE_ALLOWED:
                break
        else:
            if found:
                return
        raise DataError(f"Of {found + len(broken)} images {listed(broken)} cannot be read; mend the stream.")

    def example(self, draw: int, candidates: Iterable[Row], *, seed: int) -> tuple[dict[str, Tensor], list[str]]:
        """What draw n shows, and the names of images that could not be read for it."""
        image, skipped = self.source.image(candidates)
        return {"pixel_values": self._pixels(image, np.random.Generator(philox(seed, draw)))}, skipped

    def _pixels(self, image: AnyImage, generator: np.random.Generator | None) -> Tensor:
        return to_pixels(augmented(image, self.resolution, generator, **self.options)[0], self.source.channels)

    def loader(self, batch_size: int, *, num_workers: int = 0, pin_memory: bool = False, **order: Any) -> StreamLoader:
        """Endless batches as `data.order.draw_loader` gives them; `order` goes to `StreamDraws`."""
        draws = StreamDraws(self, batch_size, **order)
        if draws.start_batch:
            place, shards = draws.place, DrawOrder(len(self.source.shards), seed=draws.seed)
            logger.info(
                "The stream goes on in epoch %d in the shard %s, which is read over again up to row %d.",
                place.epoch,
                self.source.shards[shards.permutation(place.epoch)[place.shard]],
                place.row,
            )
        return StreamLoader(draws, num_workers=num_workers, pin_memory=pin_memory)


class StreamDraws(IterableDataset):
    """The batches of one rank, or every so many of them in one of its workers: (place, skipped, batch).

    Args:
        images: of the stream.
        batch_size: per rank.
        seed: of order and augmentation.
        rank, world_size: this process's place.
        start_batch: how many batches this rank has consumed before.
        place: where a block begins from which on to read; the draws before `start_batch` that it holds are left out.
    """

    def __init__(
        self,
        images: PixelStream,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_batch: int = 0,
        place: Sequence[int] | None = None,
    ) -> None:
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.rank, self.world_size, self.start_batch = rank, world_size, start_batch
        self.place = Place(*(place or ()))

    def __iter__(self) -> Iterator[tuple[Place, list[str], Any]]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        examples: list[dict[str, Tensor]] = []
        names: list[str] = []
        for place, draw, candidates in self._draws(worker, workers):
            example, skipped = self.images.example(draw, candidates, seed=self.seed)
            examples.append(example)
            names += skipped
            if len(examples) == self.batch_size:
                yield place, names, default_collate(examples)
                examples, names = [], []

    def _draws(self, worker: int, workers: int) -> Iterator[tuple[Place, int, list[Row]]]:
        """Own draws, each with its row and what may stand in for it; a row of the next block is read with each."""
        reading = self.images.source.blocks(self.seed, self.images.block_size, self.place)
        block: tuple[Place, list[Row]] | None = next(filter(None, reading))
        while block:
            (place, rows), block = block, None
            count, spares = len(rows), rows[:_SPARES]
            shown = np.argsort(philox(self.seed, place.block, _BLOCK_STREAM).random_raw(count), kind="stable")
            draws = range(place.draw, place.draw + count)
            own = {n: rows[row] for n, row in zip(draws, shown, strict=True) if self._is_own(n, worker, workers)}
            del rows
            for draw in draws:
                block = block or next(reading)
                if draw in own:
                    row, first = own.pop(draw), draw % len(spares)
                    yield place, draw, [row, *(each for each in spares[first:] + spares[:first] if each is not row)]
            block = block or next(filter(None, reading))

    def _is_own(self, draw: int, worker: int, workers: int) -> bool:
        batch, rank = divmod(draw // self.batch_size, self.world_size)
        since = batch - self.start_batch
        return rank == self.rank and since >= 0 and since % workers == worker


class StreamLoader:
    """Endless batches of `StreamDraws`.

    Attributes:
        place: from where whoever goes on after the last batch reads.
    """

    def __init__(self, draws: StreamDraws, *, num_workers: int, pin_memory: bool) -> None:
        self.draws, self.place = draws, draws.place
        self._loader = DataLoader(
            draws,
            batch_size=None,
            num_workers=num_workers,
            worker_init_fn=leave_interrupts,
            pin_memory=pin_memory,
        )

    def __iter__(self) -> Iterator[Any]:
        for place, skipped, batch in self._loader:
            self.place = place
            self.draws.images.source.count(self.draws.batch_size, skipped)
            yield batch


def load_image_stream(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | Path | None = None,
    split: str = "train",
    image_column: str = "image",
    cache_dir: str | None = None,
    channels: int = 3,
) -> ImageStream:
    """Images of a Hub dataset, of http(s) addresses, or of local parquet files, none of which is copied.

    Args:
        dataset_name: name on the Hub, an address that ends in .tar or .parquet (`shards-{000..099}.tar` is a hundred
            of them), or a local directory; exclusive with `train_data_dir`.
        train_data_dir: local directory of parquet files, or one of them.

    Raises:
        ValueError: tars and images on this disk, which are read in any order as they lie; an unknown split or column.

    Example:
        >>> len(load_image_stream("imagenet-1k").shards)
        294
    """
    if (dataset_name is None) == (train_data_dir is None):
        raise ValueError("Say which images: give either train_data_dir or dataset_name.")
    from .hf_datasets import open_stream

    given = str(train_data_dir if dataset_name is None else dataset_name)
    if train_data_dir is not None and not Path(given).exists():
        raise ValueError(f"The training directory {given} does not exist or is not a directory.")
    shards, rows = open_stream(
        Path(given) if Path(given).exists() else given,
        config_name=dataset_config_name,
        split=split,
        cache_dir=cache_dir,
        image_column=image_column,
    )
    value_range = read_value_range(Path(given)) if Path(given).is_dir() else None
    return ImageStream(shards, rows, channels=channels, value_range=value_range)
