"""Labels and layouts of other programs' data sets: read, or refused with the remedy; captions are no classes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import datasets
import pytest

from .test_image_data import as_table, load, said, save


def edm(root: Path, labels: object) -> Path:
    for k in range(3):
        save(root / "00000" / f"img{k:08d}.png")
    (root / "dataset.json").write_text(json.dumps(labels))
    return root


PAIRS = [[f"00000/img{k:08d}.png", 2 - k] for k in range(3)]


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ({"labels": PAIRS}, [2, 1, 0]),
        ({"labels": dict(PAIRS)}, [2, 1, 0]),
        ({"labels": None}, None),
        ({"labels": PAIRS[:2]}, r"dataset\.json .* labels 2 of 3 images, and not 00000/img00000002\.png: complete"),
        ({"labels": [7, 8, 9]}, r"dataset\.json must hold \"labels\""),
        ({"labels": [[name, [0, 1]] for name, _ in PAIRS]}, r"dataset\.json must give one class id or name per image"),
        ({"images": []}, [0, 0, 0]),
    ],
    ids=["pairs", "an object", "none", "some", "no names", "vectors", "another format"],
)
def test_labels_of_a_dataset_json(tmp_path, caplog, labels, found):
    edm(tmp_path, labels)
    if isinstance(found, str):
        with pytest.raises(ValueError, match=found):
            load(tmp_path)
    else:
        got = load(tmp_path).labels
        assert (got if got is None else got.tolist()) == found


METADATA = {
    "jsonl": (
        "metadata.jsonl",
        '{"file_name": "x/0.png", "label": "b"}\n{"file_name": "x/1.png", "label": "a"}\n',
    ),
    "csv": ("metadata.csv", "file_name,label\nx/0.png,owl\nx/1.png,cat\n"),
    "in the folder": ("x/metadata.csv", "file_name,label\n0.png,owl\n1.png,cat\n"),
    "numbers": ("metadata.csv", "file_name,label\nx/0.png,1\nx/1.png,0\n"),
}


@pytest.mark.parametrize(("name", "text"), METADATA.values(), ids=METADATA)
def test_labels_of_a_metadata_file(tmp_path, caplog, name, text):
    for k in range(2):
        save(tmp_path / "x" / f"{k}.png")
    (tmp_path / name).write_text(text)
    source = load(tmp_path)
    assert source.labels.tolist() == [1, 0] and source.id2label[0] in ("cat", "a", "0")
    assert len(said(caplog, "folders are not classes", name)) == 1


def test_captions_are_not_taken_for_classes_in_silence(tmp_path, caplog):
    for k in range(4):
        save(tmp_path / f"{k}.png")
    rows = [json.dumps({"file_name": f"{k}.png", "text": f"a photo of {k} cats"}) for k in range(4)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    assert load(tmp_path).labels is None
    assert len(said(caplog, "gives no labels", "its columns: file_name, text")) == 1
    load(tmp_path, label_column="text")
    assert len(said(caplog, "4 different texts for 4 images: are they captions?")) == 1


def test_layouts_of_hugging_face_are_read_or_refused_with_the_remedy(tmp_path):
    table = as_table(tmp_path / "x", [10, 20])
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "dict")
    table.to_parquet(tmp_path / "one.parquet")
    for path in ("saved", "dict", "one.parquet"):
        assert load(tmp_path / path).labels.tolist() == [0, 1], path
    assert len(load(tmp_path / "dict", split="test")) == 1
    (tmp_path / "edm.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"edm\.zip is a file, .*unpack an archive and name the folder"):
        load(tmp_path / "edm.zip")
    (tmp_path / "cut.tar").write_bytes(b"x" * 700)
    with pytest.raises(ValueError, match=r"cut\.tar cannot be read as webdataset .*write the files again"):
        load(tmp_path / "cut.tar", cache_dir=str(tmp_path / "cache"))
    as_table(tmp_path / "x", [10, 20], "photo").to_parquet(tmp_path / "photo" / "0.parquet")
    with pytest.raises(ValueError, match=r"the columns are photo, label: name photo as image_column"):
        load(tmp_path / "photo")


def test_a_tar_alone_is_read(tmp_path):
    import tarfile

    with tarfile.open(tmp_path / "one.tar", "w") as archive:
        for k in range(2):
            content = save(tmp_path / "one.png").read_bytes()
            entry = tarfile.TarInfo(f"{k}.png")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    assert len(load(tmp_path / "one.tar", image_column="png", cache_dir=str(tmp_path / "cache"))) == 2


def test_images_beside_parquet_files_are_counted(tmp_path, caplog):
    as_table(tmp_path / "x", [10, 20]).to_parquet(tmp_path / "tab" / "0.parquet")
    for k in range(2):
        save(tmp_path / "tab" / f"{k}.png")
    load(tmp_path / "tab")
    assert len(said(caplog, "1 files are left out, since the directory is read as imagefolder (1 parquet)")) == 1
