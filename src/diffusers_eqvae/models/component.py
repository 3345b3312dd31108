"""Models that are saved into a folder of another model's directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

from diffusers import ModelMixin

from ..files import read_json
from ..pretrained import hub_file, looking_for


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

    @classmethod
    def lies_in(cls, name: str | os.PathLike[str], folder: str, revision: str | None = None) -> bool:
        """Whether a folder of a directory or Hub repository ("" is its root) holds a config of this class."""
        path = hub_file(str(name), "/".join(filter(None, (folder, cls.config_name))), revision)
        return path is not None and read_json(path).get("_class_name") == cls.__name__

    @classmethod
    def saved_beside(cls, model: Any, folder: str, **config: Any) -> Self | None:
        """The component that an earlier run saved in `folder` where `model` was loaded from; None where none is.

        Args:
            model: keeps the name it was loaded by (`config._name_or_path`), and in an attribute `location` what its
                loader was told beside it (subfolder and revision).
            folder: of the component.
            config: what the component's config must say.

        Raises:
            ValueError: it says something else.
        """
        name, location = model.config.get("_name_or_path"), dict(getattr(model, "location", {}))
        inside = "/".join(filter(None, (location.pop("subfolder", None), folder)))
        if not name or not cls.lies_in(name, inside, location.get("revision")):
            return None
        with looking_for(name, f"the {folder} beside it") as options:
            found = cls.from_pretrained(name, subfolder=inside, **location, **options)
        for key, value in config.items():
            if found.config[key] != value:
                raise ValueError(
                    f"The {folder} saved beside {name} has {key}={found.config[key]}, and {value} is needed; choose "
                    f"what it was trained with, or start from a copy of the autoencoder without {folder}."
                )
        return found
