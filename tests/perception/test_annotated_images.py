"""Annotated images on disk: what belongs to what, and that every refusal names its file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_eqvae.perception.annotated_images import paired_files, read_annotations, read_pixels
from diffusers_eqvae.perception.tasks import DepthTask

ORIENTATION = 0x0112
ON_ITS_SIDE = 6  # shown rotated by 90 degrees clockwise


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    return tmp_path / "images", tmp_path / "masks"


def save(folder: Path, name: str, size: tuple[int, int], *, mode: str = "L", orientation: int = 1) -> Path:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    # Pillow rotates TIFF by itself, and garbles it where it is not compressed.
    options = {"compression": "tiff_lzw"} if name.endswith(".tif") else {}
    Image.fromarray(noise).convert(mode).save(folder / name, exif=exif, **options)
    return folder / name


@pytest.mark.parametrize("size", [(24, 48), (48, 48), (50, 32), (12, 6)])
def test_an_annotation_of_other_proportions_is_named(folders, size):
    save(folders[0], "fine.png", (48, 32), mode="RGB")
    save(folders[1], "fine.png", (48, 32))
    save(folders[0], "odd.png", (48, 32), mode="RGB")
    save(folders[1], "odd.png", size)
    with pytest.raises(ValueError, match=rf"proportions; .*odd\.png has {size[0]}x{size[1]} px, .* 48x32 px"):
        paired_files(*folders)


@pytest.mark.parametrize("size", [(48, 32), (96, 64), (24, 16), (25, 17), (49, 32), (7, 5)])
def test_an_annotation_may_have_another_size(folders, size):
    save(folders[0], "a.jpg", (48, 32), mode="RGB")
    save(folders[1], "a.png", size)
    assert len(paired_files(*folders)) == 1


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_both_are_rotated_upright_before_they_are_compared(folders, suffix):
    save(folders[0], "a.jpg", (48, 32), mode="RGB", orientation=ON_ITS_SIDE)
    lying = save(folders[1], f"a.{suffix}", (48, 32))
    with pytest.raises(ValueError, match=r"48x32 px, .* 32x48 px"):
        paired_files(*folders)
    stored = read_annotations([lying], 32)
    save(folders[1], lying.name, (48, 32), orientation=ON_ITS_SIDE)
    paired_files(*folders)
    assert torch.equal(read_annotations([lying], 32), torch.rot90(stored, -1, (1, 2)))


@pytest.mark.parametrize("which", [0, 1])
def test_two_files_of_one_name_are_named(folders, which):
    for folder in folders:
        save(folder, "0.png", (16, 16))
    save(folders[which], "0.jpg", (16, 16))
    with pytest.raises(ValueError, match=rf"{folders[which].name} holds 0\.jpg and 0\.png"):
        paired_files(*folders)


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_files_that_are_cut_short_are_named(folders, share):
    for folder, read in zip(folders, (read_pixels, read_annotations), strict=True):
        path = save(folder, "cut.png", (48, 32))
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        with pytest.raises(ValueError, match=r"cut\.png cannot be read"):
            read([path], 16)
    if not share:
        with pytest.raises(ValueError, match=r"cut\.png cannot be read"):
            paired_files(*folders)


def test_annotations_that_compression_has_mixed_are_refused(folders):
    path = save(folders[1], "a.jpg", (48, 32))
    path = path.rename(path.with_suffix(".png"))  # what it is, and not what it is called
    with pytest.raises(ValueError, match=r"a\.png is a JPEG, whose compression mixes .*; save annotations as PNG"):
        read_annotations([path], 16)


def test_a_depth_map_without_a_valid_pixel_in_its_crop_is_named(tmp_path):
    depth = np.zeros((16, 48), np.uint16)
    depth[:, 20] = 1500
    Image.fromarray(depth).save(tmp_path / "fine.png")
    depth[:, 20], depth[:, 0] = 0, 1500
    Image.fromarray(depth).save(tmp_path / "empty.png")
    DepthTask().check_files([tmp_path / "fine.png"], 16)
    with pytest.raises(ValueError, match=r"empty\.png has no valid depth"):
        DepthTask().check_files([tmp_path / "fine.png", tmp_path / "empty.png"], 16)
