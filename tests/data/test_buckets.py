"""Aspect buckets: which shapes there are, and that every image goes to the nearest of them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from diffusers_eqvae.data.buckets import Buckets, bucket_shapes
from diffusers_eqvae.data.image_datasets import ImageSource, PixelDataset, load_image_dataset
from diffusers_eqvae.data.image_files import image_size, read_image
from diffusers_eqvae.data.order import draw_loader

from .test_images import image, png, rows


@pytest.mark.parametrize(
    ("resolution", "stride"), [(256, 8), (256, 32), (64, 16), (40, 8), (16, 8), (8, 8), (1024, 16)]
)
def test_shapes_are_all_that_the_stride_divides_of_the_most_pixels_within_the_square(resolution, stride):
    shapes = bucket_shapes(resolution, stride)
    allowed = {}
    for short in range(stride, resolution + 1, stride):
        if 2 * short >= resolution:
            long = max(each for each in range(stride, 2 * resolution + 1, stride) if each * short <= resolution**2)
            allowed |= {(short, long): None, (long, short): None}
    assert set(shapes) == set(allowed)
    forms = [height / width for height, width in shapes]
    assert forms == sorted(forms) and (resolution, resolution) in shapes
    assert {(width, height) for height, width in shapes} == set(shapes)


def fit(sizes, *, resolution=64, stride=8, most=99, batch_size=1, count=None) -> Buckets:
    sizes = dict(enumerate(sizes))
    options = {"resolution": resolution, "stride": stride, "most": most, "batch_size": batch_size}
    return Buckets.fit(sizes, count or len(sizes), **options)


def sizes_of_photographs(count: int = 500) -> list[tuple[int, int]]:
    rng = np.random.default_rng(0)
    common = [(400, 300), (300, 400), (300, 200), (320, 180), (256, 256)]
    odd = [(int(rng.integers(60, 900)), int(rng.integers(60, 900))) for _ in range(count // 5)]
    return [common[each] for each in rng.integers(0, 5, count - len(odd))] + odd


@pytest.mark.parametrize("most", [1, 2, 5, 99])
@pytest.mark.parametrize("batch_size", [1, 16, 60, 501])
def test_every_image_has_the_nearest_shape_and_every_shape_a_batch(most, batch_size):
    sizes = sizes_of_photographs()
    buckets = fit(sizes, most=most, batch_size=batch_size)
    assert len(buckets.shapes) <= most and set(buckets.shapes) <= set(bucket_shapes(64, 8))
    held = np.bincount(buckets.of, minlength=len(buckets.shapes))
    assert held.min() >= batch_size or (len(buckets.shapes) == 1 and batch_size > len(sizes))
    for index, (width, height) in enumerate(sizes):
        kept = [min(height * w, h * width) / max(height * w, h * width) for h, w in buckets.shapes]
        assert buckets.shapes[kept.index(max(kept))] == buckets.shape(index)
        assert buckets.cut_off[index] == pytest.approx(1 - max(kept), abs=1e-12)


def test_what_is_given_up_costs_least():
    """Two shapes for three kinds: the kind that goes is the one whose images lose least, not that of fewest."""
    wide, square, nearly = (128, 32), (64, 64), (72, 56)
    buckets = fit([wide] * 4 + [square] * 9 + [nearly] * 8, most=2)
    assert buckets.shapes == ((32, 128), (64, 64))
    assert fit([wide] * 1 + [square] * 9, most=2, batch_size=2).shapes == ((64, 64),)
    assert fit([wide] * 4 + [square] * 9, most=1).shapes == ((64, 64),)


def test_it_says_what_it_does():
    said = str(fit([(96, 64)] * 3 + [(64, 96)] * 2 + [(96, 96)] * 3, batch_size=3))
    assert (
        said
        == "48x80: 3, 64x64: 5 images (height x width); cropped to these they lose 12.1% on average, 33.3% at most"
    )


def test_an_image_whose_header_cannot_be_read_has_the_shape_of_the_one_that_stands_for_it():
    buckets = Buckets.fit({1: (96, 24), 2: (24, 96)}, 4, resolution=64, stride=8, most=9, batch_size=1)
    assert [buckets.shape(index) for index in range(4)] == [(32, 128), (32, 128), (128, 32), (32, 128)]
    source = ImageSource(
        rows([b"no image", *(png(image(n, size)) for n, size in enumerate([(96, 24), (24, 96)] * 6))])
    )
    source.check(len(source))
    buckets = Buckets.fit(source.sizes, 13, resolution=64, stride=8, most=9, batch_size=2)
    dataset = PixelDataset(source, resolution=64, random_crop=True, buckets=buckets)
    got = [dataset.get(index, np.random.default_rng(0))["pixel_values"].shape[1:] for index in range(13)]
    assert got == [(32, 128), *[(32, 128), (128, 32)] * 6]


def test_all_headers_are_read_once_and_shown(monkeypatch):
    opened, seen = [], []
    monkeypatch.setattr("diffusers_eqvae.data.image_datasets.image_size", lambda *a: opened.append(1) or (20, 10))
    source = ImageSource(rows([png(image(n)) for n in range(6)]))
    source.check(3)
    source.check(6, lambda indices: [seen.append(each) or each for each in indices])
    assert len(opened) == 6 and seen == list(range(6)) == sorted(source.sizes)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turned", [1, 3, 6, 8])
def test_sizes_are_those_of_the_upright_image(form, turned, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = turned
    path = str(tmp_path / f"image.{form.lower()}")
    image(0, (40, 24)).save(path, form, exif=exif)
    assert image_size(path) == read_image(path).size == ((24, 40) if turned > 4 else (40, 24))


def test_the_orientation_of_a_png_costs_no_decoding(monkeypatch):
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("decoded"))
    assert image_size(png(image(0, (40, 24)))) == (40, 24)


@pytest.mark.parametrize("random_crop", [True, False])
def test_batches_are_of_one_shape_and_indexing_stays_square(random_crop):
    sizes = [(96, 24), (24, 96), (50, 50)] * 4
    source = ImageSource(rows([png(image(n, size)) for n, size in enumerate(sizes)]))
    source.check()
    buckets = Buckets.fit(source.sizes, len(source), resolution=32, stride=8, most=3, batch_size=2)
    options = {"resolution": 32, "random_crop": random_crop, "random_flip": True}
    dataset = PixelDataset(source, buckets=buckets, **options)
    batches = draw_loader(dataset, 2, seed=0)
    shapes = {tuple(batch["pixel_values"].shape) for batch, _ in zip(batches, range(12), strict=False)}
    assert shapes == {(2, 3, 16, 64), (2, 3, 64, 16), (2, 3, 32, 32)}
    assert dataset[0]["pixel_values"].shape == (3, 32, 32)
    assert dataset.shortest_px == 16 and PixelDataset(source, **options).shortest_px == 32
    assert dataset.identity == {**source.identity, "buckets": buckets.identity} != source.identity
    (shape,) = buckets.largest().shapes
    assert shape in {(16, 64), (64, 16), (32, 32)} and not buckets.largest().of.any()


def test_bands_of_arrays_lie_in_buckets_too(tmp_path):
    for number, shape in enumerate([(5, 20, 80), (80, 20, 5)] * 3):
        np.save(tmp_path / f"{number}.npy", np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8))
    source = load_image_dataset(train_data_dir=tmp_path, channels=5)
    buckets = Buckets.fit(source.sizes, len(source), resolution=32, stride=8, most=4, batch_size=3)
    dataset = PixelDataset(source, resolution=32, random_crop=True, buckets=buckets)
    batches = draw_loader(dataset, 3, seed=0)
    shapes = [tuple(batch["pixel_values"].shape) for batch, _ in zip(batches, range(2), strict=False)]
    assert sorted(shapes) == [(3, 5, 16, 64), (3, 5, 64, 16)]
