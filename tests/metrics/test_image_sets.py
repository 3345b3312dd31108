"""Image sets: the same images from an array, an .npz, a folder and a dataset, and what is refused."""

from __future__ import annotations

import io
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from diffusers_eqvae.data.image_datasets import load_image_dataset
from diffusers_eqvae.files import map_npz_array, open_npz_array
from diffusers_eqvae.images import adm_center_crop
from diffusers_eqvae.metrics.image_sets import ImageSet, open_images


def images_uint8(count: int = 7, height: int = 12, width: int = 10) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3)).astype(np.uint8)


def read(images: ImageSet) -> np.ndarray:
    return np.concatenate([batch for _, batch in images.batches(3)])


def test_one_set_from_everywhere(tmp_path):
    array = images_uint8()
    np.savez(tmp_path / "plain.npz", arr_0=array, arr_1=np.arange(7))
    np.savez_compressed(tmp_path / "compressed.npz", array)
    (tmp_path / "folder" / "b").mkdir(parents=True)
    for index, each in enumerate(array):
        folder = tmp_path / "folder" / "b" if index == 6 else tmp_path / "folder"
        Image.fromarray(each).save(folder / f"a{index}.png")
    (tmp_path / "folder" / "notes.txt").write_text("not an image")
    for source in ("plain.npz", "compressed.npz", "folder"):
        images = open_images(tmp_path / source)
        assert len(images) == 7 and np.array_equal(read(images), array)
        assert images.resize_rule == "none"
    assert isinstance(map_npz_array(tmp_path / "plain.npz", "arr_0"), np.memmap)
    assert np.array_equal(read(open_images(tmp_path / "plain.npz", limit=5)), array[:5])


def test_an_array_in_fortran_order_is_read_as_it_was(tmp_path):
    array = np.asfortranarray(images_uint8())
    np.savez(tmp_path / "set.npz", array)
    assert np.array_equal(read(open_images(tmp_path / "set.npz")), array)
    np.savez(tmp_path / "empty.npz", array[:0])
    assert open_npz_array(tmp_path / "empty.npz", "arr_0").shape == (0, 12, 10, 3)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_python_objects_are_neither_mapped_nor_unpickled(save, tmp_path):
    """Mapped, their pickle would be followed as addresses, which ends the process."""
    save(tmp_path / "objects.npz", np.array([[1.0], "two"], dtype=object))
    with pytest.raises(ValueError, match=r"[oO]bject"):
        open_npz_array(tmp_path / "objects.npz", "arr_0")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_an_array_cut_short_is_refused(compression, version, tmp_path):
    """numpy says EOF; a map would give the bytes of arr_1 as images."""
    array = images_uint8(5)
    stored = io.BytesIO()
    np.lib.format.write_array(stored, array, version=version)
    with zipfile.ZipFile(tmp_path / "short.npz", "w", compression) as archive:
        archive.writestr("arr_0.npy", stored.getvalue().replace(b"(5, 12,", b"(9, 12,"))
        archive.writestr("arr_1.npy", stored.getvalue() * 9)
    with pytest.raises(
        ValueError, match=r"arr_0 of .*short\.npz (is cut short: .*3240 bytes, and 1800 |cannot be read)"
    ):
        open_images(tmp_path / "short.npz")
    with zipfile.ZipFile(tmp_path / "long.npz", "w", compression) as archive:  # numpy takes what is claimed
        archive.writestr("arr_0.npy", stored.getvalue().replace(b"(5, 12,", b"(4, 12,"))
    assert np.array_equal(read(open_images(tmp_path / "long.npz")), array[:4])


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_processes_share_a_set_in_order(world_size):
    """The same batches whoever reads them; of seven processes three find none left."""
    images = ImageSet(images_uint8(), name="x")
    ranks = [SimpleNamespace(process_index=rank, num_processes=world_size) for rank in range(world_size)]
    index, shares = zip(*(pair for rank in ranks for pair in images.batches(2, rank)), strict=True)
    assert np.array_equal(np.concatenate(shares), images_uint8()) and [len(batch) for batch in shares] == [2, 2, 2, 1]
    assert [place for places in index for place in places] == list(range(7))
    assert sum(len(images.batches(2, rank)) for rank in ranks) == 4
    with pytest.raises(ValueError, match="got batch_size 0"):
        images.batches(0)


def test_folders_and_datasets_are_cropped(tmp_path):
    for index, each in enumerate(images_uint8(2, 40, 30)):
        Image.fromarray(each).save(tmp_path / f"{index}.png")
    expected = np.stack([np.asarray(adm_center_crop(Image.fromarray(each), 16)) for each in images_uint8(2, 40, 30)])
    folder = open_images(tmp_path, resolution=16)
    dataset = ImageSet(load_image_dataset(train_data_dir=tmp_path), name="dataset", resolution=16)
    assert np.array_equal(read(folder), expected) and np.array_equal(read(dataset), expected)
    assert folder.resize_rule == "ADM centre crop to 16 px"
    with pytest.raises(ValueError, match="needs a resolution"):
        ImageSet(load_image_dataset(train_data_dir=tmp_path), name="dataset")


def test_bad_archives_are_named(tmp_path):
    cases = {
        "key": ({"samples": images_uint8()}, "as arr_0; it holds samples"),
        "shape": ({"arr_0": images_uint8().transpose(0, 3, 1, 2)}, r"shape \(N, H, W, 3\); got \(7, 3, 12, 10\)"),
        "dtype": ({"arr_0": images_uint8() / 255}, "must be uint8; got float64"),
        "empty": ({"arr_0": images_uint8(0)}, "holds 0 images"),
    }
    for name, (arrays, complaint) in cases.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(ValueError, match=complaint):
            open_images(tmp_path / f"{name}.npz")
    np.savez(tmp_path / "few.npz", images_uint8())
    with pytest.raises(ValueError, match="holds 7 images; 50 are to be measured"):
        open_images(tmp_path / "few.npz", limit=50)
    with pytest.raises(ValueError, match="never resized"):
        open_images(tmp_path / "few.npz", resolution=16)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "few.npz").read_bytes()[:200])
    with pytest.raises(ValueError, match="not a whole"):
        open_images(tmp_path / "cut.npz")
    with pytest.raises(FileNotFoundError, match="neither"):
        open_images(tmp_path / "absent.npz")


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds 0 images"):
        open_images(tmp_path)
    Image.fromarray(images_uint8(1, 12, 10)[0]).save(tmp_path / "a.png")
    Image.fromarray(images_uint8(1, 9, 9)[0]).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b\.png has 9x9 px, others 10x12 px"):
        read(open_images(tmp_path))
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:80])
    with pytest.raises(ValueError, match=r"b\.png cannot be read"):
        read(open_images(tmp_path))


@pytest.mark.parametrize("file", ["config.json", "model_index.json", "run_metadata.json"])
def test_the_directory_of_a_model_is_no_set_of_images(file, tmp_path):
    """A run keeps comparison strips of its validation images there."""
    (tmp_path / "run" / "validation").mkdir(parents=True)
    Image.fromarray(images_uint8(1)[0]).save(tmp_path / "run" / "validation" / "strip.png")
    (tmp_path / "run" / file).write_text("{}")
    with pytest.raises(ValueError, match=rf"run holds {file}: it is a model's directory.*\.npz .* folder .*pipeline"):
        open_images(tmp_path / "run", resolution=8)
    assert len(open_images(tmp_path / "run" / "validation")) == 1
