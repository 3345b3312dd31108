"""The demo's images: crops of the photographs inside scikit-image, in class folders; nothing is fetched."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from ..files import UNFINISHED

# File in scikit-image's data folder -> label: colour photographs that are told apart at 64 px.
PHOTOGRAPHS = {
    "astronaut.png": "astronaut",
    "chelsea.png": "cat",
    "coffee.png": "coffee",
    "rocket.jpg": "rocket",
    "retina.jpg": "retina",
}
CROP_SIDES = (0.6, 1.0)


def write_photographs(directory: Path, *, per_class: int, side_px: int, seed: int) -> Path:
    """Writes `per_class` random square crops of every photograph as directory/<label>/<n>.png, all of them or none.

    Args:
        side_px: side of the written images; a crop covers `CROP_SIDES` of the photograph's short side.
        seed: of the crops; another seed gives other crops of the same photographs.
    """
    import skimage

    aside = directory.with_name(directory.name + UNFINISHED)
    shutil.rmtree(aside, ignore_errors=True)
    source = Path(skimage.__file__).parent / "data"
    rng = np.random.default_rng(seed)
    for name, label in PHOTOGRAPHS.items():
        with Image.open(source / name) as file:
            photograph = file.convert("RGB")
        (aside / label).mkdir(parents=True)
        for number in range(per_class):
            crop = _random_crop(photograph, rng).resize((side_px, side_px), Image.Resampling.BICUBIC, reducing_gap=2)
            crop.save(aside / label / f"{number:03d}.png")
    aside.rename(directory)
    return directory


def _random_crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    side = round(min(image.size) * rng.uniform(*CROP_SIDES))
    left, top = (int(rng.integers(0, length - side + 1)) for length in image.size)
    return image.crop((left, top, left + side, top + side))
