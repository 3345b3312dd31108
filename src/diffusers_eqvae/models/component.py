"""Models that are saved into a folder of another model's directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

from diffusers import ModelMixin


class ComponentMixin(ModelMixin):
    """A ModelMixin that loads the weights of its own folder.

    diffusers' `from_pretrained(directory, subfolder=name)` reads the config of the subfolder but takes a weights file
    at the directory's root where there is one, which leaves a component beside its autoencoder uninitialised.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, **kwargs: Any) -> Self:
        """As ModelMixin's, which gets all other arguments; a local `subfolder` is the directory that is loaded."""
        subfolder = kwargs.get("subfolder")
        if subfolder and pretrained_model_name_or_path and Path(pretrained_model_name_or_path).is_dir():
            pretrained_model_name_or_path = Path(pretrained_model_name_or_path) / subfolder
            kwargs.pop("subfolder")
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
