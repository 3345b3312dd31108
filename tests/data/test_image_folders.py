"""Every image of a folder is read, whatever files and folders are called."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from diffusers_eqvae.data.image_datasets import load_image_dataset
from tests.data.test_images import image


def write(root: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image(seed).save(root / name)
    return root


def labels(root: Path, split: str = "train") -> dict[str, str]:
    source = load_image_dataset(train_data_dir=root, split=split)
    return {
        source.name(index): "" if source.labels is None else source.id2label[int(source.labels[index])]
        for index in range(len(source))
    }


def test_names_that_look_like_splits_drop_nothing(tmp_path: Path) -> None:
    root = write(tmp_path / "flat", "train_1.png", "test_1.png", "photo.png", "val.png", "odd [1]*.png")
    assert labels(root) == dict.fromkeys(("train_1.png", "test_1.png", "photo.png", "val.png", "odd [1]*.png"), "")
    root = write(tmp_path / "classes", "train/a.png", "test/b.png", "cat/c.png")
    assert labels(root) == {"train/a.png": "train", "test/b.png": "test", "cat/c.png": "cat"}


def test_metadata_files_drop_nothing(tmp_path: Path) -> None:
    root = write(tmp_path, "cat/a.png", "cat/b.png", "dog/c.png")
    (root / "metadata.csv").write_text("file_name,text\ncat/a.png,hello\n")
    assert labels(root) == {"cat/a.png": "cat", "cat/b.png": "cat", "dog/c.png": "dog"}


def test_a_class_is_the_first_folder_however_deep_the_image_lies(tmp_path: Path) -> None:
    root = write(tmp_path, "cat/2020/a.png", "cat/b.png", "dog/c.png", "dog/.hidden.png", ".cache/d.png")
    assert labels(root) == {"cat/2020/a.png": "cat", "cat/b.png": "cat", "dog/c.png": "dog"}


def test_split_folders_hold_class_folders(tmp_path: Path, caplog) -> None:
    root = write(tmp_path / "splits", "train/cat/a.png", "train/dog/b.png", "val/cat/c.png", "test/d.png")
    assert labels(root) == {"train/cat/a.png": "cat", "train/dog/b.png": "dog"}
    assert labels(root, "validation") == {"val/cat/c.png": "cat"} and labels(root, "test") == {"test/d.png": ""}
    with pytest.raises(ValueError, match=r"no split 'dev' .* it has test, train, validation"):
        labels(root, "dev")
    assert not caplog.records
    root = write(tmp_path / "flat", "train/a.png", "test/b.png")
    assert labels(root) == {"train/a.png": "train", "test/b.png": "test"}
    assert "the folders test, train are read as classes" in caplog.text


def test_the_digest_of_files_sees_names_and_sizes_and_no_path(tmp_path: Path) -> None:
    def digest(root: Path) -> str | None:
        return load_image_dataset(train_data_dir=root).identity["files"]

    first = write(tmp_path / "first", "a.png", "b.png")
    shutil.copytree(first, tmp_path / "second")
    assert digest(first) == digest(tmp_path / "second")
    original = digest(first)
    with (first / "b.png").open("ab") as file:
        file.write(b"more")
    assert digest(first) != original
    (tmp_path / "second" / "b.png").rename(tmp_path / "second" / "c.png")
    assert digest(tmp_path / "second") != original
