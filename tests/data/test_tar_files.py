"""Webdataset tars are read where they lie, as `datasets` reads them, and refused by name where they are damaged."""

from __future__ import annotations

import io
import logging
import shutil
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from diffusers_eqvae.data.image_datasets import load_image_dataset
from diffusers_eqvae.data.tar_files import member_name, members, read_member, read_tars


def png(number: int, side: int = 12) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)).save(content, "PNG")
    return content.getvalue()


def write_tar(path: Path, files: dict[str, bytes], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def samples(first: int, count: int, prefix: str = "") -> dict[str, bytes]:
    """An image and a class of 0, 1 or 2 for each of `count` numbers."""
    each = (
        (f"{prefix}{n:04d}.png", png(n), f"{prefix}{n:04d}.cls", b"%d\n" % (n % 3))
        for n in range(first, first + count)
    )
    return {name: content for image, pixels, label, text in each for name, content in ((image, pixels), (label, text))}


def shards(root: Path, counts: tuple[int, ...] = (5, 1, 3)) -> Path:
    for shard, count in enumerate(counts):
        write_tar(root / f"{shard:03d}.tar", samples(sum(counts[:shard]), count))
    return root


def load(root: Path, **options):
    return load_image_dataset(train_data_dir=root, image_column="png", label_column="cls", **options)


LONG = "a folder whose name is long/" * 5


@pytest.mark.parametrize(
    ("form", "prefix"),
    [
        (tarfile.USTAR_FORMAT, ""),
        (tarfile.USTAR_FORMAT, "folder/of/them/"),
        (tarfile.USTAR_FORMAT, "a folder whose name is long/" * 4),
        (tarfile.GNU_FORMAT, LONG),
        (tarfile.PAX_FORMAT, LONG),
        (tarfile.PAX_FORMAT, "Ünïcode/"),
    ],
)
def test_samples_are_those_that_datasets_reads(tmp_path, form, prefix):
    files = {"._0000.png": b"of a Mac", f"{prefix}README": b"no ending", **samples(0, 3, prefix)}
    path = write_tar(tmp_path / "one.tar", files, format=form)
    columns = read_tars([str(path)], "cls")
    table = datasets.load_dataset("webdataset", data_files=str(path), cache_dir=str(tmp_path / "cache"))["train"]
    table = table.cast_column("png", datasets.Image(decode=False))
    assert [read_member(each) for each in columns["png"]] == [row["bytes"] for row in table["png"]]
    assert [int(each) for each in columns["cls"]] == list(table["cls"])
    assert [member_name(each) for each in columns["png"]] == [f"{path}::{key}.png" for key in table["__key__"]]


def test_what_a_sample_lacks_is_none(tmp_path):
    odd = {"x.png": png(3), "x.seg.png": png(4)}
    columns = read_tars([str(write_tar(tmp_path / "0.tar", {**samples(0, 2), **odd, **samples(2, 1)}))], "cls")
    assert columns["cls"] == ["0", "1", None, "2"] and len(columns["png"]) == 4
    assert [each and read_member(each) for each in columns["seg.png"]] == [None, None, png(4), None]


def test_a_directory_of_tars_is_a_data_set_like_any_other_without_a_copy(tmp_path):
    root, cache = shards(tmp_path / "tars"), tmp_path / "cache"
    source = load(root, cache_dir=str(cache))
    assert len(source) == 9 and source.labels.tolist() == [n % 3 for n in range(9)]
    for n in (0, 4, 5, 8):
        assert np.array_equal(np.asarray(source.get(n)[0]), np.asarray(Image.open(io.BytesIO(png(n)))))
    assert source.name(5) == "001.tar::0005.png"
    assert not sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())  # a lock is empty


def test_splits_are_named_by_files_as_datasets_names_them(tmp_path):
    write_tar(tmp_path / "train-0.tar", samples(0, 3))
    write_tar(tmp_path / "test-0.tar", samples(3, 2))
    assert (len(load(tmp_path)), len(load(tmp_path, split="test"))) == (3, 2)
    with pytest.raises(ValueError, match=r"no split 'validation' in .*; it has train, test"):
        load(tmp_path, split="validation")


def test_the_identity_is_that_of_the_images_and_not_of_the_place(tmp_path):
    before = load(shards(tmp_path / "one")).identity
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert load(tmp_path / "two").identity == before and before["files"]
    write_tar(tmp_path / "two" / "001.tar", {"0005.png": png(5, side=13), "0005.cls": b"2"})
    assert load(tmp_path / "two").identity["files"] != before["files"]


@pytest.mark.parametrize(
    "cut",
    [700, 512, 600, 1024 + 100],
    ids=["inside an image", "after a header", "in the next header", "inside a label"],
)
def test_a_tar_that_was_cut_off_is_refused_by_name(tmp_path, cut):
    path = write_tar(tmp_path / "cut.tar", {"0.png": b"x" * 300, "0.cls": b"1", "1.png": png(1)})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"cut\.tar cannot be read as webdataset .*write the files again"):
        load(tmp_path)


def test_a_tar_without_its_end_is_refused(tmp_path):
    """What is cut off at the border of two members looks whole to whoever reads until there is no more."""
    path = write_tar(tmp_path / "cut.tar", samples(0, 3))
    (*_, (_, offset, size)) = members(str(path))
    path.write_bytes(path.read_bytes()[: offset + size + -size % 512])
    with pytest.raises(ValueError, match=r"cut\.tar cannot be read as webdataset .*it may be cut off"):
        load(tmp_path)


def test_a_damaged_header_is_refused_and_not_believed(tmp_path):
    path = write_tar(tmp_path / "bad.tar", samples(0, 3))
    (_, (_, offset, _), *_) = members(str(path))
    content = bytearray(path.read_bytes())
    content[offset - 512 + 134] ^= 1  # the last digit of the size, so that the next member is found all the same
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.tar cannot be read as webdataset"):
        load(tmp_path)


def test_what_is_not_one_sample_each_is_refused(tmp_path):
    write_tar(tmp_path / "twice" / "0.tar", {"0.png": png(0), "0.cls": b"1"})
    with tarfile.open(tmp_path / "twice" / "0.tar", "a") as archive:
        archive.addfile(tarfile.TarInfo("0.png"), io.BytesIO())
    with pytest.raises(ValueError, match=r"it holds 0\.png twice"):
        load(tmp_path / "twice")
    write_tar(tmp_path / "some" / "0.tar", {"0.png": png(0), "0.cls": b"1", "1.png": png(1)})
    with pytest.raises(ValueError, match=r"1 of the 2 samples in .*0\.tar have no \.cls: each needs one"):
        load(tmp_path / "some")
    write_tar(tmp_path / "none" / "0.tar", {"README": b"nothing"})
    with pytest.raises(ValueError, match=r"hold no members with an ending"):
        load(tmp_path / "none")
    with pytest.raises(ValueError, match=r"the columns are cls, png: name png as image_column"):
        load_image_dataset(train_data_dir=write_tar(tmp_path / "x" / "0.tar", {"0.cls": b"1", "0.png": png(0)}))


def test_text_labels_and_unreadable_images(tmp_path, caplog):
    files = {
        f"{n}.{end}": content
        for n in range(8)
        for end, content in (("png", png(n)), ("txt", b"owl" if n % 2 else b"cat"))
    }
    write_tar(tmp_path / "0.tar", files | {"5.png": b"no image"})
    with caplog.at_level(logging.WARNING):
        source = load_image_dataset(train_data_dir=tmp_path, image_column="png", label_column="txt")
    assert source.id2label == {0: "cat", 1: "owl"} and source.labels.tolist() == [0, 1] * 4
    assert source.unreadable == {5: "0.tar::5.png"} and "Skipped image 0.tar::5.png" in caplog.text


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_link_is_refused_by_name_and_not_left_out(tmp_path, kind):
    tar = write_tar(tmp_path / "0.tar", samples(0, 2))
    with tarfile.open(tar, "a") as archive:
        entry = tarfile.TarInfo("0002.png")
        entry.type, entry.linkname = kind, "0001.png"
        archive.addfile(entry)
    with pytest.raises(
        ValueError, match=r"0\.tar .*\(0002\.png is a link; pack the files themselves, by tar's dereference"
    ):
        load(tmp_path)


def test_other_files_beside_tars_are_no_tars(tmp_path):
    (shards(tmp_path) / "LICENSE").write_text("free")
    assert len(load(tmp_path)) == 9
