"""Images as they come from the world: every format ends as RGB, every defect is named."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_eqvae.data.image_datasets import ImageSource, PixelDataset, load_image_dataset
from diffusers_eqvae.data.order import DrawDataset
from diffusers_eqvae.images import Bands, adm_center_crop, random_crop_resize, to_pixels, to_rgb, to_uint8
from diffusers_eqvae.randomness import philox


def generator(number: int) -> np.random.Generator:
    return np.random.Generator(philox(0, number))


def image(seed: int = 0, size: tuple[int, int] = (24, 20)) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(levels)


def write_folder(root: Path, per_class: int = 6, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(per_class):
            image(10 * number + index).save(root / name / f"{index}.png")
    return root


def rows(images: list[bytes | None]) -> list[dict]:
    return [{"image": {"bytes": content, "path": f"{index}.png"}} for index, content in enumerate(images)]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


# ------------------------------------------------------------------ pixels


def test_uint8_is_the_inverse_of_pixels_on_every_level() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    pixels = to_pixels(Image.fromarray(levels))
    assert pixels.dtype == torch.float32 and pixels.is_contiguous() and pixels.shape == (3, 16, 16)
    assert pixels.min() == -1 and pixels.max() == 1
    assert torch.equal(to_uint8(pixels).permute(1, 2, 0), torch.from_numpy(levels))
    assert to_uint8(torch.tensor([-3.0, -1.0, 0.0, 0.99, 1.0, 3.0])).tolist() == [0, 0, 128, 254, 255, 255]


# ------------------------------------------------------------------ modes


def test_transparency_is_laid_over_white() -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.putpixel((0, 0), (10, 20, 30, 255))
    for mode in ("RGBA", "LA", "P"):
        rgb = to_rgb(image.convert(mode) if mode != "P" else Image.open(io.BytesIO(png(image.quantize()))))
        assert rgb.mode == "RGB" and rgb.getpixel((4, 4)) == (255, 255, 255)
    assert to_rgb(image).getpixel((0, 0)) == (10, 20, 30)


def test_16_bit_levels_are_scaled_not_clipped() -> None:
    levels = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    rgb = to_rgb(Image.open(io.BytesIO(png(Image.fromarray(levels)))))
    assert [rgb.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]


def test_cmyk_grey_and_bilevel_become_rgb() -> None:
    assert to_rgb(Image.new("CMYK", (8, 8), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("L", (8, 8), 77)).getpixel((0, 0)) == (77, 77, 77)
    assert to_rgb(Image.new("1", (8, 8), 1)).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(ValueError, match="floating-point"):
        to_rgb(Image.new("F", (8, 8)))


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # 90 degrees clockwise
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20)).save(buffer, "JPEG", exif=exif)
    assert to_rgb(Image.open(buffer)).size == (20, 30)


# ------------------------------------------------------------------ crops


@pytest.mark.parametrize("size", [(100, 60), (64, 128), (31, 31), (20, 24)])
def test_adm_crop_equals_its_definition_in_numpy(size: tuple[int, int]) -> None:
    crop = adm_center_crop(image(1, size), 16)
    assert crop.size == (16, 16)
    halved = np.asarray(image(1, size)).astype(np.float64)
    while min(halved.shape[:2]) >= 32:
        # Pillow averages columns, rounds to uint8, then averages rows.
        halved = np.floor((halved[:, 0::2] + halved[:, 1::2]) / 2 + 0.5)
        halved = np.floor((halved[0::2] + halved[1::2]) / 2 + 0.5)
    reference = Image.fromarray(halved.astype(np.uint8))
    scale = 16 / min(reference.size)
    reference = reference.resize((round(reference.width * scale), round(reference.height * scale)), Image.BICUBIC)
    left, top = (reference.width - 16) // 2, (reference.height - 16) // 2
    assert np.array_equal(np.asarray(crop), np.asarray(reference)[top : top + 16, left : left + 16])


def test_adm_crop_leaves_a_fitting_square_alone() -> None:
    assert adm_center_crop(image(0, (16, 16)), 16).tobytes() == image(0, (16, 16)).tobytes()


def test_random_crop_is_a_square_of_half_to_all_of_the_short_side() -> None:
    ramp = np.zeros((40, 60, 3), dtype=np.uint8)
    ramp[:, :, 0], ramp[:, :, 1] = np.arange(60)[None, :] * 4, np.arange(40)[:, None] * 4
    spans, lefts = [], []
    for number in range(300):
        crop = np.asarray(random_crop_resize(Image.fromarray(ramp), 40, generator(number))) / 4.0
        span = [crop[20, -1, 0] - crop[20, 0, 0], crop[-1, 20, 1] - crop[0, 20, 1]]
        assert abs(span[0] - span[1]) < 2
        spans.append(span[0] + 1)
        lefts.append(crop[20, 0, 0])
    assert 19 <= min(spans) <= 22 and 38 <= max(spans) <= 41 and 28 < np.mean(spans) < 32
    assert min(lefts) < 2 and max(lefts) > 30
    whole = random_crop_resize(image(), 20, generator(0), 1.0, 1.0)
    assert whole.size == (20, 20)
    with pytest.raises(ValueError, match="fractions"):
        random_crop_resize(image(), 20, generator(0), 0.9, 0.5)


SHAPES = [(40, 40), (24, 60), (60, 24), (32, 48)]


def marked(size: tuple[int, int]) -> Bands:
    """Red says how far to the right a pixel lies, in pixels of the image, and green how far down; as floats."""
    across, down = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5)
    return Bands([Image.fromarray(each.astype(np.float32)) for each in (across, down)])


def spans(crop: Bands) -> tuple[float, float, float, float]:
    """Pixels of the image per pixel of the crop, across and down, and where its middle lies; edges are resampled."""
    across, down = (np.asarray(band, dtype=np.float64) for band in crop.bands)
    row, column = crop.height // 2, crop.width // 2
    horizontal = (across[row, -4] - across[row, 3]) / (crop.width - 7)
    vertical = (down[-4, column] - down[3, column]) / (crop.height - 7)
    middle = (across[row, 3] + across[row, -4]) / 2, (down[3, column] + down[-4, column]) / 2
    return horizontal, vertical, *middle


@pytest.mark.parametrize("size", [(100, 100), (97, 61), (61, 97), (333, 100), (90, 210)])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_crop_stretches_an_image_or_shows_what_is_not_there(size, shape) -> None:
    """Beyond the rounding of a crop's sides to whole pixels: of half a pixel each, and one for each halving."""
    image, most = marked(size), min(size[0] / shape[1], size[1] / shape[0])
    centre = adm_center_crop(image, shape)
    horizontal, vertical, across, down = spans(centre)
    assert centre.size == shape[::-1]
    assert abs(horizontal / vertical - 1) < 2 / min(size) + 1 / min(shape)
    assert max(horizontal, vertical) == pytest.approx(most, rel=0.03)
    assert abs(across - size[0] / 2) <= 1.5 * most and abs(down - size[1] / 2) <= 1.5 * most
    scales, places = [], []
    for number in range(60):
        crop = random_crop_resize(image, shape, generator(number))
        horizontal, vertical, across, down = spans(crop)
        assert crop.size == shape[::-1]
        assert abs(horizontal / vertical - 1) < 0.5 / (horizontal * shape[1]) + 0.5 / (vertical * shape[0]) + 0.01
        scales.append((horizontal + vertical) / 2 / most)
        places.append((across, down))
        for middle, scale, cut, side in zip((across, down), (horizontal, vertical), shape[::-1], size, strict=True):
            assert scale * cut / 2 - 1 <= middle <= side - scale * cut / 2 + 1
    assert 0.48 < min(scales) < 0.55 and 0.95 < max(scales) < 1.02
    assert (np.ptp(places, axis=0) > 0.7 * (np.array(size) - 0.5 * most * np.array(shape[::-1]))).all()


@pytest.mark.parametrize("size", [(100, 60), (64, 128), (31, 31), (20, 24), (77, 53)])
def test_squares_are_cut_as_before_there_were_rectangles(size) -> None:
    """A transcription of the crop of squares; healthy runs go on bit for bit."""
    source = image(2, size)
    for number in range(20):
        random = generator(number)
        side = max(1, round(min(size) * random.uniform(0.5, 1.0)))
        left, top = int(random.integers(0, size[0] - side + 1)), int(random.integers(0, size[1] - side + 1))
        expected = source.resize((16, 16), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        assert random_crop_resize(source, 16, generator(number)).tobytes() == expected.tobytes()
        assert random_crop_resize(source, (16, 16), generator(number)).tobytes() == expected.tobytes()
    assert adm_center_crop(source, (16, 16)).tobytes() == adm_center_crop(source, 16).tobytes()


def test_augmentation_is_a_function_of_the_draw() -> None:
    source = ImageSource(rows([png(image(seed, (90, 70))) for seed in range(4)]), labels=np.arange(4))
    dataset = PixelDataset(source, resolution=16, random_crop=True, random_flip=True)
    draws = DrawDataset(dataset, seed=0)
    assert torch.equal(draws[5]["pixel_values"], DrawDataset(dataset, seed=0)[5]["pixel_values"])
    same_image = [n for n in range(200) if draws.order.index(n) == 0]
    assert len({draws[n]["pixel_values"].numpy().tobytes() for n in same_image}) == len(same_image)
    plain = PixelDataset(source, resolution=16, random_flip=True)
    unflipped = plain[0]["pixel_values"]
    kinds = [torch.equal(plain.get(0, generator(n))["pixel_values"], unflipped) for n in range(200)]
    assert 70 < sum(kinds) < 130
    mirrored = plain.get(0, generator(kinds.index(False)))["pixel_values"]
    assert torch.equal(mirrored, unflipped.flip(-1))


# ------------------------------------------------------------------ defects


def test_unreadable_images_are_named_counted_and_replaced(caplog) -> None:
    contents = [png(image(seed)) for seed in range(40)]
    contents[3] = b"no image"
    contents[4] = contents[4][: len(contents[4]) // 2]
    contents[39] = png(Image.new("RGB", (1, 1)))
    source = ImageSource(rows(contents), labels=np.arange(40))
    with caplog.at_level(logging.WARNING):
        found, label, used = source.read(3)
        assert (label, used) == (5, 5) and found.tobytes() == image(5).tobytes()
        assert source.read(39)[2] == 0 and source.get(3)[1] == 5
    assert source.unreadable == {3: "3.png", 4: "4.png", 39: "39.png"}
    assert len(caplog.records) == 3 and "1x1 px is smaller" in caplog.text and "(3 so far)" in caplog.text


def test_too_many_unreadable_images_are_an_error() -> None:
    source = ImageSource(rows([b"x"] * 5 + [png(image())] * 35))
    with pytest.raises(ValueError, match="At most 3 of the 40 images may be unreadable"):
        source.read(0)
    with pytest.raises(ValueError, match="At most 0 of the 2"):
        ImageSource(rows([None, b"x"])).check()
    with pytest.raises(ValueError, match="no images"):
        ImageSource([])


# ------------------------------------------------------------------ datasets


def test_class_folders(tmp_path: Path) -> None:
    source = load_image_dataset(train_data_dir=write_folder(tmp_path / "pets"), require_labels=True)
    assert len(source) == 12 and source.id2label == {0: "cat", 1: "dog"} and source.names == ["cat", "dog"]
    assert source.get(7)[1] == 1 and source.get(7)[0].tobytes() == image(11).tobytes()
    assert source.name(7) == "dog/1.png"
    example = PixelDataset(source, resolution=8)[0]
    assert example["pixel_values"].shape == (3, 8, 8) and example["class_labels"] == 0


def test_defects_in_a_folder_are_found_at_the_start(tmp_path: Path, caplog) -> None:
    root = write_folder(tmp_path / "pets")
    (root / "cat" / "broken.jpg").write_bytes(b"\xff\xd8 not a jpeg")
    with caplog.at_level(logging.WARNING):
        source = load_image_dataset(train_data_dir=root)
    assert list(source.unreadable.values()) == ["cat/broken.jpg"] and "cat/broken.jpg" in caplog.text
    (root / "cat" / "0.png").unlink()
    assert source.get(0)[0].tobytes() == image(1).tobytes()


def test_empty_class_folder_is_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "pets")
    (root / "horse").mkdir()
    with pytest.raises(ValueError, match=r"without images in .*: horse"):
        load_image_dataset(train_data_dir=root)


def test_parquet_directory_with_splits_and_text_labels(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"img": datasets.Image(), "kind": datasets.Value("string"), "n": datasets.Value("int64")}
    )
    for split, kinds in (("train", ["b", "a", "b"]), ("test", ["a"])):
        table = {"img": [image(seed) for seed in range(len(kinds))], "kind": kinds, "n": [7] * len(kinds)}
        datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "data" / f"{split}-0.parquet")
    arguments = {"train_data_dir": tmp_path / "data", "image_column": "img"}
    source = load_image_dataset(**arguments, label_column="kind")
    assert source.id2label == {0: "a", 1: "b"} and source.labels.tolist() == [1, 0, 1]
    assert len(load_image_dataset(**arguments, split="test")) == 1
    assert load_image_dataset(dataset_name=str(tmp_path / "data"), image_column="img").labels is None
    for wrong, message in (
        ({"image_column": "image"}, "no image column 'image'; the columns are img, kind, n"),
        ({"image_column": "n"}, "not images; the columns are img, kind, n"),
        ({"require_labels": True}, "no label column 'label'; the columns are img, kind, n"),
        ({"label_column": "kinds"}, "no label column 'kinds'; the columns are img, kind, n"),
        ({"split": "val"}, "no split 'val' .* it has train, test"),
    ):
        with pytest.raises(ValueError, match=message):
            load_image_dataset(**(arguments | wrong))


def test_missing_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give train_data_dir or dataset_name"):
        load_image_dataset()
    with pytest.raises(ValueError, match="not both"):
        load_image_dataset(dataset_name="a", train_data_dir=tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        load_image_dataset(train_data_dir=tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no images"):
        load_image_dataset(train_data_dir=tmp_path)
    image().save(tmp_path / "flat.png")
    assert load_image_dataset(train_data_dir=tmp_path).id2label == {}
    with pytest.raises(ValueError, match="each class needs its own subfolder"):
        load_image_dataset(train_data_dir=tmp_path, require_labels=True)
