"""Laws of the order of a stream: what is seen depends on (seed, draw number) and the data, and memory on the block."""

from __future__ import annotations

import gc
import io
import itertools
import logging
from collections.abc import Iterator

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_eqvae.data.image_datasets import PixelDataset, load_image_dataset
from diffusers_eqvae.data.image_streams import ImageStream, PixelStream, StreamDraws, load_image_stream
from diffusers_eqvae.images import evenly_spaced

COUNTS = (7, 0, 4, 1, 9, 2)  # of the shards; 23 images in all
TOTAL = sum(COUNTS)


def png(number: int) -> bytes:
    """An 8 px image of one colour, which is its number."""
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 0)).save(content, "PNG")
    return content.getvalue()


PNGS = [png(number) for number in range(512)]


class Shards:
    """Numbered images in shards; which rows were read is written down."""

    def __init__(self, counts: tuple[int, ...] = COUNTS, damaged: dict[int, bytes] | None = None) -> None:
        self.counts, self.damaged, self.opened = counts, damaged or {}, list[tuple[int, int]]()

    def __call__(self, shard: int, first: int) -> Iterator[dict]:
        self.opened.append((shard, first))
        before = sum(self.counts[:shard])
        for number in range(before + first, before + self.counts[shard]):
            yield {"bytes": self.damaged.get(number, PNGS[number]), "path": None}

    @property
    def names(self) -> list[tuple[str, int]]:
        return [(f"{shard}.parquet", count) for shard, count in enumerate(self.counts)]


def pixels(shards: Shards | None = None, block_size: int = 5, **options) -> PixelStream:
    shards = shards or Shards()
    return PixelStream(ImageStream(shards.names, shards), resolution=8, block_size=block_size, **options)


def numbers(batch: dict) -> list[int]:
    """Which images a batch holds."""
    colours = ((batch["pixel_values"][:, :, 0, 0] + 1) * 127.5).round().int()
    return (colours[:, 0] + 256 * colours[:, 1]).tolist()


def shown(count: int, images: PixelStream | None = None, batch_size: int = 1, num_workers: int = 0, **order) -> list:
    """The first batches, as lists of numbers."""
    loader = (images or pixels()).loader(batch_size, num_workers=num_workers, **{"seed": 3, **order})
    return [numbers(batch) for batch in itertools.islice(loader, count)]


def flat(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


@pytest.mark.parametrize("block_size", [1, 5, 23, 100])
def test_every_image_is_shown_once_in_an_epoch(block_size):
    draws = flat(shown(3 * TOTAL, pixels(block_size=block_size)))
    epochs = [draws[start : start + TOTAL] for start in range(0, 3 * TOTAL, TOTAL)]
    assert all(sorted(epoch) == list(range(TOTAL)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_a_block_is_mixed_and_blocks_follow_the_shards_of_the_epoch():
    """23 images in the shards' order, cut at 5: what each block holds, and that it is not in that order."""
    read = flat(shown(TOTAL, pixels(block_size=1)))
    starts = [0, 7, 7, 11, 12, 21]
    runs = {tuple(range(start, start + count)) for start, count in zip(starts, COUNTS, strict=True) if count}
    position, found = 0, set()
    while position < TOTAL:
        run = next(each for each in runs if each[0] == read[position])
        assert tuple(read[position : position + len(run)]) == run
        found.add(run)
        position += len(run)
    assert found == runs and read != list(range(TOTAL))
    draws = flat(shown(TOTAL))
    for start in range(0, TOTAL, 5):
        assert sorted(draws[start : start + 5]) == sorted(read[start : start + 5])
    assert draws != read


def test_another_seed_is_another_order():
    assert len({tuple(flat(shown(TOTAL, seed=seed))) for seed in range(5)}) == 5


def test_the_order_is_the_same_for_ever():
    """Made by this implementation and frozen: a change would silently break every resumed run."""
    assert flat(shown(30)) == GOLDEN


GOLDEN = [11, 13, 15, 12, 14, 20, 18, 17, 19, 16, 7, 10, 8, 0, 9, 2, 4, 1, 5, 3, 21, 6, 22, 2, 4, 1, 3, 0, 5, 7]


@pytest.mark.parametrize("consumed", [1, 3, 5, 6, 20, 22, 23, 24, 28, 45, 46, 47])
def test_resumed_is_uninterrupted_and_reads_nothing_from_before_the_block(consumed):
    """Stops inside blocks, at their borders and at those of epochs (23, 46)."""
    whole = shown(70)
    loader = pixels().loader(1, seed=3)
    for _ in itertools.islice(loader, consumed):
        pass
    shards = Shards()
    resumed = pixels(shards)
    shards.opened.clear()
    assert shown(70 - consumed, resumed, start_batch=consumed, place=list(loader.place)) == whole[consumed:]
    place = loader.place
    assert shards.opened[0][1] == place.row and place.epoch == (consumed - 1) // TOTAL
    assert consumed - 5 <= place.draw < consumed
    assert shown(70 - consumed, start_batch=consumed) == whole[consumed:]  # from the beginning, the long way


@pytest.mark.parametrize(("world_size", "num_workers"), [(2, 0), (3, 0), (1, 2), (2, 1)])
def test_ranks_and_workers_change_nothing(world_size, num_workers):
    """More of both than there are shards with images."""
    together = shown(9, batch_size=2 * world_size)
    ranks = [
        shown(9, batch_size=2, rank=rank, world_size=world_size, num_workers=num_workers) for rank in range(world_size)
    ]
    assert [flat(list(parts)) for parts in zip(*ranks, strict=True)] == together


def test_where_a_resumed_run_goes_on_is_said(caplog):
    loader = pixels().loader(1, seed=3)
    for _ in itertools.islice(loader, 8):
        pass
    with caplog.at_level(logging.INFO):
        pixels().loader(1, seed=3, start_batch=8, place=loader.place)
    assert "goes on in epoch 0 in the shard 4.parquet, which is read over again up to row 4" in caplog.text


def test_workers_resume_where_one_process_stopped():
    """After an odd number of batches, which is the other worker's turn."""
    loader = pixels().loader(2, seed=3, num_workers=1)
    for _ in itertools.islice(loader, 7):
        pass
    expected = shown(13, batch_size=2)[7:]
    for num_workers in (0, 2):
        order = {"start_batch": 7, "place": loader.place, "num_workers": num_workers}
        assert shown(6, batch_size=2, **order) == expected


def test_augmentation_belongs_to_the_draw():
    """Noise images: cropped and mirrored alike however many ranks there are, otherwise in each epoch."""
    rng = np.random.default_rng(0)
    contents = []
    for _ in range(6):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(file, "PNG")
        contents.append({"bytes": file.getvalue()})
    stream = ImageStream([("a", 1)], lambda shard, first: iter(contents[first:]))

    def batches(count: int, **order):
        images = PixelStream(stream, resolution=8, block_size=4, random_crop=True, random_flip=True)
        return [batch["pixel_values"] for batch in itertools.islice(images.loader(seed=1, **order), count)]

    one = batches(3, batch_size=4)
    two = [batches(3, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    assert all((one[k] == np.concatenate([two[0][k], two[1][k]])).all() for k in range(3))
    assert len({pixels.numpy().tobytes() for batch in one for pixels in batch}) == 12


class Live(bytes):
    """Bytes that are counted while they live."""

    now = most = 0

    def __new__(cls, content: bytes) -> Live:
        Live.now += 1
        Live.most = max(Live.most, Live.now)
        return super().__new__(cls, content)

    def __del__(self) -> None:
        Live.now -= 1


@pytest.mark.parametrize("world_size", [1, 4])
def test_memory_is_that_of_two_blocks_however_many_shards_there_are(world_size):
    most = {}
    for shards in (4, 8):

        def rows(shard: int, first: int) -> Iterator[dict]:
            return ({"bytes": Live(PNGS[number])} for number in range(first, 10))

        stream = PixelStream(ImageStream([("x", 1)] * shards, rows), resolution=8, block_size=20)
        gc.collect()
        Live.now = Live.most = 0
        for _ in itertools.islice(stream.loader(1, seed=0, world_size=world_size), 20 * shards // world_size):
            pass
        most[shards] = Live.most
    assert most[8] == most[4] <= 20 + 20 // world_size + 10  # a block, its own of the one before, spares


def test_an_unreadable_image_is_replaced_by_one_of_its_block_alike_everywhere(caplog):
    damaged = {4: b"no image", 11: PNGS[11][:40]}
    images = pixels(Shards(damaged=damaged))
    with caplog.at_level(logging.WARNING):
        draws = flat(shown(TOTAL, images))
    whole = flat(shown(TOTAL))
    for n, (number, right) in enumerate(zip(draws, whole, strict=True)):
        block = whole[n - n % 5 : n - n % 5 + 5]
        assert number in block and number not in damaged and (number == right or right in damaged)
    assert "Skipped image row 4 of 0.parquet" in caplog.text and "Skipped image row 0 of 3.parquet" in caplog.text
    assert "2 images cannot be read and were replaced" in str(images.source.report.notes["unreadable"])
    for world_size in (2, 3):
        images, order = pixels(Shards(damaged=damaged)), {"world_size": world_size}
        ranks = [shown(7, images, rank=rank, num_workers=rank % 2, **order) for rank in range(world_size)]
        assert flat([flat(list(parts)) for parts in zip(*ranks, strict=True)]) == draws[: 7 * world_size]


def test_too_many_unreadable_images_are_an_error():
    with pytest.raises(ValueError, match=r"At most 3 of \d+ images of a stream may be unreadable, but 4 are.*Mend"):
        shown(TOTAL, pixels(Shards(damaged=dict.fromkeys((8, 9, 20, 21), b"x"))))
    with pytest.raises(ValueError, match=r"None of the images row \d of 0\.parquet can be read; mend the stream"):
        shown(TOTAL, pixels(Shards((8,), damaged=dict.fromkeys(range(1, 8), b"x")), block_size=1))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_that_breaks_off_names_the_shard_and_the_row(num_workers):
    def rows(shard: int, first: int) -> Iterator[dict]:
        yield from Shards()(shard, first)
        if shard == 4:
            raise ConnectionError("Server Disconnected")

    images = PixelStream(ImageStream(Shards().names, rows), resolution=8, block_size=5)
    expected = (
        r"broke off in the shard 4\.parquet at about row 8 \(Server Disconnected\).*go on when it is there again"
    )
    with pytest.raises(ValueError, match=expected):
        shown(TOTAL, images, num_workers=num_workers)


def test_what_holds_no_images_is_refused_and_not_searched_for_ever():
    with pytest.raises(ValueError, match="The 2 shards of the stream hold no images"):
        shown(1, pixels(Shards((0, 0))))
    with pytest.raises(ValueError, match=r"hold no bytes of images, only names of files; download"):
        ImageStream([("0.csv", 1)], lambda shard, first: iter([{"bytes": None, "path": "hf://x.png"}]))


def test_the_identity_is_of_names_sizes_and_the_first_images():
    one = pixels().identity
    assert one == pixels().identity and one["shards"] == 6
    assert pixels(Shards((7, 0, 4, 1, 9, 3))).identity["files"] != one["files"]
    other = pixels(Shards(damaged={3: b"x"})).identity
    assert other["sampled"] != one["sampled"] and other["files"] == one["files"]


def test_evenly_takes_the_first_images_of_shards_all_over_and_no_more_than_asked():
    images = pixels(Shards((2,) * 128, damaged={0: b"x"}))
    found = [numbers({"pixel_values": each[None]})[0] for each in images.evenly(80)]
    taken = [2 * shard + row for shard in evenly_spaced(128, 64) for row in range(2)]
    assert found == taken[1:81] and len(set(found)) == 80
    assert [numbers({"pixel_values": each[None]})[0] for each in images.first(4)] == [1, 2, 3, 4]


def test_draws_are_an_iterable_dataset_that_says_where_it_stands():
    place, skipped, batch = next(iter(StreamDraws(pixels(), 2, seed=3)))
    assert tuple(place) == (0, 0, 0, 0, 0) and skipped == [] and len(numbers(batch)) == 2


def test_where_nothing_can_be_read_at_the_beginning_it_is_said():
    every = pixels(Shards((40,), damaged=dict.fromkeys(range(40), b"x")))
    for take in (every.first, every.evenly):
        with pytest.raises(ValueError, match=r"row 0 of 0\.parquet.* cannot be read.*mend the stream"):
            list(take(8))
    few = pixels(Shards((40,), damaged=dict.fromkeys((0, 2, 5), b"x")))
    assert len(list(few.first(8))) == 8


def test_parquet_files_are_streamed_with_the_stated_range_and_without_what_lies_beside_them(tmp_path):
    values = np.full((8, 8), 1000, np.uint16)
    content = io.BytesIO()
    Image.fromarray(values).save(content, "PNG")
    rows = [{"image": {"bytes": content.getvalue(), "path": None}}] * 3
    datasets.Dataset.from_list(rows, features=datasets.Features({"image": datasets.Image()})).to_parquet(
        tmp_path / "0.parquet"
    )
    (tmp_path / "LICENSE").write_text("free")
    plain = load_image_stream(train_data_dir=tmp_path, channels=1)
    (tmp_path / "value_range.json").write_text('{"black": 0, "white": 4000}')
    stated = load_image_stream(train_data_dir=tmp_path, channels=1)
    at_hand = load_image_dataset(train_data_dir=tmp_path, channels=1, cache_dir=str(tmp_path / "cache"))
    pixel = next(PixelStream(stated, resolution=8).first(1))
    assert torch.equal(pixel, PixelDataset(at_hand, resolution=8)[0]["pixel_values"])
    assert torch.allclose(pixel, torch.tensor(-0.5)) and stated.shards == ["0.parquet"]
    assert stated.identity["value_range"] == [0, 4000] and "value_range" not in plain.identity
