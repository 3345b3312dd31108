"""Images of any number of channels: their axes, their range, and that a crop of them is the crop of each channel."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_eqvae.data.array_images import array_size, read_array, read_pages, read_value_range
from diffusers_eqvae.data.image_datasets import PixelDataset, load_image_dataset
from diffusers_eqvae.data.report import DataError
from diffusers_eqvae.images import to_array, to_pixels

RNG = np.random.default_rng(0)
SHAPES = {1: (40, 48), 2: (2, 40, 48), 3: (40, 48, 3), 5: (40, 48, 5), 16: (16, 40, 48)}


def save(path: Path, array: np.ndarray) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)
    return str(path)


@pytest.mark.parametrize("channels", SHAPES)
def test_channels_come_first_or_last_and_their_number_says_which(tmp_path, channels):
    array = RNG.integers(0, 256, SHAPES[channels], dtype=np.uint8)
    path = save(tmp_path / "a.npy", array)
    assert array_size(path, channels, None) == (48, 40)
    last = array.reshape(40, 48, channels) if array.shape[0] == 40 else array.transpose(1, 2, 0)
    bands = read_array(path, channels, None)
    assert bands.size == (48, 40) and np.array_equal(to_array(bands), last)
    assert np.allclose(to_pixels(bands).permute(1, 2, 0), last / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "channels", "said"),
    [
        ((40, 48, 3), 5, r"\(40, 48, 3\), which is neither of \(5, H, W\) or \(H, W, 5\).*or use another autoencoder"),
        ((40, 48), 2, r"which is neither of \(2, H, W\)"),
        ((16, 40, 16), 16, r"which could be either of .*the sides must not equal the channels"),
        ((1, 5, 40, 48), 5, "which is neither"),
    ],
)
def test_another_shape_and_one_that_could_be_both_are_refused(tmp_path, shape, channels, said):
    path = save(tmp_path / "a.npy", np.zeros(shape, np.uint8))
    for read in (read_array, array_size):
        with pytest.raises(DataError, match=said):
            read(path, channels, None)


def test_values_become_pixels_by_their_stated_range(tmp_path):
    """-1 is black and 1 is white; bytes and 16 bits have a range of their own."""
    values = np.linspace(-3, 5, 80).reshape(8, 10).astype(np.float32)
    path = save(tmp_path / "f.npy", values)
    assert np.allclose(to_pixels(read_array(path, 1, (-3.0, 5.0)))[0], (values + 3) / 4 - 1, atol=1e-6)
    levels = np.array([[0, 65535], [257 * 128, 1]], np.uint16)
    bands = read_array(save(tmp_path / "u.npy", levels), 1, None)
    assert np.allclose(to_pixels(bands)[0], levels / 32767.5 - 1, atol=1e-7)
    assert to_array(bands)[..., 0].tolist() == [[0, 255], [128, 0]]
    with pytest.raises(DataError, match=r'holds float32, whose range .* Write value_range.json .*"white": 1'):
        read_array(path, 1, None)
    with pytest.raises(ValueError, match=r"-3 to 5 go beyond the range 0 to 5 that value_range.json states"):
        read_array(path, 1, (0.0, 5.0))
    values[0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        read_array(save(tmp_path / "f.npy", values), 1, (-3.0, 5.0))
    with pytest.raises(DataError, match="must hold integers or floating-point values; it holds bool"):
        read_array(save(tmp_path / "b.npy", values > 0), 1, (0.0, 1.0))


@pytest.mark.parametrize("content", ['{"black": 1, "white": 1}', '{"black": 0, "white": Infinity}'])
def test_a_range_is_two_finite_numbers(tmp_path, content):
    assert read_value_range(tmp_path) is None
    (tmp_path / "value_range.json").write_text(content)
    with pytest.raises(ValueError, match="must say a black below its white, both finite"):
        read_value_range(tmp_path)


def test_an_array_of_bytes_is_the_image_of_these_bytes_through_every_crop(tmp_path):
    """In training's crops, mirrored and not, and in the centre crops of all else."""
    for number in range(3):
        array = RNG.integers(0, 256, (90, 70, 3), dtype=np.uint8)
        save(tmp_path / f"arrays/{number % 2}/{number}.npy", array)
        (tmp_path / f"images/{number % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(tmp_path / f"images/{number % 2}/{number}.png")
    arrays, images = (
        PixelDataset(
            load_image_dataset(train_data_dir=tmp_path / each), resolution=32, random_crop=True, random_flip=True
        )
        for each in ("arrays", "images")
    )
    assert arrays.source.labels.tolist() == images.source.labels.tolist() == [0, 0, 1]
    for index in range(3):
        assert torch.equal(arrays[index]["pixel_values"], images[index]["pixel_values"])
        for seed in range(4):
            one, other = (each.get(index, np.random.default_rng(seed)) for each in (arrays, images))
            assert torch.equal(one["pixel_values"], other["pixel_values"])


def test_a_crop_of_many_channels_is_that_of_each(tmp_path):
    array = RNG.uniform(0, 1, (5, 70, 90)).astype(np.float32)
    save(tmp_path / "all/a.npy", array)
    for channel in range(5):
        save(tmp_path / f"{channel}/a.npy", array[channel])
    for name in ("all", *map(str, range(5))):
        (tmp_path / name / "value_range.json").write_text('{"black": 0, "white": 1}')

    def crop(name: str, channels: int):
        source = load_image_dataset(train_data_dir=tmp_path / name, channels=channels)
        return PixelDataset(source, resolution=32, random_crop=True).get(0, np.random.default_rng(3))["pixel_values"]

    whole = crop("all", 5)
    assert torch.equal(whole, torch.cat([crop(str(channel), 1) for channel in range(5)])) and whole.abs().max() <= 1


def test_every_page_of_a_tiff_is_a_channel(tmp_path):
    pages = [Image.fromarray(RNG.integers(0, 65536, (40, 48), dtype=np.uint16)) for _ in range(5)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    source = load_image_dataset(train_data_dir=tmp_path, channels=5)
    expected = np.stack([np.asarray(page) for page in pages]) / 32767.5 - 1
    assert np.allclose(to_pixels(source.get(0)[0]), expected, atol=1e-6)
    with pytest.raises(
        DataError, match=r"has 5 bands in 5 pages, .* images of 6 channels\. Give files with a page for"
    ):
        load_image_dataset(train_data_dir=tmp_path, channels=6).get(0)
    grey_and_alpha = Image.fromarray(RNG.integers(0, 256, (40, 48, 2), dtype=np.uint8), "LA")
    (tmp_path / "two").mkdir()
    grey_and_alpha.save(tmp_path / "two/a.png")
    image, _ = load_image_dataset(train_data_dir=tmp_path / "two", channels=2).get(0)
    assert np.array_equal(to_array(image), np.asarray(grey_and_alpha))


def test_a_stated_range_holds_for_ordinary_image_files_too(tmp_path):
    """A 12-bit PNG, which without a range is read as 16 bits: almost black."""
    values = RNG.integers(0, 4096, (40, 48), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    (tmp_path / "value_range.json").write_text(json.dumps({"black": 0, "white": 4095}))
    image, _ = load_image_dataset(train_data_dir=tmp_path, channels=1).get(0)
    assert np.allclose(to_pixels(image)[0], values / 2047.5 - 1, atol=1e-6)
    with pytest.raises(DataError, match="has 1 bands in 1 pages, and the autoencoder takes images of 3 channels"):
        load_image_dataset(train_data_dir=tmp_path, channels=3).get(0)
    with Image.open(tmp_path / "a.png") as turned:
        turned.getexif()[0x0112] = 6
        with pytest.raises(ValueError, match="its EXIF orientation turns it"):
            read_pages(turned, 1, (0.0, 4095.0))


def test_the_stated_range_is_part_of_what_the_data_are(tmp_path):
    save(tmp_path / "a.npy", np.zeros((40, 48), np.uint16))
    before = load_image_dataset(train_data_dir=tmp_path, channels=1).identity
    (tmp_path / "value_range.json").write_text(json.dumps({"black": 0, "white": 4095}))
    after = load_image_dataset(train_data_dir=tmp_path, channels=1).identity
    assert "value_range" not in before and after == before | {"value_range": [0.0, 4095.0]}


def test_what_cannot_be_read_is_said_when_the_data_are_opened(tmp_path):
    """Of headers alone; arrays beside images are companions, and no images."""
    for number in range(20):
        save(tmp_path / f"{number}.npy", np.zeros((40, 48, 5), np.float32))
    with pytest.raises(DataError, match="holds float32, whose range is not known"):
        load_image_dataset(train_data_dir=tmp_path, channels=5)
    with pytest.raises(DataError, match=r"0.npy has the shape \(40, 48, 5\), which is neither"):
        load_image_dataset(train_data_dir=tmp_path)
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    assert len(load_image_dataset(train_data_dir=tmp_path)) == 1
