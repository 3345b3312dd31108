"""Nothing is left out of a data set, enlarged, replaced or taken twice without a word; nothing hostile is decoded."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from diffusers_eqvae.data.image_datasets import ImageSource, PixelDataset, load_image_dataset
from diffusers_eqvae.data.image_files import open_image
from diffusers_eqvae.images import to_rgb
from diffusers_eqvae.metrics.image_sets import open_images
from diffusers_eqvae.provenance import data_difference, require_same_data


def save(path: Path, px: int | tuple[int, int] = 32, fmt: str = "PNG", grey: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (px, px) if isinstance(px, int) else px, (grey, 120, 60)).save(path, fmt)
    return path


def load(root: Path, **options) -> ImageSource:
    return load_image_dataset(train_data_dir=root, **options)


def said(caplog, *words: str) -> list[str]:
    """Messages that hold all the words; each is one line."""
    lines = [record.getMessage() for record in caplog.records]
    assert not any("\n" in line for line in lines)
    return [line for line in lines if all(word in line for word in words)]


def write(path: Path, content: bytes = b"\0\0\0\x18ftypheic") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


OTHERS = {
    "heic": "p.heic",
    "raw": "p.CR2",
    "no ending": "p",
    "a video": "p.mp4",
    "a dot at the end": "p.",
}


@pytest.mark.parametrize("name", OTHERS.values(), ids=OTHERS)
def test_files_left_out_by_their_ending_are_counted_and_more_than_taken_are_refused(tmp_path, caplog, name):
    for k in range(3):
        save(tmp_path / "cat" / f"{k}.png")
    write(tmp_path / "cat" / f"0{name}")
    source = load(tmp_path)
    assert len(source) == 3 and len(said(caplog, "1 files are left out", f"cat/0{name}", "convert them")) == 1
    assert source.report.to_json()["ending"]["count"] == 1
    for k in range(1, 4):
        write(tmp_path / "cat" / f"{k}{name}")
    for reader in (load, open_images):
        with pytest.raises(ValueError, match=r"would be left out than taken: 4, and 3 images.*convert them"):
            reader(tmp_path)


@pytest.mark.parametrize("name", ["a.txt", "b.json", ".DS_Store", "._a.png", "README", "Thumbs.db", "LICENSE.md"])
def test_companions_are_not_worth_a_word(tmp_path, caplog, name):
    save(tmp_path / "cat" / "0.png")
    for k in range(3):
        write(tmp_path / "cat" / str(k) / name, b"{}")
        save(tmp_path / "cat" / str(k) / "0.png")
    assert len(load(tmp_path)) == 4 and not caplog.records


def link_to_parent(root: Path) -> None:
    (root / "cat" / "loop").symlink_to(root)


def link_above(root: Path) -> None:
    save(root.parent / "other" / "x.png")
    (root / "above").symlink_to(root.parent)


def link_to_folder(root: Path) -> None:
    (root / "Again").symlink_to(root / "cat")  # sorted before it


def link_to_file(root: Path) -> None:
    (root / "cat" / "-1.png").symlink_to(root / "cat" / "0.png")


def hard_link(root: Path) -> None:
    os.link(root / "cat" / "0.png", root / "cat" / "9.png")


@pytest.mark.parametrize("make", [link_to_parent, link_above, link_to_file, hard_link], ids=lambda f: f.__name__)
def test_no_file_is_taken_twice(tmp_path, caplog, make):
    root = tmp_path / "images"
    for k in range(3):
        save(root / "cat" / f"{k}.png")
    make(root)
    source = load(root)
    assert len(source) == 3 and source.id2label == {0: "cat"}
    assert len(said(caplog, "1 names lead to what is taken already")) == 1


def test_a_class_that_is_a_link_to_another_is_named(tmp_path):
    for k in range(3):
        save(tmp_path / "cat" / f"{k}.png")
    link_to_folder(tmp_path)
    source = load(tmp_path)
    assert len(source) == 3 and source.id2label == {0: "cat"} and source.report.count("duplicate") == 1


def test_a_data_set_of_links_is_read_through_them(tmp_path, caplog):
    for k in range(3):
        save(tmp_path / "pool" / f"{k}.png")
    for k, name in enumerate(("cat", "dog", "cat")):
        (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name / f"{k}.png").symlink_to(tmp_path / "pool" / f"{k}.png")
    assert load(tmp_path / "images").labels.tolist() == [0, 0, 1] and not caplog.records


def dangling(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere.png"))


def undecodable(path: Path) -> None:
    write(Path(os.fsdecode(os.fsencode(path.parent) + b"/\xff\xfe.png")))


def named_pipe(path: Path) -> None:
    os.mkfifo(path)


def pipe_behind_a_link(path: Path) -> None:
    os.mkfifo(path.parent.parent / "pipe")
    path.symlink_to(path.parent.parent / "pipe")


ODD = [dangling, undecodable, named_pipe, pipe_behind_a_link]


@pytest.mark.parametrize("make", ODD, ids=lambda f: f.__name__)
def test_one_odd_name_is_left_out_and_named(tmp_path, caplog, make):
    root = tmp_path / "images"
    for k in range(3):
        save(root / "cat" / f"{k}.png")
    make(root / "cat" / "odd.png")
    assert len(load(root)) == 3 and len(said(caplog, "1 names are left out", "repair or remove them")) == 1
    assert len(open_images(root)) == 3


def png_of_claimed_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


HOSTILE = {
    "wide": png_of_claimed_size(400_000, 8),
    "tall": png_of_claimed_size(8, 400_000),
    "huge": png_of_claimed_size(100_000, 100_000),
    "tiny": png_of_claimed_size(1, 1),
    "cut": png_of_claimed_size(64, 64)[:-20],
    "empty": b"",
    "text": b"no image",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_what_an_image_claims_is_looked_at_before_it_is_decoded(tmp_path, caplog, content):
    for k in range(7):
        save(tmp_path / "cat" / f"{k}.png")
    write(tmp_path / "cat" / "x.png", content)
    source = load(tmp_path)
    shapes = {source.get(index)[0].size for index in range(8)}
    assert shapes == {(32, 32)} and source.unreadable == {7: "cat/x.png"}
    assert len(said(caplog, "Skipped image cat/x.png")) == 1 and source.report.count("unreadable") == 1


@pytest.mark.parametrize("error", [ZeroDivisionError, MemoryError, KeyError, AssertionError, RecursionError])
def test_whatever_a_decoder_raises_counts_as_unreadable(tmp_path, monkeypatch, error):
    for k in range(8):
        save(tmp_path / f"{k}.png")
    source = load(tmp_path)

    def broken(image, channels):
        raise error("in a field of metadata")

    monkeypatch.setattr("diffusers_eqvae.data.image_files.to_channels", broken)
    with pytest.raises(ValueError, match=r"At most 2 of the 8 images may be unreadable.*Repair or remove them"):
        source.get(0)


@pytest.mark.parametrize("error", [ZeroDivisionError, struct.error, TypeError])
def test_an_orientation_that_cannot_be_read_is_ignored_and_said(tmp_path, monkeypatch, caplog, error):
    def broken(self):
        raise error("72/0")

    path = save(tmp_path / "a.jpg", (32, 16), "JPEG")
    monkeypatch.setattr(Image.Image, "getexif", broken)
    with Image.open(path) as image:
        assert to_rgb(image).size == (32, 16)
    assert len(said(caplog, "The orientation of", "a.jpg cannot be read")) == 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_are_those_of_pillow(tmp_path, orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 16, 3), np.uint8)).save(
        tmp_path / "a.png", exif=exif
    )
    with Image.open(tmp_path / "a.png") as image:
        assert to_rgb(image).tobytes() == ImageOps.exif_transpose(image).convert("RGB").tobytes()


def test_images_that_are_enlarged_are_counted_and_can_be_left_out(tmp_path, caplog):
    for k, px in enumerate((20, 64, 32)):
        save(tmp_path / "a" / f"{k}.png", px)
    source = load(tmp_path)
    PixelDataset(source, resolution=64)
    PixelDataset(source, resolution=64)
    line = "2 of 3 images are smaller than 64 px and are enlarged by up to 3.2x (a/0.png, a/2.png)"
    assert len(said(caplog, line, "skip_small")) == 1 and source.report.count("small") == 2
    rest = load(tmp_path, skip_below=64)
    assert len(rest) == 1 and rest.name(0) == "a/1.png" and rest.report.count("skipped") == 2
    assert len(said(caplog, "2 images smaller than 64 px are left out (a/0.png, a/2.png)")) == 1
    with pytest.raises(ValueError, match="All 3 images would be left out"):
        load(tmp_path, skip_below=65)
    assert open_images(tmp_path, resolution=64).report.count("small") == 2


def test_images_beside_class_folders_are_named_before_the_work(tmp_path, caplog):
    for name in "abc":
        save(tmp_path / name / "0.png")
    save(tmp_path / "preview.png")
    assert load(tmp_path).labels is None
    assert len(said(caplog, "1 images lie beside the class folders, so that no image has a label (preview.png)")) == 1
    with pytest.raises(ValueError, match=r"beside the class folders.*\(preview\.png\); move them into a class folder"):
        load(tmp_path, require_labels=True)


def as_table(root: Path, greys: list[int], name: str = "image") -> datasets.Dataset:
    image = [{"bytes": save(root.parent / "one.bmp", 16, "BMP", grey).read_bytes(), "path": None} for grey in greys]
    features = datasets.Features({name: datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({name: image, "label": [0, 1] * (len(greys) // 2)}, features=features)


def changed_pixels(root: Path) -> None:
    path, size = root / "a" / "1.bmp", (root / "a" / "1.bmp").stat().st_size
    save(path, 16, "BMP", 200)
    assert path.stat().st_size == size


def renamed_file(root: Path) -> None:
    (root / "a" / "1.bmp").rename(root / "a" / "2.bmp")


def another_label(root: Path) -> None:
    (root / "a" / "1.bmp").rename(root / "b" / "5.bmp")


def renamed_class(root: Path) -> None:
    (root / "b").rename(root / "c")


def one_more(root: Path) -> None:
    save(root / "b" / "9.bmp", 16, "BMP")


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (changed_pixels, "content of images"),
        (renamed_file, "names or sizes of files"),
        (another_label, "names or sizes of files and labels"),
        (renamed_class, "names or sizes of files and class names"),
        (one_more, "number of images"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_the_identity_of_images_sees(tmp_path, change, differs):
    for name in "ab":
        for k in range(2):
            save(tmp_path / name / f"{k}.bmp", 16, "BMP", 10 * k)
    before = load(tmp_path).identity
    assert data_difference(before, load(tmp_path).identity) is None
    change(tmp_path)
    with pytest.raises(ValueError, match=f"not the data of the store x: the {differs}.* differ; encode them anew"):
        require_same_data(before, load(tmp_path).identity, whose="the store x", remedy="encode them anew")


def test_the_identity_of_a_table_sees_its_pixels(tmp_path):
    undecoded = datasets.Image(decode=False)
    tables = (as_table(tmp_path / "x", [grey] * 4).cast_column("image", undecoded) for grey in (10, 200))
    one, other = map(ImageSource, tables)
    assert data_difference(one.identity, other.identity) == "content of images"
    assert data_difference(one.identity, {**one.full_identity(), "sampled": None}) is None


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_keep_one_count_of_unreadable_images_and_end_in_the_sentence(tmp_path, num_workers):
    for k in range(44):
        write(tmp_path / f"{k:02d}.png", png_of_claimed_size(64, 64)[: -20 if k % 8 == 0 else None])
        if k % 8:
            save(tmp_path / f"{k:02d}.png")
    source = load(tmp_path)
    loader = DataLoader(PixelDataset(source, resolution=32), batch_size=1, num_workers=num_workers)
    with pytest.raises(ValueError, match=r"^At most 3 of the 44 images may be .*but 4 are.*remove them\.$") as error:
        list(loader)
    assert "\n" not in str(error.value)
    assert len(source.unreadable) >= 4, "the main process knows what its workers found"


def test_an_image_of_any_source_is_looked_at_first(tmp_path):
    with pytest.raises(ValueError, match="longer than 100 times"):
        open_image(HOSTILE["wide"])
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(ValueError, match="not a regular file"):
        open_image(tmp_path / "x.png")


def forged_npz(path: Path, shape: tuple[int, ...], entry_size: int | None) -> None:
    """A compressed .npz whose array header, and where given the archive's directory, claim more than is there."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", header.getvalue() + bytes(64))
    if entry_size is not None:
        content = path.read_bytes()
        size = struct.pack("<I", len(header.getvalue()) + 64)
        path.write_bytes(content.replace(size, struct.pack("<I", entry_size)))


@pytest.mark.parametrize(
    ("shape", "entry_size"),
    [((1 << 18, 1024, 1024, 3), None), ((4000, 1000, 1000, 1), 4_000_000_128)],
    ids=["the array", "the archive as well"],
)
def test_an_npz_that_claims_more_than_is_there_is_refused_before_memory_is_taken(tmp_path, shape, entry_size):
    forged_npz(tmp_path / "x.npz", shape, entry_size)
    with pytest.raises(ValueError, match=r"arr_0 of .*x\.npz cannot be read: it claims to be uint8 .* write it again"):
        open_images(tmp_path / "x.npz")


def test_an_honest_compressed_npz_is_read(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", arr_0=np.zeros((500, 32, 32, 3), np.uint8))
    assert len(open_images(tmp_path / "x.npz")) == 500
